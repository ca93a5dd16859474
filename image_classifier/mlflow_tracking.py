"""MLflow, known to this file only: runs are logged where possible, and a dead server never stops a training."""

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
    """One MLflow run; when the store fails it warns once, keeps the calls, and tries again later.

    Args:
        tracking_uri: `sqlite:///mlflow.db`, or the `http(s)://` address of a server.
        experiment_name: The MLflow experiment, created where it does not exist.
        run_name: The run's name in MLflow.
        tags: Tags of the run.
    """

    def __init__(self, tracking_uri: str, experiment_name: str, run_name: str, tags: Mapping[str, str]) -> None:
        if not tracking_uri.startswith(
            ("sqlite:", "http://", "https://", "postgresql", "mysql", "mssql", "databricks")
        ):
            raise ConfigError(
                f"logger.tracking_uri={tracking_uri!r} is not a store MLflow can use",
                "use sqlite:///mlflow.db or the http:// address of a server (MLflow 3 refuses plain folders)",
            )
        self.tracking_uri = tracking_uri
        self.experiment_name = experiment_name
        self.run_name = run_name
        self.tags = dict(tags)
        self._shown = hide_passwords(tracking_uri)  # without a password
        self.run_id = ""
        self._experiment_id = ""
        self._client: Any = None
        self._waiting: list[Callable[[Any], None]] = []
        self._retry_at = 0.0
        self.lost_contact = False
        self._is_resumed = False
        # What the run has logged before it was resumed: parameters, and points of metrics as (name, step).
        self._known: set[str] = set()
        self._points: set[tuple[str, int]] = set()

    def continue_as(self, key: str, resumed: bool) -> None:
        """Tag the run with a key; with `resumed` the existing run of this key is continued. Call it before logging."""
        self.tags[_KEY_TAG] = key
        self._is_resumed = resumed

    def log_params(self, parameters: Mapping[str, Any]) -> None:
        """Log the settings of the run."""
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:6000]) for key, value in parameters.items()]
        for part in (rows[start : start + _PARAMETERS_A_CALL] for start in range(0, len(rows), _PARAMETERS_A_CALL)):
            self._do(self._parameters_call(part))

    def _parameters_call(self, part: list[Any]) -> Callable[[Any], None]:
        return lambda client: client.log_batch(self.run_id, params=[row for row in part if row.key not in self._known])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the values of metrics at one step."""
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
        """Log columns of equal length as a table, which MLflow's pages show and compare."""
        data = {key: list(values) for key, values in columns.items()}

        def call(client: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from MLflow's use of pandas
                client.log_table(self.run_id, data=data, artifact_file=f"{name}.json")

        self._do(call)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        from mlflow.entities import RunTag

        rows = [RunTag(key, str(value)) for key, value in tags.items()]
        self._do(lambda client: client.log_batch(self.run_id, tags=rows))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run (FINISHED, FAILED or KILLED) after a last try to make the calls that are waiting."""
        self._retry_at = 0.0
        self._do(lambda client: client.set_terminated(self.run_id, status))
        if self._waiting:
            log.warning(
                "%d calls to MLflow at %s failed; the run folder keeps everything",
                len(self._waiting),
                self._shown,
            )

    @property
    def where(self) -> str:
        """Where to find the run, for a person."""
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
        except Exception as error:  # no failure of the store may stop the training
            if not self.lost_contact:
                log.warning(
                    "MLflow at %s fails (%s); training continues, the run folder keeps everything",
                    self._shown,
                    _one_line(error),
                )
            self.lost_contact, self._retry_at = True, time.monotonic() + _RETRY_AFTER_S

    def _send(self, client: Any) -> None:
        """Make the oldest waiting call; drop it where the store rejects its values, or it would block all others."""
        try:
            self._waiting[0](client)
        except Exception as error:
            if getattr(error, "error_code", "") not in _REFUSALS:
                raise
            log.warning("MLflow rejects a value: %s", _one_line(error))
        self._waiting.pop(0)

    def _connected(self) -> Any:
        if self._client is None:
            _limit_retries()
            from mlflow.tracking import MlflowClient

            with _store_lock(self.tracking_uri):
                client = MlflowClient(tracking_uri=_absolute(self.tracking_uri))
                experiment = client.get_experiment_by_name(self.experiment_name)
                self._experiment_id = (
                    experiment.experiment_id if experiment else client.create_experiment(self.experiment_name)
                )
                if not (self._is_resumed and self._continue_run(client)):
                    self.run_id = client.create_run(
                        self._experiment_id, tags=self.tags, run_name=self.run_name
                    ).info.run_id
            self._client = client
        return self._client

    def _continue_run(self, client: Any) -> bool:
        """Continue the run of this key, if there is one; its values are not logged again."""
        runs = client.search_runs(
            [self._experiment_id], filter_string=f"tags.`{_KEY_TAG}` = '{self.tags[_KEY_TAG]}'", max_results=1
        )
        if not runs:
            return False
        self.run_id = runs[0].info.run_id
        self._known = set(runs[0].data.params)
        self._points = {
            (name, point.step)
            for name in runs[0].data.metrics
            for point in client.get_metric_history(self.run_id, name)
        }
        client.update_run(self.run_id, status="RUNNING")
        return True


def _absolute(uri: str) -> str:
    """Return an absolute address: MLflow would keep a relative one relative to the folder of the first run."""
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).resolve()}" if path != uri else uri


def _limit_retries() -> None:
    """Limit MLflow's retries: its 7 tries of 120 s would stop a run for minutes at a dead server.

    MLflow reads these settings from the environment only.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)


