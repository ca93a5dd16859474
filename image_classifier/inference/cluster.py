"""`infer engine=ray`: the same predictor in the workers of a Ray cluster; each answered shard is one file.

The driver lists the images and splits them into numbered shards of complete batches, so that every batch is the same as
in a run on one machine. Ray Data gives each shard to a free worker, and to another one where that or its machine died.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import secrets
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from image_classifier.cpu import usable_cores
from image_classifier.errors import ClassifierError, ClusterError, ConfigError
from image_classifier.extras import install
from image_classifier.inference.cluster_worker import ShardJob, WorkerModel, answer
from image_classifier.inference.writers import AnswerCounter
from image_classifier.sources.image_source import ImageSource

log = logging.getLogger(__name__)

_SOCKET_NAME = 60  # characters that Ray adds to the folder for its sockets
_MAX_SOCKET_PATH = 107  # characters, by the operating system


@dataclass(frozen=True)
class RaySettings:
    """The keys `ray.*` of conf/infer.yaml.

    Args:
        address: None: a cluster on this machine for this run only; auto: the cluster of this machine; or its HOST:PORT.
        workers: Workers at the same time; None: as many as there are processors for.
        cpus: Processors of each worker.
        shard_batches: Batches in one file of answers.
        retries: How often a shard is retried after its worker or machine died.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    shard_batches: int = 16
    retries: int = 3

    def __post_init__(self) -> None:
        if (
            self.cpus < 1
            or self.shard_batches < 1
            or self.retries < 0
            or (self.workers is not None and self.workers < 1)
        ):
            raise ConfigError(
                "ray.workers, ray.cpus and ray.shard_batches must be at least 1, and ray.retries at least 0"
            )
        if self.address is not None and not re.fullmatch(
            r"auto|[\w.-]+:\d{1,5}|\[[\da-fA-F:]+\]:\d{1,5}", self.address
        ):
            raise ConfigError(
                f"invalid ray.address {self.address!r}",
                "write auto on a machine of the cluster, or give its HOST:PORT",
            )


def check_installed() -> None:
    """Raise ConfigError where Ray is not installed."""
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise ConfigError(
            "engine=ray needs a package that is not installed",
            f"{install('ray')}, on every machine of the cluster",
        )


@dataclass(frozen=True)
class ShardPlan:
    """All images of a run as shards of equal size.

    Args:
        shards: Each a pickled list of ImageSources.
        images: Number of all images.
        sha256: Hash of their names, in order.
    """

    shards: list[bytes]
    images: int
    sha256: str

    @classmethod
    def of(cls, items: Iterable[ImageSource], size: int) -> ShardPlan:
        """Split the images, in order, into shards of `size`; ConfigError for one that only this process can read."""
        stream = iter(items)
        shards: list[bytes] = []
        images = 0
        names = hashlib.sha256()
        # Each shard is pickled at once: the images of all shards together would need several times the memory.
        while shard := [_portable(item) for item in islice(stream, size)]:
            names.update("".join(f"{item.name}\0" for item in shard).encode("utf-8", "surrogateescape"))
            shards.append(pickle.dumps(shard))
            images += len(shard)
        return cls(shards, images, names.hexdigest())


def _portable(item: ImageSource) -> ImageSource:
    """Return the image such that other machines can read it."""
    if isinstance(item.source, bytes):
        raise ConfigError(
            f"only this process can read {item.name!r}",
            "engine=ray takes files, folders, tables, addresses of images and s3://: unpack the archive",
        )
    return replace(item, source=item.source.absolute()) if isinstance(item.source, Path) else item


