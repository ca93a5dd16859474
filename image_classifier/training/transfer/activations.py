"""Kept activations: what the lower layers of a backbone answer for augmented views is computed once, then read.

The upper layers are trained on it for many epochs at the price of a few (the lower ones cost most, and are left as they
were pretrained). The file is mapped into memory, in bfloat16, and bounded by `finetune.max_gb`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from image_classifier.atomic_io import write_text
from image_classifier.errors import storage_errors
from image_classifier.modeling.classifier import Classifier, in_evaluation
from image_classifier.training.baseline import device_of
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.datamodule import Batch, BatchLoader, ImageDataModule, ShuffledBatches
from image_classifier.training.distributed import world_size
from image_classifier.training.forward import fast_function
from image_classifier.training.module import ClassifierModule
from image_classifier.training.transfer.choose_cut import CutBudget, cheapest_enough, named_cut, noise
from image_classifier.training.transfer.split_network import Cut, cuts, is_exact, split

log = logging.getLogger(__name__)

_FILE, _NOTE, _VAL_FILE = "activations.bf16", "activations.json", "activations_of_val.bf16"
_BATCH = 16
_REFIT_SHARE = 0.5  # of the epochs


@dataclass(frozen=True)
class KeptActivations:
    """Activations of images below a cut: augmented views of the training images, and the val images as they are.

    Attributes:
        cut: Where.
        lower: The layers below it: pixels uint8 [N, 3, S, S] to activations [N, ...].
        upper: The layers above it: activations to embeddings [N, D].
        train: bfloat16 as uint16, mapped from the disk, [V, N, numbers].
        val: The same of the val images as they are, [M, numbers].
        position: Of each manifest row among its split's images, int64; -1 for others.
        val_views: Augmented views of the val images, [W, M, numbers], for a training on both splits.
        is_val: Which manifest rows are val images, bool; None: these are not trained on.
    """

    cut: Cut
    lower: nn.Module
    upper: nn.Module
    train: np.ndarray
    val: np.ndarray
    position: np.ndarray
    val_views: np.ndarray | None = None
    is_val: np.ndarray | None = None

    def of_train(self, rows: np.ndarray, epoch: int) -> torch.Tensor:
        """Return activations bfloat16 [n, ...] of training rows: each epoch shows the next view of each image."""
        train = self.train[epoch % len(self.train)]
        if self.val_views is None or self.is_val is None:
            return self._tensor(train[self.position[rows]])
        val = self.val_views[epoch % len(self.val_views)]
        parts = [(val if self.is_val[row] else train)[self.position[row]] for row in rows.tolist()]
        return self._tensor(np.stack(parts))

    def of_val(self, rows: np.ndarray) -> torch.Tensor:
        """Return activations bfloat16 [n, ...] of val rows."""
        return self._tensor(self.val[self.position[rows]])

    def _tensor(self, numbers: np.ndarray) -> torch.Tensor:
        values = torch.from_numpy(np.ascontiguousarray(numbers).view(np.int16)).view(torch.bfloat16)
        activations = values.view(len(numbers), *self.cut.shape)
        is_map = len(self.cut.shape) == 3
        return activations.contiguous(memory_format=torch.channels_last) if is_map else activations


class ActivationLoader(BatchLoader):
    """Batches of kept activations bfloat16 [B, ...] and targets int64 [B] in place of a loader's pixels."""

    def __init__(self, kept: KeptActivations, loader: BatchLoader) -> None:
        super().__init__(loader.batches, loader.sampler)
        self.kept = kept

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first, 0
        for rows in islice(iter(self.sampler), first, None):
            if isinstance(self.sampler, ShuffledBatches):
                activations = self.kept.of_train(rows, self.sampler.epoch)
            else:
                activations = self.kept.of_val(rows)
            yield activations, torch.from_numpy(self.batches.targets[rows])


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
    before = classifier.scale.device
    classifier.to(device_of(config.trainer.accelerator))  # Lightning does so only when the training begins
    kept = _kept(inputs, classifier, datamodule, directory)
    classifier.to(before)
    if kept:
        train_above_cut(kept, module, datamodule)
    return kept


def train_above_cut(kept: KeptActivations, module: ClassifierModule, datamodule: ImageDataModule) -> None:
    """Freeze the layers below the cut, and train those above it on kept activations."""
    module.train_above(kept.upper, frozenset(f"backbone.{name}" for name in kept.cut.lower))
    datamodule.replaced = lambda loader: ActivationLoader(kept, loader)


def for_network(kept: KeptActivations, classifier: Classifier) -> KeptActivations:
    """Return the activations with the upper layers of another classifier, which has the same weights below the cut."""
    return replace(kept, upper=split(classifier.backbone, kept.cut)[1])


def _kept(
    inputs: TrainingInputs, classifier: Classifier, datamodule: ImageDataModule, directory: Path
) -> KeptActivations | None:
    """Return the activations below a cut; None where there is none, or its halves are not exact."""
    pixels = noise(2, inputs.config.data.image_size).to(classifier.scale.device)
    # Measured in evaluation mode: a pass in training mode would move the statistics of batch normalisation.
    with in_evaluation(classifier):
        known = [cut for cut in cuts(classifier.backbone, pixels) if cut.numbers]
        cut = _chosen(known, inputs, classifier, directory)
    if cut is None:
        return None
    lower, upper = split(classifier.backbone, cut)
    if not is_exact(classifier.backbone, lower, upper, pixels):
        log.info("activations: none are kept (the two halves at %s do not answer as the network does)", cut.name)
        return None
    return _filled(cut, _Lower(classifier, lower), upper, inputs, datamodule, directory)


