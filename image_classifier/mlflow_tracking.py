"""The only file that knows MLflow: a run that is logged where possible and never lost where not."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from image_classifier.atomic_io import file_lock
from image_classifier.errors import ConfigError
from image_classifier.text import hide_passwords

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 30.0
_PARAMETERS_A_CALL = 100
_KEY_TAG = "image_classifier.run"
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")


class Tracker:
    """One MLflow run; when the store fails it warns once, keeps what it was told, and tries again later.

    Args:
        tracking_uri: `sqlite:///mlflow.db`, or the `http(s)://` address of a server.
        experiment_name: The MLflow experiment, made where it does not exist.
        run_name: The run's name in MLflow.
        tags: Facts to find the run by.
    """

    def __init__(self, tracking_uri: str, experiment_name: str, run_name: str, tags: Mapping[str, str]) -> None:
        if not tracking_uri.startswith(
            ("sqlite:", "http://", "https://", "postgresql", "mysql", "mssql", "databricks")
        ):
            raise ConfigError(
                f"logger.tracking_uri={tracking_uri!r} is not a store MLflow can use",
                "use sqlite:///mlflow.db or the http:// address of a server (MLflow 3 refuses plain folders)",
            )
        self.tracking_uri, self.experiment_name, self.run_name, self.tags = (
            tracking_uri,
            experiment_name,
            run_name,
            dict(tags),
        )
        self._shown = hide_passwords(tracking_uri)  # without a password
        self.run_id, self._experiment_id = "", ""
        self._client: Any = None
        self._waiting: list[Callable[[Any], None]] = []
        self._retry_at = 0.0
        self.lost_contact = False
        self._goes_on = False
        self._known: set[str] = set()  # parameters and (metric, step) points that an earlier part of the run has logged
        self._points: set[tuple[str, int]] = set()

    def go_on_as(self, key: str, resumed: bool) -> None:
        """Mark the run with a key of its own; with `resumed` the run that has it is gone on with. To be called before anything is logged."""
        self.tags[_KEY_TAG] = key
        self._goes_on = resumed

    def log_params(self, parameters: Mapping[str, Any]) -> None:
        """Log the settings of the run."""
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:6000]) for key, value in parameters.items()]
        for part in (rows[start : start + _PARAMETERS_A_CALL] for start in range(0, len(rows), _PARAMETERS_A_CALL)):
            self._do(self._parameters_call(part))

    def _parameters_call(self, part: list[Any]) -> Callable[[Any], None]:
        return lambda client: client.log_batch(self.run_id, params=[row for row in part if row.key not in self._known])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values under their names at one step."""
        from mlflow.entities import Metric

        if not metrics:
            return
        now = int(time.time() * 1000)
        rows = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._do(
            lambda client: client.log_batch(
                self.run_id, metrics=[row for row in rows if (row.key, row.step) not in self._points]
            )
        )

    def log_artifacts(self, directory: Path, name: str) -> None:
        """Copy a folder into the run's artifacts under `name`."""
        self._do(lambda client: client.log_artifacts(self.run_id, str(directory), name))

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Log columns of one length as a table that MLflow's pages show and compare."""
        data = {key: list(values) for key, values in columns.items()}

        def call(client: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MLflow's own use of pandas
                client.log_table(self.run_id, data=data, artifact_file=f"{name}.json")

        self._do(call)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set facts on the run."""
        from mlflow.entities import RunTag

        rows = [RunTag(key, str(value)) for key, value in tags.items()]
        self._do(lambda client: client.log_batch(self.run_id, tags=rows))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run (FINISHED, FAILED or KILLED) after one last try to log what is waiting."""
        self._retry_at = 0.0
        self._do(lambda client: client.set_terminated(self.run_id, status))
        if self._waiting:
            log.warning(
                "%d calls to MLflow at %s were never answered; the run folder keeps everything",
                len(self._waiting),
                self._shown,
            )

    @property
    def where(self) -> str:
        """Where a person finds the run."""
        if not self.run_id or self.lost_contact:
            return f"not logged ({self._shown} did not answer)"
        if self.tracking_uri.startswith("sqlite:"):
            return f"run {self.run_id} in {self._shown}; look with: mlflow ui --backend-store-uri {self._shown}"
        return f"{self._shown}/#/experiments/{self._experiment_id}/runs/{self.run_id}"

    def _do(self, call: Callable[[Any], None]) -> None:
        self._waiting.append(call)
        if time.monotonic() < self._retry_at:
            return
        try:
            client = self._connected()
            while self._waiting:
                self._send(client)
            self.lost_contact = False
        except Exception as error:  # whatever the store's trouble is, the training matters more
            if not self.lost_contact:
                log.warning(
                    "MLflow at %s fails (%s); training goes on, the run folder keeps everything",
                    self._shown,
                    _one_line(error),
                )
            self.lost_contact, self._retry_at = True, time.monotonic() + _RETRY_AFTER_S

    def _send(self, client: Any) -> None:
        """Make the oldest waiting call; one that the store refuses as wrong is dropped, or it would block all others."""
        try:
            self._waiting[0](client)
        except Exception as error:
            if getattr(error, "error_code", "") not in _REFUSALS:
                raise
            log.warning("MLflow refuses a value: %s", _one_line(error))
        self._waiting.pop(0)

    def _connected(self) -> Any:
        if self._client is None:
            _be_quick()
            from mlflow.tracking import MlflowClient

            with _alone(self.tracking_uri):
                client = MlflowClient(tracking_uri=_absolute(self.tracking_uri))
                experiment = client.get_experiment_by_name(self.experiment_name)
                self._experiment_id = (
                    experiment.experiment_id if experiment else client.create_experiment(self.experiment_name)
                )
                if not (self._goes_on and self._take_up(client)):
                    self.run_id = client.create_run(
                        self._experiment_id, tags=self.tags, run_name=self.run_name
                    ).info.run_id
            self._client = client
        return self._client

    def _take_up(self, client: Any) -> bool:
        """Go on with the run that has this key, if there is one; what it has logged is not logged again."""
        found = client.search_runs(
            [self._experiment_id], filter_string=f"tags.`{_KEY_TAG}` = '{self.tags[_KEY_TAG]}'", max_results=1
        )
        if not found:
            return False
        self.run_id, self._known = found[0].info.run_id, set(found[0].data.params)
        self._points = {
            (name, point.step)
            for name in found[0].data.metrics
            for point in client.get_metric_history(self.run_id, name)
        }
        client.update_run(self.run_id, status="RUNNING")
        return True


def _absolute(uri: str) -> str:
    """MLflow remembers stores by address, so a relative one would mean the folder of the first run for ever."""
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).resolve()}" if path != uri else uri


