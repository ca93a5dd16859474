"""Metrics of every epoch, in the log and in `metrics.csv` of the run folder."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from math import ceil, inf
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from image_classifier.atomic_io import write_text
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.distributed import is_rank_zero
from image_classifier.training.module import ClassifierModule

log = logging.getLogger(__name__)


class CSVMetrics(Callback):
    """Writer of `metrics.csv`: one row per epoch, rewritten and logged after each epoch."""

    def __init__(self, path: Path, throughput: Throughput) -> None:
        self.path = path
        self.throughput = throughput
        self.rows: list[dict[str, float]] = []
        self._has_validated = False

    @property
    def state_key(self) -> str:
        """The name of the state in checkpoints, which is the class's old name."""
        return "RunHistory"

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "validated": self._has_validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])
        self._has_validated = state["validated"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = cast(ClassifierModule, pl_module)
        metrics = module.train_metrics()
        if self._has_validated:  # else Lightning still holds the values of an earlier epoch
            metrics |= {
                name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")
            }
        self._has_validated = False
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "step": trainer.global_step,
                "learning_rate": module.learning_rate,
                **metrics,
            }
        )
        if is_rank_zero():
            write_text(self.path, self._as_csv())
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        log.info(
            "epoch %d/%s  %s  images/s %.0f",
            trainer.current_epoch + 1,
            planned_epochs(trainer),
            text,
            self.throughput.images_per_second,
        )

    def _as_csv(self) -> str:
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def curves(self) -> dict[str, Sequence[tuple[float, float]]]:
        """Return each metric's (epoch, value) points."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in ("epoch", "step"))
        return {name: [(row["epoch"], row[name]) for row in self.rows if name in row] for name in names}


def planned_epochs(trainer: pl.Trainer) -> str:
    """Return the planned number of epochs, the last one perhaps incomplete; `?` where nothing limits the run."""
    steps = float(trainer.estimated_stepping_batches)
    if steps == inf:
        return "?"
    return str(ceil(steps * trainer.accumulate_grad_batches / max(1, trainer.num_training_batches)))
