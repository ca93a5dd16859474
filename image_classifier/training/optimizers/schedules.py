"""The learning rate's course over a run: every group in proportion to its own rate, and warm-up in front of any scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from image_classifier.errors import ConfigError

_RATES = ("max_lr", "base_lr")  # arguments of schedulers that would set one rate for all groups
_SHORTEST = 16  # steps: below that torch's schedulers divide by the length of an empty phase

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class SchedulerSettings:
    """How the learning rate moves: `build` takes the optimizer (and the run's length under the name `length`).

    `warmup` is a share of all steps where it is below 1, else a number of them.
    """

    build: Callable[..., Any] | None = None
    interval: str = "epoch"
    length: str | None = None
    monitor: str | None = None
    warmup: float = 0.0


@dataclass(frozen=True)
class OptimizerAndSchedule:
    """An optimizer, the scheduler that moves its rates, and over how many steps they rise first."""

    optimizer: torch.optim.Optimizer
    schedule: Any | None
    warmup_steps: int


def build_optimizer_and_schedule(
    make_optimizer: OptimizerFactory, groups: list[dict[str, Any]], scheduler: SchedulerSettings, num_steps: float
) -> OptimizerAndSchedule:
    """Optimizer and scheduler of a run of `num_steps` optimizer steps, which may be infinite; ConfigError where they cannot be built."""
    try:
        optimizer = build_optimizer(make_optimizer, groups)
        length = _length(scheduler.length, num_steps)
        schedule = None if scheduler.build is None else build_scheduler(scheduler.build, optimizer, **length)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the optimizer or the scheduler cannot be built ({error})", "see conf/optimizer and conf/scheduler"
        ) from error
    return OptimizerAndSchedule(optimizer, schedule, warmup_steps(scheduler.warmup, num_steps))


def build_optimizer(make: OptimizerFactory, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer whose groups learn at their own rates: the rate it gives a group times the group's "lr_scale"."""
    optimizer = make(groups)
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)  # taken out, as timm's schedulers would multiply by it again
    return optimizer


def build_scheduler(build: Callable[..., Any], optimizer: torch.optim.Optimizer, **length: int) -> Any:
    """A scheduler that keeps the groups' rates in proportion, also where it is given one peak for all (OneCycleLR, CyclicLR)."""
    given = getattr(build, "keywords", {})
    base = optimizer.defaults.get("lr")
    peaks = {
        key: [given[key] * (group["lr"] / base) for group in optimizer.param_groups]
        for key in _RATES
        if base and _is_number(given.get(key))
    }
    return build(optimizer, **length, **peaks)


def _length(name: str | None, num_steps: float) -> dict[str, int]:
    if not name:
        return {}
    if num_steps == float("inf"):
        raise ConfigError(
            "this scheduler needs to know how long the run is", "set trainer.max_epochs, or use scheduler=constant"
        )
    return {name: max(_SHORTEST, int(num_steps))}


def warmup_steps(warmup: float, num_steps: float) -> int:
    """`scheduler.warmup` in optimizer steps: a share of all `num_steps` where it is below 1; ConfigError where it is impossible."""
    if not 0 <= warmup < float("inf"):
        raise ConfigError(
            f"scheduler.warmup={warmup} is impossible", "give a share of the run below 1, or a number of steps"
        )
    if warmup == 0 or warmup >= 1:
        return round(warmup)
    if num_steps == float("inf"):
        raise ConfigError(
            "scheduler.warmup is a share of a run whose length is not known",
            "set trainer.max_epochs, or give warmup in steps",
        )
    return round(warmup * num_steps)


def warmup_factor(step: int, steps: int) -> float:
    """What the rates of a step, counted from 0, are multiplied by: rises linearly over `steps`, then is 1 (Goyal et al., 2017, section 2.2)."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


@contextmanager
def scaled_rates(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Within it every group's rate is multiplied; afterwards it is what it was to the last bit, as schedulers build on it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
