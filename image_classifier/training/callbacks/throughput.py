"""Training images per second."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from image_classifier.training.distributed import world_size
from image_classifier.training.lightning_compat import datamodule_of


class Throughput(Callback):
    """Counter of training images per second, without validations and the first three steps (warm-up)."""

    def __init__(self, warmup_steps: int = 3) -> None:
        self.warmup_steps = warmup_steps
        self.images = 0
        self.seconds = 0.0
        self._before = (0, 0.0)  # images and seconds of the run before it was resumed
        self._num_steps = 0
        self._step_start = 0.0
        self._validation_start = 0.0

    @property
    def images_per_second(self) -> float:
        """Images per second so far, NaN before the first step."""
        return self.images / self.seconds if self.seconds else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = (state["images"], state["seconds"])
        self.images, self.seconds = self._before

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_start = time.perf_counter()  # a resumed run may start in mid-epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._num_steps += 1
        # The warm-up is dropped when it is over: a run shorter than its warm-up still has a rate.
        if self._num_steps == self.warmup_steps + 1:
            self.images, self.seconds = self._before
        views = getattr(datamodule_of(trainer), "views", 1)  # augmented copies of each image in a batch
        self.images += len(batch[0]) // views * world_size()
        self.seconds += now - self._step_start
        self._step_start = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A validation in mid-epoch is not training time.
        self._step_start += time.perf_counter() - self._validation_start
