"""The progress bar of a terminal."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from image_classifier.training.callbacks import Throughput


class ImagesProgressBar(RichProgressBar):
    """Lightning's rich progress bar with training images a second; shown on terminals only."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__(leave=False)
        self.throughput = throughput

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**metrics, "images/s": round(self.throughput.images_per_second, 1)}
