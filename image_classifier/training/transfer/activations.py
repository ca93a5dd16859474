"""Kept activations: what the lower layers of a backbone answer for augmented views is computed once, then read.

The upper layers are trained on it for many epochs at the price of a few (the lower ones cost most, and are left as they
were pretrained). The file is mapped into memory, in bfloat16, and bounded by `finetune.max_gb`.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from image_classifier.atomic_io import write_text
from image_classifier.modeling.classifier import Classifier, in_evaluation
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.datamodule import Batch, BatchLoader, ImageDataModule, ShuffledBatches
from image_classifier.training.distributed import rank_share, world_size
from image_classifier.training.forward import fast_function
from image_classifier.training.module import ClassifierModule
from image_classifier.training.transfer.split_network import Cut, cuts, is_exact, split

log = logging.getLogger(__name__)

_FILE, _NOTE = "activations.bf16", "activations.json"
_BATCH = 32
_TIMED = 1  # calls of each measurement, after one that is not counted
_SPARE = 2.0  # the disk must have so many times the file's size free


@dataclass(frozen=True)
class KeptActivations:
    """Activations of training images below a cut.

    Attributes:
        cut: Where.
        upper: The layers above it: activations [N, ...] to embeddings [N, D].
        values: bfloat16 as uint16, mapped from the disk, [V, N, numbers].
        position: Of each manifest row among the N images, int64; -1 for others.
    """

    cut: Cut
    upper: nn.Module
    values: np.ndarray
    position: np.ndarray

    def of(self, rows: np.ndarray, epoch: int) -> torch.Tensor:
        """Return activations bfloat16 [n, ...] of some manifest rows: each epoch shows the next view of each image."""
        view = self.values[epoch % len(self.values)]
        chosen = np.ascontiguousarray(view[self.position[rows]]).view(np.int16)
        activations = torch.from_numpy(chosen).view(torch.bfloat16).view(len(rows), *self.cut.shape)
        is_map = len(self.cut.shape) == 3
        return activations.contiguous(memory_format=torch.channels_last) if is_map else activations


class ActivationLoader(BatchLoader):
    """Batches of kept activations bfloat16 [B, ...] and targets int64 [B] instead of pixels."""

    def __init__(self, kept: KeptActivations, targets: np.ndarray, sampler: ShuffledBatches) -> None:
        self.kept, self.targets, self.sampler, self.shuffled, self._first = kept, targets, sampler, sampler, 0

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first, 0
        for rows in list(self.shuffled)[first:]:
            yield self.kept.of(rows, self.shuffled.epoch), torch.from_numpy(self.targets[rows])


def keep_activations(
    inputs: TrainingInputs, module: ClassifierModule, datamodule: ImageDataModule, directory: Path
) -> KeptActivations | None:
    """Choose a cut, keep the activations of `finetune.views` views below it, and freeze the layers below it.

    None where every view has to be computed anew: a network that torch.fx cannot trace, several processes, images that
    are mixed, or a disk that is too small.
    """
    config, classifier = inputs.config, module.classifier
    if reason := _obstacle(inputs):
        log.info("activations: none are kept (%s)", reason)
        return None
    size = config.data.image_size
    example = torch.zeros(2, 3, size, size)
    # Measured in evaluation mode: a pass in training mode would move the statistics of batch normalisation.
    with in_evaluation(classifier):
        known = [cut for cut in cuts(classifier.backbone, example) if cut.numbers]
        cut = _chosen(known, inputs, classifier, directory)
    if cut is None:
        log.info("activations: none are kept (no layer at which the network can be cut is cheap enough)")
        return None
    lower, upper = split(classifier.backbone, cut)
    if not is_exact(classifier.backbone, lower, upper, torch.rand(2, 3, size, size)):
        log.info("activations: none are kept (the two halves at %s do not answer as the network does)", cut.name)
        return None
    kept = _filled(cut, lower, upper, inputs, classifier, datamodule, directory)
    module.train_above(upper, frozenset(f"backbone.{name}" for name in cut.lower))
    datamodule.train_loader = lambda sampler: ActivationLoader(kept, inputs.manifest.targets, sampler)
    return kept


def remove_activations(directory: Path) -> None:
    """Remove the file of a run that is finished."""
    for name in (_NOTE, _FILE):
        (directory / name).unlink(missing_ok=True)


def _obstacle(inputs: TrainingInputs) -> str:
    config = inputs.config
    if world_size() > 1:
        return "several processes train"
    if config.views > 1 or (config.augment or {}).get("mix"):
        return "the loss compares or mixes views"
    if config.data.progressive_sizes:
        return "data.progressive_sizes changes the size of images"
    return ""


def _chosen(known: list[Cut], inputs: TrainingInputs, classifier: Classifier, directory: Path) -> Cut | None:
    """Return the lowest cut that is cheap enough, by the measured seconds of an image; the configured one if any.

    Cheap enough: keeping and training together cost no more than `finetune.cost` epochs of training all layers.
    """
    config, num_train = inputs.config, len(inputs.manifest.indices("train"))
    views, epochs = config.finetune.views or 1, config.trainer.max_epochs or 1
    if config.finetune.cut:
        return next((cut for cut in known if cut.name == config.finetune.cut), None)
    room = min(config.finetune.max_gb * 1e9, shutil.disk_usage(directory).free / _SPARE)
    fitting = [cut for cut in known if 2 * cut.numbers * views * num_train <= room]
    if not fitting:
        return None
    size = config.data.image_size
    pixels = torch.rand(_BATCH // 2, 3, size, size).contiguous(memory_format=torch.channels_last)
    half = torch.bfloat16 if inputs.hardware.precision == "bf16-mixed" else None
    whole = _step_s(classifier.backbone, pixels, half)
    budget = config.finetune.cost * whole
    costs: list[tuple[Cut, float]] = []
    # From the top down, until a cut is too dear: lower ones are dearer still.
    for cut in _spread(fitting, 6)[::-1]:
        lower, upper = split(classifier.backbone, cut)
        with torch.no_grad():
            below = _seconds(lambda: lower(pixels)) if half is None else _seconds(lambda: _half(lower, pixels, half))
            activations = lower(pixels)
        above = _step_s(upper, activations, half)
        cost = views * below + epochs * above
        costs.append((cut, cost))
        if cost > budget:
            break
    affordable = [(cut, cost) for cut, cost in costs if cost <= budget]
    cut, cost = affordable[-1] if affordable else costs[0]
    log.info(
        "activations: %d views below %s are kept, %.0f MB: %.1f times the work of an epoch of all layers",
        *(views, cut.name, 2e-6 * cut.numbers * views * num_train, cost / whole),
    )
    return cut


def _spread(found: list[Cut], count: int) -> list[Cut]:
    step = max(1, len(found) // count)
    return found[::-1][::step][::-1]


def _half(module: nn.Module, pixels: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    with torch.autocast(pixels.device.type, half):
        result: torch.Tensor = module(pixels)
    return result


def _step_s(module: nn.Module, values: torch.Tensor, half: torch.dtype | None) -> float:
    """Return the seconds of a forward and a backward pass of a batch; gradients are thrown away."""

    def step() -> None:
        values_ = values.detach()
        result = module(values_) if half is None else _half(module, values_, half)
        result.float().sum().backward()
        module.zero_grad(set_to_none=True)

    return _seconds(step)


def _seconds(call: Callable[[], object]) -> float:
    call()
    spent = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)


def _filled(
    cut: Cut,
    lower: nn.Module,
    upper: nn.Module,
    inputs: TrainingInputs,
    classifier: Classifier,
    datamodule: ImageDataModule,
    directory: Path,
) -> KeptActivations:
    """Return the activations, computed unless an interrupted run left them whole."""
    rows, views = inputs.manifest.indices("train"), inputs.config.finetune.views or 1
    position = np.full(len(inputs.manifest), -1, dtype=np.int64)
    position[rows] = np.arange(len(rows))
    shape, path, note = (views, len(rows), cut.numbers), directory / _FILE, directory / _NOTE
    key = json.dumps([cut.name, shape, inputs.manifest.sha256, inputs.config.run.seed])
    if not (note.is_file() and note.read_text(encoding="utf-8") == key and path.is_file()):
        values = np.memmap(path, dtype=np.uint16, mode="w+", shape=shape)
        start = time.perf_counter()
        compute = fast_function(_Lower(classifier, lower), inputs.config.data.image_size)
        batches = -(-len(rows) // _BATCH)  # of a view; each batch has a number, and so an augmentation, of its own
        for view in range(views):
            for first in range(0, len(rows), _BATCH):
                chosen = rows[first : first + _BATCH]
                number = view * batches + first // _BATCH
                pixels, _ = datamodule.augmented(datamodule.batches[chosen], number, view, chosen)
                activations = torch.from_numpy(compute(np.ascontiguousarray(pixels.numpy()))).bfloat16()
                values[view, first : first + len(chosen)] = activations.flatten(1).view(torch.int16).numpy().view(np.uint16)
        values.flush()
        write_text(note, key)
        log.info("activations: %d views of %d images kept in %.0f s", views, len(rows), time.perf_counter() - start)
    values = np.memmap(path, dtype=np.uint16, mode="r", shape=shape)
    return KeptActivations(cut, upper, values, position)


class _Lower(nn.Module):
    """Pixels uint8 [N, 3, S, S] to activations: normalisation and the lower layers."""

    def __init__(self, classifier: Classifier, lower: nn.Module) -> None:
        super().__init__()
        self.lower = lower
        self.scale, self.shift = classifier.scale, classifier.shift

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        activations: torch.Tensor = self.lower(torch.addcmul(self.shift, pixels.float(), self.scale))
        return activations
