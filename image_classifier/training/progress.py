"""The progress bar of a terminal."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from image_classifier.training.callbacks.csv_metrics import planned_epochs
from image_classifier.training.callbacks.throughput import Throughput


class ImagesProgressBar(RichProgressBar):
    """Lightning's rich progress bar with training images a second; shown on terminals only."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__(leave=False)
        self.throughput = throughput

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = {"val f1": trainer.callback_metrics.get("val/f1_macro"), "images/s": self.throughput.images_per_second}
        return {name: f"{float(value):.3g}" for name, value in shown.items() if value is not None}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{planned_epochs(self.trainer)}"  # counted from 1, as in the log