def _store_lock(tracking_uri: str) -> AbstractContextManager[None]:
    """Return a lock of a SQLite file: two processes that create its tables at once both crash (mlflow#24321)."""
    path = tracking_uri.removeprefix("sqlite:///")
    return file_lock(Path(f"{path}.lock")) if path != tracking_uri else nullcontext()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def save_pyfunc(
    directory: Path, code: Path, bundle: Path, package: Path, requirements: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write a model of MLflow to a new folder: `code` runs the copied `bundle` with a copy of `package`; no pickle."""
    import mlflow

    _limit_retries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's warning about the missing signature
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
    function["model_code_path"] = code.name  # without the paths of this machine
    function["artifacts"]["bundle"].pop("uri", None)
    (directory / "MLmodel").write_text(yaml.safe_dump(about), encoding="utf-8")


def load_pyfunc(directory: Path) -> Any:
    """Load the model that `save_pyfunc` wrote."""
    import mlflow

    _limit_retries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's warnings about packages
        return mlflow.pyfunc.load_model(str(directory))


def registered_version(tracking_uri: str, name: str, alias: str) -> tuple[str, str]:
    """Return the version of a registered model that an alias points to, and the address of its files.

    Raises:
        ConfigError: The store does not answer, or has no such model.
    """
    _limit_retries()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        with _store_lock(tracking_uri):
            client = MlflowClient(tracking_uri=_absolute(tracking_uri), registry_uri=_absolute(tracking_uri))
            version = (
                client.get_model_version(name, alias)
                if alias.isdecimal()
                else client.get_model_version_by_alias(name, alias)
            )
            return str(version.version), str(client.get_model_version_download_uri(name, version.version))
    except MlflowException as error:
        raise ConfigError(
            f"MLflow at {tracking_uri} has no {name}@{alias} ({_one_line(error)})",
            "check tracking_uri, or promote a bundle",
        ) from error


def download(tracking_uri: str, source: str, directory: Path) -> Path:
    """Download artifacts into a folder and return their path; raise ConfigError where that fails."""
    _limit_retries()
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
            f"cannot download {source} from MLflow at {tracking_uri} ({_one_line(error)})",
            "check that its artifacts are readable",
        ) from error


def register(
    tracking_uri: str, directory: Path, name: str, alias: str, tags: Mapping[str, str], metrics: Mapping[str, float]
) -> str:
    """Register the model of MLflow in `directory` as a new version of `name` with an alias, and return the version.

    Raises:
        ConfigError: The store does not answer, or rejects the model.
    """
    _limit_retries()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        with _store_lock(tracking_uri):
            client = MlflowClient(tracking_uri=_absolute(tracking_uri), registry_uri=_absolute(tracking_uri))
            experiment = client.get_experiment_by_name("image_classifier")
            experiment_id = experiment.experiment_id if experiment else client.create_experiment("image_classifier")
            run = client.create_run(experiment_id, tags=dict(tags), run_name=f"promote {name}")
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
            f"MLflow at {tracking_uri} fails ({_one_line(error)})", "check tracking_uri, and that the server runs"
        ) from error
