"""What happens around the steps: checkpoints, the run's metrics file, throughput, and a stop when the loss is not a number."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from image_classifier.errors import ClassifierError, TrainingError
from image_classifier.files import write_text
from image_classifier.training.module import ClassifierModule

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`: the epoch with the best value of one metric."""

    def __init__(self, dirpath: str, monitor: str = "val/f1_macro", mode: str = "max") -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False)


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`: the newest epoch, and the newest step when a run is interrupted.

    Apart from the best one because Lightning 2.6 writes the *best* epoch as `last` where a metric is monitored.
    """

    def __init__(self, dirpath: str) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            monitor=None,
            save_on_exception=True,
            save_on_train_epoch_end=True,  # also in epochs without a validation
            enable_version_counter=False,
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, ClassifierError):  # a broken network must not replace a good one
            super().on_exception(trainer, pl_module, exception)


class StopOnBadLoss(Callback):
    """Ends the run with TrainingError when the loss is not a finite number, before anything good is overwritten."""

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        on_cpu = outputs["loss"].device.type == "cpu"  # elsewhere each look makes the processor wait for the device
        if (on_cpu or batch_idx % self.every_n_steps == 0) and not torch.isfinite(outputs["loss"]):
            raise TrainingError(
                f"the loss became {float(outputs['loss'])} at epoch {trainer.current_epoch}, step {trainer.global_step}",
                "lower optimizer.lr, or set trainer.gradient_clip_val=1.0; the checkpoints from before are kept",
            )


class Throughput(Callback):
    """Counts training images a second, validation and the first three steps (warm-up) left out."""

    def __init__(self, warmup_steps: int = 3) -> None:
        self.warmup_steps, self.images, self.seconds, self._start = warmup_steps, 0, 0.0, 0.0
        self._steps = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else float("nan")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self._steps += 1
        if self._steps == self.warmup_steps + 1:
            self.images, self.seconds = 0, 0.0  # a run shorter than its warm-up still says something
        self.images += len(batch[1])
        self.seconds += now - self._start
        self._start = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start += time.perf_counter() - self._paused  # a validation in the middle of an epoch is not training


class RunHistory(Callback):
    """Keeps every epoch's metrics, says them in the log and writes them to `metrics.csv` in the run folder after each one."""

    def __init__(self, path: Path, throughput: Throughput) -> None:
        self.path, self.throughput, self.rows = path, throughput, list[dict[str, float]]()
        self._validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics: dict[str, float] = cast(ClassifierModule, pl_module).train_metrics()
        if self._validated:  # else Lightning still holds the values of an earlier epoch
            metrics |= {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")}
        self._validated = False
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "learning_rate": rate, **metrics})
        write_text(self.path, self._csv())
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        log.info("epoch %d/%s  %s  images/s %.0f", trainer.current_epoch + 1, trainer.max_epochs, text, self.throughput.images_per_second)

    def _csv(self) -> str:
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def curves(self) -> dict[str, Sequence[tuple[float, float]]]:
        """Each metric's (epoch, value) points."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in ("epoch", "step"))
        return {name: [(row["epoch"], row[name]) for row in self.rows if name in row] for name in names}
