"""The data module: whole batches of cached pixels, shuffled by seed and epoch, augmented on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from image_classifier.dataset.cache import PixelCache
from image_classifier.records import SPLITS, Manifest
from image_classifier.training.balance import balanced_rows

Batch = tuple[torch.Tensor, torch.Tensor]
# Pixels uint8 [N, 3, S, S], targets int64 [N], the number of classes and a generator -> pixels, and targets or class probabilities [N, C].
Augment = Callable[[torch.Tensor, torch.Tensor, int, torch.Generator], Batch]


class PixelBatches(Dataset[Batch]):
    """Batches by row numbers: pixels uint8 [B, 3, S, S] and targets int64 [B]; the cache holds pixels channels last."""

    def __init__(self, cache: PixelCache, targets: np.ndarray, channels_last: bool) -> None:
        self.cache, self.targets = cache, targets
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __getitem__(self, rows: np.ndarray) -> Batch:
        pixels = torch.from_numpy(self.cache.gather(rows)).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=self.layout), torch.from_numpy(self.targets[rows])


class ShuffledBatches(Sampler[np.ndarray]):
    """The rows in a new order each epoch, decided by (seed, epoch) alone; a last, smaller batch is left out."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = rows, min(batch_size, len(rows)), seed, 0

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def order(self) -> np.ndarray:
        """This epoch's rows, int64 [N]."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self.order()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch


class BalancedBatches(ShuffledBatches):
    """As many rows an epoch, but each class equally often: a rare one repeats its rows, of a frequent one some wait for a later epoch."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, targets: np.ndarray) -> None:
        """`targets` int64 [N] are the classes of `rows`."""
        super().__init__(rows, batch_size, seed)
        self.targets = targets

    def order(self) -> np.ndarray:
        return balanced_rows(self.rows, self.targets, self.seed, self.epoch)


class _LoaderAhead(DataLoader[Batch]):
    """Makes the next batch while the caller works on this one: for a cache that decodes, whose threads raise their errors here as they are."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(next, batches, None)
            while (batch := upcoming.result()) is not None:
                upcoming = pool.submit(next, batches, None)
                yield batch


class ImageDataModule(pl.LightningDataModule):
    """Feeds cached pixels by split; only training batches are augmented, and only training rows are balanced."""

    def __init__(
        self, cache: PixelCache, manifest: Manifest, batch_size: int, augment: Augment | None, seed: int, channels_last: bool, balanced: bool
    ) -> None:
        super().__init__()
        self.batches, self.batch_size = PixelBatches(cache, manifest.targets, channels_last), batch_size
        self.rows, self.num_classes = {split: manifest.indices(split) for split in SPLITS}, len(manifest.classes)
        self.augment, self.seed, self.balanced = augment, seed, balanced
        self._generator = torch.Generator()

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._train_batches())

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.in_order("val")

    def in_order(self, split: str) -> DataLoader[Batch]:
        """All rows of one split in manifest order."""
        rows, size = self.rows[split], 4 * self.batch_size
        return self._loader([rows[start : start + size] for start in range(0, len(rows), size)])

    def augmented(self, batch: Batch, step: int) -> Batch:
        """A batch as training sees it at this step, counted from 1; (seed, step) decide all that is random."""
        if self.augment is None:
            return batch
        self._generator.manual_seed(self.seed * 1_000_003 + step)
        return self.augment(*batch, self.num_classes, self._generator)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer is None or not self.trainer.training:
            return batch
        return self.augmented(batch, self.trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def _train_batches(self) -> ShuffledBatches:
        rows = self.rows["train"]
        if self.balanced:
            return BalancedBatches(rows, self.batch_size, self.seed, self.batches.targets[rows])
        return ShuffledBatches(rows, self.batch_size, self.seed)

    def _loader(self, batches: Iterable[np.ndarray]) -> DataLoader[Batch]:
        kind = DataLoader if self.batches.cache.is_whole else _LoaderAhead
        return kind(self.batches, sampler=batches, batch_size=None)
