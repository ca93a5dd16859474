"""Where a backbone is cut: as low as the budget allows, by the measured seconds of each layer."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from image_classifier.errors import ConfigError
from image_classifier.text import did_you_mean
from image_classifier.training.depthwise import depthwise_in_float32
from image_classifier.training.transfer.split_network import Cut, traced

log = logging.getLogger(__name__)

_SPARE = 2.0  # the disk must have so many times the file's size free
_PASSES = 2  # the fastest counts: what else runs on the machine only slows a pass down
_IMAGES = 8  # with fewer the fixed costs of small layers count too much
_WIDE = 2.0  # a layer with more than so many times the fewest numbers below it is the inside of a bottleneck
_LAYERS = 4  # of a stage between two cuts that are compared


@dataclass(frozen=True)
class CutBudget:
    """What keeping activations may cost.

    Attributes:
        views: Kept for each training image.
        epochs: Trained above the cut.
        num_kept: Views of all images together.
        cost: Keeping and training together, in epochs of training all layers.
        max_gb: Of the file.
    """

    views: int
    epochs: int
    num_kept: int
    cost: float
    max_gb: float

    def gigabytes(self, cut: Cut) -> float:
        """Return the size of the file, in bfloat16."""
        return 2e-9 * cut.numbers * self.num_kept


def named_cut(known: Sequence[Cut], name: str, budget: CutBudget) -> Cut:
    """Return the cut of this name.

    Raises:
        ConfigError: There is none, or its file is too large.
    """
    named = {cut.name: cut for cut in known}
    if name not in named:
        raise ConfigError(
            f"finetune.cut={name!r} is no layer at which the network can be cut",
            f"{did_you_mean(name, named)}leave it out to have one found by measuring",
        )
    if (needed := budget.gigabytes(named[name])) > budget.max_gb:
        raise ConfigError(
            f"the activations at finetune.cut={name} need {needed:.1f} GB, and finetune.max_gb is {budget.max_gb:g}",
            "raise finetune.max_gb, lower finetune.views, or name a layer further up",
        )
    return named[name]


def cheapest_enough(
    known: Sequence[Cut], backbone: nn.Module, size: int, half: torch.dtype | None, budget: CutBudget, directory: Path
) -> Cut | None:
    """Return the lowest cut within the budget, else the cheapest one.

    None where the disk has no room for any, or the network cannot be traced; the log says which.

    Args:
        known: Cuts of the backbone, the lowest first.
        backbone: Pixels float [N, 3, S, S] to embeddings, in evaluation mode.
        size: S.
        half: The 16-bit format that the training computes in; None: float32.
        budget: What it may cost.
        directory: On the disk that the file goes to.
    """
    graph = traced(backbone, training=False)
    if not known or graph is None:
        log.info("activations: none are kept (torch.fx cannot trace the network)")
        return None
    ends = stage_ends(known)
    room = min(budget.max_gb, shutil.disk_usage(directory).free / _SPARE / 1e9)
    fitting = [cut for cut in ends if budget.gigabytes(cut) <= room]
    if not fitting:
        log.warning(
            "activations: none are kept, so all layers are trained, which takes longer: they need %.2g GB, and the "
            "smaller of finetune.max_gb and half of the free disk is %.2g GB; free some space, or raise the limit",
            *(min(map(budget.gigabytes, ends)), room),
        )
        return None
    device = next(backbone.parameters()).device
    times = measured(graph, noise(_IMAGES, size).to(device, memory_format=torch.channels_last), half)
    costs = {cut: times.cost(cut, budget) for cut in fitting}
    log.debug("activations: cost of each cut: %s", ", ".join(f"{cut.name} {cost:.2f}" for cut, cost in costs.items()))
    chosen = next((cut for cut in fitting if costs[cut] <= budget.cost), min(fitting, key=costs.__getitem__))
    log.info(
        "activations: %d views below %s are kept, %.0f MB: %.1f times the work of an epoch of all layers",
        *(budget.views, chosen.name, 1e3 * budget.gigabytes(chosen), costs[chosen]),
    )
    return chosen


def stage_ends(known: Sequence[Cut]) -> list[Cut]:
    """Return the ends of a network's stages; of a stage with many layers some ends of layers too.

    A stage is a run of cuts with equally many numbers; the wide inside of a bottleneck is none. Stages are few, so that
    their costs lie apart, and a choice by the clock repeats.
    """
    ends: list[Cut] = []
    fewest = math.inf
    for numbers, run in groupby(known, key=lambda cut: cut.numbers):
        fewest = min(fewest, numbers)
        if numbers <= _WIDE * fewest:
            ends += [*run][::-1][::_LAYERS][::-1]
    return ends


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of each layer by name, in order: of a forward pass, and of a training step (its gradient included)."""

    forward: Mapping[str, float]
    step: Mapping[str, float]

    def cost(self, cut: Cut, budget: CutBudget) -> float:
        """Return the work of keeping and training, in epochs of training all layers."""
        at = list(self.forward).index(cut.name) + 1
        below, above = sum([*self.forward.values()][:at]), sum([*self.step.values()][at:])
        return (budget.views * below + budget.epochs * above) / sum(self.step.values())


def measured(graph: fx.GraphModule, pixels: torch.Tensor, half: torch.dtype | None) -> LayerTimes:
    """Return the fastest time of each layer over some passes, in which all are measured in turn."""
    forward, step = _ForwardTimer(graph), _StepTimer(graph)
    with torch.autocast(pixels.device.type, half, enabled=half is not None):
        for _ in range(1 + _PASSES):
            with torch.no_grad():
                forward.run(pixels)
            with depthwise_in_float32(pixels.device):
                step.run(pixels)
            graph.zero_grad(set_to_none=True)
    return LayerTimes(forward.fastest(), step.fastest())


class _ForwardTimer(fx.Interpreter):
    """Runs a graph and notes the seconds of each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._seconds: dict[str, list[float]] = {}

    def fastest(self) -> dict[str, float]:
        """Return the fewest seconds of each node; the first pass, a warm-up, does not count."""
        return {name: min(seconds[1:]) for name, seconds in self._seconds.items()}

    def run_node(self, n: fx.Node) -> object:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._given)
        start = _now()
        value = self._computed(getattr(self, n.op)(n.target, args, kwargs))
        self._seconds.setdefault(n.name, []).append(_now() - start)
        return value

    def _given(self, value: Any) -> Any:
        """Return what a node is given."""
        return value

    def _computed(self, value: object) -> object:
        """Return what the nodes after it get, within the time of the node."""
        return value


class _StepTimer(_ForwardTimer):
    """The same with each node's own gradient."""

    def _given(self, value: Any) -> Any:
        # A copy: a layer may write into what it is given, which autograd refuses of a leaf.
        return value.clone() if isinstance(value, torch.Tensor) and value.requires_grad else value

    def _computed(self, value: object) -> object:
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        if value.grad_fn:
            torch.autograd.backward(value, torch.ones_like(value))
        return value.detach().requires_grad_()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # calls return before a GPU has computed
    return time.perf_counter()


def noise(count: int, size: int) -> torch.Tensor:
    """Return pixels float [count, 3, S, S] that do not touch the random numbers of the run."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
