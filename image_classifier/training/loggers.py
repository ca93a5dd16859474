"""A Lightning logger over tracking.Tracker: MLflow that can be down without stopping the training."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from image_classifier.tracking import Tracker


class MLflowLogger(Logger):
    """Logs a Lightning run to MLflow once an epoch; see Tracker for what happens when the store fails."""

    def __init__(self, tracking_uri: str, experiment_name: str, run_name: str = "", tags: dict[str, str] | None = None) -> None:
        super().__init__()
        self.tracker = Tracker(tracking_uri, experiment_name, run_name, tags or {})

    @property
    def name(self) -> str:
        return self.tracker.experiment_name

    @property
    def version(self) -> str:
        return self.tracker.run_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The module's blueprint is in the checkpoint; the run's settings are logged by the composition root."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        epoch = int(metrics.pop("epoch", step or 0)) + 1
        self.tracker.log_metrics(metrics, epoch)
