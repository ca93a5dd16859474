"""Training images a second."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from image_classifier.training.distributed import world_size


class Throughput(Callback):
    """Counts training images a second, validation and the first three steps (warm-up) left out."""

    def __init__(self, warmup_steps: int = 3) -> None:
        self.warmup_steps, self.images, self.seconds, self._start = warmup_steps, 0, 0.0, 0.0
        self._steps, self._before = 0, (0, 0.0)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images, self.seconds = self._before = state["images"], state["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()  # a resumed run may begin in the middle of an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._steps += 1
        if self._steps == self.warmup_steps + 1:
            self.images, self.seconds = self._before  # a run shorter than its warm-up still says something
        views = getattr(trainer.datamodule, "views", 1)  # type: ignore[attr-defined]
        self.images += len(batch[1]) // views * world_size()
        self.seconds += now - self._start
        self._start = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start += time.perf_counter() - self._paused  # a validation in the middle of an epoch is not training