def with_val_views(
    kept: KeptActivations, inputs: TrainingInputs, datamodule: ImageDataModule, directory: Path, views: int
) -> KeptActivations:
    """Return the activations with so many augmented views of the val images too.

    Raises:
        StorageError: The disk is full.
    """
    rows, path = inputs.manifest.indices("val"), directory / _VAL_FILE
    _write(path, kept.lower, inputs.config.data.image_size, _augmented_views(datamodule, rows, views))
    values = np.memmap(path, dtype=np.uint16, mode="r", shape=(views, len(rows), kept.cut.numbers))
    is_val = np.zeros(len(inputs.manifest), dtype=bool)
    is_val[rows] = True
    return replace(kept, val_views=values, is_val=is_val)


def refit_epochs(epochs: int) -> int:
    """Return how many epochs of train and val follow so many of train."""
    return math.ceil(_REFIT_SHARE * epochs)


def remove_activations(directory: Path) -> None:
    """Remove the files of a run that is finished."""
    for name in (_NOTE, _FILE, _VAL_FILE):
        (directory / name).unlink(missing_ok=True)


def _obstacle(inputs: TrainingInputs) -> str:
    config = inputs.config
    if world_size() > 1:
        return "several processes train"
    if config.views > 1 or (config.augment or {}).get("mix"):
        return "the loss compares or mixes views"
    if inputs.distillation:
        return "the teacher answers for pixels"
    if config.data.progressive_sizes:
        return "data.progressive_sizes changes the size of images"
    return ""


def _chosen(known: list[Cut], inputs: TrainingInputs, classifier: Classifier, directory: Path) -> Cut | None:
    """Return the cut that is configured, or the lowest one that is cheap enough."""
    config, num_train = inputs.config, len(inputs.manifest.indices("train"))
    views, epochs = config.finetune.views or 1, config.trainer.max_epochs or 1
    more = refit_epochs(epochs) if config.finetune.refit else 0
    # Each view of the training images, and the val images as they are; then views of these for the epochs on both.
    num_kept = views * num_train + (1 + min(more, views)) * len(inputs.manifest.indices("val"))
    budget = CutBudget(views, epochs + more, num_kept, config.finetune.cost, config.finetune.max_gb)
    if config.finetune.cut:
        return named_cut(known, config.finetune.cut, budget)
    half = torch.bfloat16 if inputs.hardware.precision == "bf16-mixed" else None
    return cheapest_enough(known, classifier.backbone, config.data.image_size, half, budget, directory)


def _filled(
    cut: Cut,
    lower: nn.Module,
    upper: nn.Module,
    inputs: TrainingInputs,
    datamodule: ImageDataModule,
    directory: Path,
) -> KeptActivations:
    """Return the activations, computed unless an interrupted run left them whole."""
    manifest, views = inputs.manifest, inputs.config.finetune.views or 1
    rows, val_rows = manifest.indices("train"), manifest.indices("val")
    position = np.full(len(manifest), -1, dtype=np.int64)
    for of_split in (rows, val_rows):
        position[of_split] = np.arange(len(of_split))
    count, path, note = views * len(rows) + len(val_rows), directory / _FILE, directory / _NOTE
    key = json.dumps([cut.name, count, cut.numbers, manifest.sha256, inputs.config.run.seed])
    if not (note.is_file() and note.read_text(encoding="utf-8") == key and path.is_file()):
        start = time.perf_counter()
        both = chain(_augmented_views(datamodule, rows, views), _as_they_are(datamodule, val_rows))
        _write(path, lower, inputs.config.data.image_size, both)
        write_text(note, key)
        log.info("activations: %d views of %d images kept in %.0f s", views, len(rows), time.perf_counter() - start)
    values = np.memmap(path, dtype=np.uint16, mode="r", shape=(count, cut.numbers))
    train, val = values[: views * len(rows)], values[views * len(rows) :]
    return KeptActivations(cut, lower, upper, train.reshape(views, len(rows), -1), val, position)


def _write(path: Path, lower: nn.Module, size: int, parts: Iterator[torch.Tensor]) -> None:
    """Write the activations of pixels uint8 [n, 3, S, S] to a file, as bfloat16."""
    compute = fast_function(lower, size)
    # Written, not mapped: on a full disk a write is refused, and a mapped page kills the process.
    with storage_errors(path), path.open("wb") as file:
        for pixels in parts:
            activations = torch.from_numpy(compute(np.ascontiguousarray(pixels.numpy()))).bfloat16()
            file.write(activations.contiguous().view(torch.int16).numpy().tobytes())


def _augmented_views(datamodule: ImageDataModule, rows: np.ndarray, views: int) -> Iterator[torch.Tensor]:
    """Yield pixels uint8 [n, 3, S, S]: each augmented view of all rows."""
    number = 0
    for view in range(views):
        for first in range(0, len(rows), _BATCH):
            chosen = rows[first : first + _BATCH]
            yield datamodule.augmented(datamodule.batches[chosen], number, view, chosen)[0]
            number += 1


def _as_they_are(datamodule: ImageDataModule, rows: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield pixels uint8 [n, 3, S, S] of all rows."""
    for first in range(0, len(rows), _BATCH):
        yield datamodule.batches[rows[first : first + _BATCH]][0]


class _Lower(nn.Module):
    """Pixels uint8 [N, 3, S, S] to activations: normalisation and the lower layers."""

    def __init__(self, classifier: Classifier, lower: nn.Module) -> None:
        super().__init__()
        self.lower = lower
        self._classifier = (classifier,)  # no part of this module; its normalisation moves to the GPU with it

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        (classifier,) = self._classifier
        activations: torch.Tensor = self.lower(torch.addcmul(classifier.shift, pixels.float(), classifier.scale))
        return activations
