"""The data module: whole batches of cached pixels, shuffled by seed and epoch, augmented on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from image_classifier.dataset.cache import PixelCache

Batch = tuple[torch.Tensor, torch.Tensor]
Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


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

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch


class ImageDataModule(pl.LightningDataModule):
    """Feeds cached pixels by split; only training batches are augmented."""

    def __init__(
        self,
        cache: PixelCache,
        targets: np.ndarray,
        rows: dict[str, np.ndarray],
        batch_size: int,
        augment: Augment | None,
        seed: int,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.batches, self.rows, self.batch_size = PixelBatches(cache, targets, channels_last), rows, batch_size
        self.augment, self.seed = augment, seed
        self._generator = torch.Generator()

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, sampler=ShuffledBatches(self.rows["train"], self.batch_size, self.seed), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.in_order("val")

    def in_order(self, split: str) -> DataLoader[Batch]:
        """All rows of one split in manifest order."""
        rows, size = self.rows[split], 4 * self.batch_size
        return DataLoader(self.batches, sampler=[rows[start : start + size] for start in range(0, len(rows), size)], batch_size=None)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.augment is None or self.trainer is None or not self.trainer.training:
            return batch
        pixels, targets = batch
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._generator.manual_seed(self.seed * 1_000_003 + step)
        return self.augment(pixels, self._generator), targets