def answer_shards(
    settings: RaySettings, model: Path, plan: ShardPlan, job: ShardJob
) -> Iterator[tuple[int, AnswerCounter]]:
    """Answer and write all shards; yield the number of each and the counts of its answers, as they are done.

    Raises:
        ClusterError: There is no cluster, or its workers died repeatedly.
        ClassifierError: An error in a worker that a retry would not cure.
    """
    worker_model = WorkerModel.of(model)
    with _ray(settings) as folder:
        import ray

        job.shards.begin()
        # The model goes into Ray's store once; each worker process gets it from there when it loads it.
        dataset = _dataset(settings, plan, replace(job, fetch=_Fetch(ray.put(worker_model)), folder=folder))
        try:
            for row in dataset.iter_rows():
                result = pickle.loads(row["result"])
                if isinstance(result, ClassifierError):
                    raise result
                yield row["shard"], result
        except ray.exceptions.RayTaskError:
            raise  # a bug: it has the traceback of the worker
        except ray.exceptions.RayError as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ClusterError(
                f"the cluster gave up ({reason})",
                "check the memory of the machines; --resume continues with the shards that are missing",
            ) from error


def _dataset(settings: RaySettings, plan: ShardPlan, job: ShardJob) -> Any:
    """Return the Ray dataset that answers the shards: one row a shard, then one row with the counts of its answers."""
    import pyarrow  # type: ignore[import-untyped]
    import ray
    import ray.data

    shards = [pyarrow.table({"shard": [number], "items": [items]}) for number, items in enumerate(plan.shards)]
    # On this machine as many workers as its cores allow; on a cluster Ray decides where the settings do not.
    limit = settings.workers or (None if settings.address else max(1, usable_cores() // settings.cpus))
    workers = limit and min(limit, len(shards))
    with warnings.catch_warnings():
        # Without `max_retries` Ray Data retries forever. From 2.64 on it is passed in another way; pyproject.toml
        # allows older versions only.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        return ray.data.from_arrow(shards).map_batches(
            answer,  # type: ignore[arg-type]
            batch_size=1,
            fn_args=(job,),
            num_cpus=settings.cpus,
            compute=ray.data.TaskPoolStrategy(workers),
            max_retries=settings.retries,
        )


@dataclass(frozen=True)
class _Fetch:
    """Gets the model from Ray's store, once for each worker process."""

    reference: Any

    def __call__(self) -> WorkerModel:
        import ray

        return ray.get(self.reference)  # type: ignore[no-any-return]


@contextmanager
def _ray(settings: RaySettings) -> Iterator[str | None]:
    """Run Ray during the block; yield the folder for models of a cluster that exists for this run only, else None."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    if settings.address is not None:
        with _connection(settings, address=settings.address):
            yield None
        return
    # Ray reads these when it is imported: it listens on loopback only, and requires a token that is in no file.
    os.environ |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with tempfile.TemporaryDirectory(prefix="ic-", ignore_cleanup_errors=True) as folder:
        if len(folder) + _SOCKET_NAME > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"the path {tempfile.gettempdir()!r} is too long for Ray's sockets", "set TMPDIR to a short folder"
            )
        processors = (settings.workers or max(1, usable_cores() // settings.cpus)) * settings.cpus
        with _connection(settings, address="local", num_cpus=processors, include_dashboard=False, _temp_dir=folder):
            yield f"{folder}/models"


@contextmanager
def _connection(settings: RaySettings, **options: Any) -> Iterator[None]:
    """Make this process a driver of Ray during the block; it disconnects at a signal too."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    try:
        try:
            _connect(settings, options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = "on this machine" if settings.address is None else f"at {settings.address!r}"
            fact = f"there is no Ray cluster {where} ({' '.join(str(error).split())[:200]})"
            raise ClusterError(fact, "see docs/delivery.md, On a cluster") from error
        signal.signal(signal.SIGTERM, _end)  # Ray's own handler ends with the number of the signal
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _connect(settings: RaySettings, options: dict[str, Any]) -> None:
    import ray
    import ray.data

    if settings.address not in (None, "auto"):
        # Fail quickly where nothing listens: Ray would try for minutes.
        host, _, port = str(settings.address).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    _warn_if_too_small(ray.nodes(), settings)  # type: ignore[no-untyped-call]


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _warn_if_too_small(nodes: Sequence[dict[str, Any]], settings: RaySettings) -> None:
    """Log a warning where no machine is large enough for a worker yet; nothing runs until one joins."""
    largest = max((node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]), default=0)
    if largest < settings.cpus:
        log.warning("no machine of the cluster has %d processors for a worker: waiting for one", settings.cpus)
