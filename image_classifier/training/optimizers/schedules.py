"""Schedule of the learning rate: parameter groups keep their proportions, with warm-up before any scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from image_classifier.errors import ConfigError

_RATES = ("max_lr", "base_lr")  # arguments of schedulers that would set one rate for all groups
_MIN_STEPS = 16  # with fewer, torch's schedulers divide by the length of an empty phase

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class SchedulerSettings:
    """Settings of the learning rate's schedule.

    Attributes:
        build: Takes the optimizer, and the run's length under the name `length`; None: a constant rate.
        interval: epoch or step.
        length: Name of the argument of `build` for the run's length in steps.
        monitor: Name of the metric that the scheduler watches.
        warmup: A fraction of all steps where it is below 1, else a number of steps.
    """

    build: Callable[..., Any] | None = None
    interval: str = "epoch"
    length: str | None = None
    monitor: str | None = None
    warmup: float = 0.0


@dataclass(frozen=True)
class OptimizerAndSchedule:
    """An optimizer, its scheduler, and the number of warm-up steps."""

    optimizer: torch.optim.Optimizer
    schedule: Any | None
    warmup_steps: int


def build_optimizer_and_schedule(
    make_optimizer: OptimizerFactory, groups: list[dict[str, Any]], scheduler: SchedulerSettings, num_steps: float
) -> OptimizerAndSchedule:
    """Build the optimizer and scheduler of a run of `num_steps` optimizer steps, which may be infinite.

    Raises:
        ConfigError: They refuse their arguments, or need a length that is infinite.
    """
    try:
        optimizer = build_optimizer(make_optimizer, groups)
        length = _length(scheduler.length, num_steps)
        schedule = None if scheduler.build is None else build_scheduler(scheduler.build, optimizer, **length)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot build the optimizer or the scheduler ({error})", "see conf/optimizer and conf/scheduler"
        ) from error
    return OptimizerAndSchedule(optimizer, schedule, warmup_steps(scheduler.warmup, num_steps))


def build_optimizer(make: OptimizerFactory, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build an optimizer, and multiply each group's learning rate by the group's "lr_scale"."""
    optimizer = make(groups)
    for group in optimizer.param_groups:
        # Removed, as timm's schedulers would multiply by it again.
        group["lr"] *= group.pop("lr_scale", 1.0)
    return optimizer


def build_scheduler(build: Callable[..., Any], optimizer: torch.optim.Optimizer, **length: int) -> Any:
    """Build a scheduler that keeps the groups' proportions, also from one peak for all (OneCycleLR, CyclicLR)."""
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
            "this scheduler needs the length of the run", "set trainer.max_epochs, or use scheduler=constant"
        )
    return {name: max(_MIN_STEPS, int(num_steps))}


def warmup_steps(warmup: float, num_steps: float) -> int:
    """Return `scheduler.warmup` in optimizer steps: below 1 it is a fraction of all `num_steps`.

    Raises:
        ConfigError: It is negative or infinite, or a fraction of a run without a length.

    >>> warmup_steps(0.05, 1000), warmup_steps(500, float("inf"))
    (50, 500)
    """
    if not 0 <= warmup < float("inf"):
        raise ConfigError(
            f"invalid scheduler.warmup={warmup}", "use a fraction of the run below 1, or a number of steps"
        )
    if warmup == 0 or warmup >= 1:
        return round(warmup)
    if num_steps == float("inf"):
        raise ConfigError(
            f"scheduler.warmup={warmup} is a fraction of a run without a length",
            "set trainer.max_epochs, or give scheduler.warmup in steps",
        )
    return round(warmup * num_steps)


def warmup_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rates at a step, counted from 0: it rises linearly over `steps`, then is 1.

    Source: Goyal et al. (2017), section 2.2.

    >>> [warmup_factor(step, 4) for step in (0, 1, 3, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / steps) if steps else 1.0


@contextmanager
def scaled_rates(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Multiply every group's learning rate inside the block; restore it to the last bit, for the schedulers."""
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
