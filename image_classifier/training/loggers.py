"""A Lightning logger for MLflow, and all loggers of a run as one."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from image_classifier.errors import ConfigError
from image_classifier.mlflow_tracking import Tracker
from image_classifier.training.lightning_compat import resume_wandb_run, wandb_has_id, wandb_has_started


class MLflowLogger(Logger):
    """Logs a Lightning run to MLflow once an epoch; see Tracker for what happens when the store fails.

    Args:
        tracking_uri: `sqlite:///mlflow.db`, or the address of a server.
        experiment_name: The MLflow experiment.
        run_name: The run's name in MLflow.
        tags: Values to find the run by.
        artifacts: Whether the bundle and the figures are copied there too.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        run_name: str = "",
        tags: dict[str, str] | None = None,
        artifacts: bool = True,
    ) -> None:
        super().__init__()
        self.tracker = Tracker(
            tracking_uri, experiment_name, run_name, {key: str(value) for key, value in (tags or {}).items()}
        )
        self.artifacts = artifacts

    @property
    def name(self) -> str:
        return self.tracker.experiment_name

    @property
    def version(self) -> str:
        return self.tracker.run_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.tracker.log_params(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        self.tracker.log_metrics(values, int(metrics.get("epoch", step or 0)) + 1)


class RunLoggers:
    """All loggers of a run as one: the same parameters, metrics and ending for each, from the main process only."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = loggers
        self._mlflow = [logger for logger in loggers if isinstance(logger, MLflowLogger)]

    @rank_zero_only
    def use_run_key(self, key: str, resumed: bool) -> None:
        """Give the run a unique key; with `resumed`, each logger that can do so resumes the run with that key."""
        for logger in self.loggers:
            if isinstance(logger, MLflowLogger):
                logger.tracker.continue_as(key, resumed)
            elif isinstance(logger, WandbLogger) and not wandb_has_id(logger):
                resume_wandb_run(logger, key)

    @rank_zero_only
    def begin(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Log the flat settings of the run, and tags to find it by.

        Raises:
            ConfigError: wandb cannot start.
        """
        for logger in self.loggers:
            try:
                logger.log_hyperparams({**parameters})
            except Exception as error:
                if not type(error).__module__.startswith("wandb"):
                    raise
                raise ConfigError(
                    f"wandb cannot start ({error})",
                    "run `wandb login`, or keep the run on this machine: logger.offline=true",
                ) from error
        for mlflow in self._mlflow:
            mlflow.tracker.set_tags(tags)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], epoch: int, step: int) -> None:
        """Log what is known only after the last epoch, such as test scores."""
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": epoch}, step)

    @rank_zero_only
    def keep(self, tags: Mapping[str, str], directories: Mapping[str, Path]) -> None:
        """Set tags, and copy folders to where the logger keeps files, under the given names."""
        for mlflow in self._mlflow:
            mlflow.tracker.set_tags(tags)
            for name, directory in directories.items() if mlflow.artifacts else ():
                mlflow.tracker.log_artifacts(directory, name)

    @rank_zero_only
    def keep_tables(self, tables: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """Log tables, name to columns, where a logger shows tables."""
        for mlflow in self._mlflow:
            for name, columns in tables.items() if mlflow.artifacts else ():
                mlflow.tracker.log_table(columns, name)

    @rank_zero_only
    def finish(self, status: str = "FINISHED") -> None:
        """End the run everywhere as FINISHED, FAILED or KILLED."""
        for logger in self.loggers:
            if isinstance(logger, MLflowLogger):
                logger.tracker.finish(status)
            elif isinstance(logger, WandbLogger) and wandb_has_started(logger):
                logger.experiment.summary["status"] = status
                logger.experiment.finish(exit_code=0 if status == "FINISHED" else 1)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("status", status)
                logger.experiment.close()
            elif isinstance(logger, CSVLogger):
                logger.log_hyperparams({"status": status})
                logger.save()

    def where(self) -> list[str]:
        """Return where a person finds the run, one line a logger."""
        return [f"{_shown_name(logger):<8} {_location(logger)}" for logger in self.loggers] or ["loggers  none"]


def _shown_name(logger: Logger) -> str:
    return type(logger).__name__.removesuffix("Logger")


def _location(logger: Logger) -> str:
    if isinstance(logger, MLflowLogger):
        return logger.tracker.where
    if isinstance(logger, WandbLogger):
        folder = os.path.relpath(Path(str(logger.experiment.dir)).parent)
        return (
            f"{folder}; send it with: wandb sync {folder}" if logger.experiment.offline else str(logger.experiment.url)
        )
    return str(logger.log_dir or logger.save_dir)