def _be_quick() -> None:
    """MLflow's own patience (7 tries of 120 s) would hold a run for minutes at a dead server; it takes these from nowhere else."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)


def _alone(tracking_uri: str) -> AbstractContextManager[None]:
    """Two processes that both create the tables of a fresh SQLite file crash each other (mlflow#24321)."""
    path = tracking_uri.removeprefix("sqlite:///")
    return file_lock(Path(f"{path}.lock")) if path != tracking_uri else nullcontext()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def save_pyfunc(
    directory: Path, code: Path, bundle: Path, package: Path, requirements: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write a model of MLflow to a new folder: `code` says how the copied `bundle` is run, with a copy of `package`; nothing is pickled."""
    import mlflow

    _be_quick()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # MLflow's own, about the signature that is left out: the code checks each input itself
        mlflow.pyfunc.save_model(
            path=str(directory),
            python_model=str(code),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(package)],
            pip_requirements=list(requirements),
            model_config={"allow_paths": False},
            signature=False,  # the code checks each input itself
            metadata=dict(facts),
        )
    for cache in directory.rglob("__pycache__"):
        shutil.rmtree(cache)
    about = yaml.safe_load((directory / "MLmodel").read_text(encoding="utf-8"))
    function = about["flavors"]["python_function"]
    function["model_code_path"] = code.name  # where this machine keeps them is nobody's business
    function["artifacts"]["bundle"].pop("uri", None)
    (directory / "MLmodel").write_text(yaml.safe_dump(about), encoding="utf-8")


def load_pyfunc(directory: Path) -> Any:
    """The model that `save_pyfunc` wrote, ready to be asked."""
    import mlflow

    _be_quick()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, about packages
        return mlflow.pyfunc.load_model(str(directory))


def registered_version(tracking_uri: str, name: str, alias: str) -> tuple[str, str]:
    """The version of a registered model that an alias points to, and where its files lie.

    Raises:
        ConfigError: The store does not answer, or knows no such model.
    """
    _be_quick()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        with _alone(tracking_uri):
            client = MlflowClient(tracking_uri=_absolute(tracking_uri), registry_uri=_absolute(tracking_uri))
            found = (
                client.get_model_version(name, alias)
                if alias.isdecimal()
                else client.get_model_version_by_alias(name, alias)
            )
            return str(found.version), str(client.get_model_version_download_uri(name, found.version))
    except MlflowException as error:
        raise ConfigError(
            f"MLflow at {tracking_uri} has no {name}@{alias} ({_one_line(error)})",
            "check tracking_uri, or promote a bundle",
        ) from error


def download(tracking_uri: str, source: str, directory: Path) -> Path:
    """Fetch what lies there into a folder; where it is now. ConfigError where it cannot be had."""
    _be_quick()
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=str(directory), tracking_uri=_absolute(tracking_uri)
            )
        )
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"MLflow at {tracking_uri} does not give {source} ({_one_line(error)})",
            "check that its artifacts can be read",
        ) from error


def register(
    tracking_uri: str, directory: Path, name: str, alias: str, tags: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    """Log the model of MLflow in `directory` to a run of its own, as a new version of `name`; the alias points to it. The version.

    Raises:
        ConfigError: The store does not answer or refuses.
    """
    _be_quick()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        with _alone(tracking_uri):
            client = MlflowClient(tracking_uri=_absolute(tracking_uri), registry_uri=_absolute(tracking_uri))
            experiment = client.get_experiment_by_name("image_classifier")
            place = experiment.experiment_id if experiment else client.create_experiment("image_classifier")
            run = client.create_run(place, tags=dict(tags), run_name=f"promote {name}")
            client.log_artifacts(run.info.run_id, str(directory), "model")
            for metric, value in metrics.items():
                client.log_metric(run.info.run_id, metric, value)
            client.set_terminated(run.info.run_id)
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            version = client.create_model_version(
                name, f"{run.info.artifact_uri}/model", run.info.run_id, tags=dict(tags)
            )
            client.set_registered_model_alias(name, alias, version.version)
            return str(version.version)
    except MlflowException as error:
        raise ConfigError(
            f"MLflow at {tracking_uri} refuses ({_one_line(error)})", "check tracking_uri, and that the server runs"
        ) from error
