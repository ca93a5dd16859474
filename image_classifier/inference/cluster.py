"""`infer engine=ray`: the same predictor in the workers of a Ray cluster, each of which writes what it answered as a file of its own.

The driver lists the images and deals them into numbered shards of whole batches, so that every batch is that of a run on one machine. Ray Data
has each shard answered by whichever worker is free, and again by another where that one or its machine died.
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
from image_classifier.inference.cluster_worker import ShardJob, WorkerModel, answer
from image_classifier.inference.writers import AnswerCounter
from image_classifier.sources.image_source import ImageSource

log = logging.getLogger(__name__)

_SOCKETS = 60  # letters that Ray adds to the folder for its sockets, whose path may have 107


@dataclass(frozen=True)
class RaySettings:
    """The keys `ray.*` of conf/infer.yaml.

    Args:
        address: None: a cluster on this machine for this run only; auto: the one that this machine belongs to; or its HOST:PORT.
        workers: How many answer at once; None: as many as there are processors for.
        cpus: Processors of each.
        shard_batches: Batches in one file of answers.
        retries: How often a shard is tried again after its worker or machine died.
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
                "run this on a machine of the cluster and write auto, or its HOST:PORT",
            )


def check_installed() -> None:
    """ConfigError where Ray is not there."""
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise ConfigError(
            "engine=ray needs a package that is not installed",
            "pip install 'image-classifier[ray]', on every machine of the cluster",
        )


@dataclass(frozen=True)
class ShardPlan:
    """All images of a run as shards of equal size: each a pickled list of Items, how many images there are, and the hash of their names."""

    shards: list[bytes]
    images: int
    sha256: str

    @classmethod
    def of(cls, items: Iterable[ImageSource], size: int) -> ShardPlan:
        """Every image in order; ConfigError for one that only this process can read."""
        stream, shards, images, names = iter(items), list[bytes](), 0, hashlib.sha256()
        while some := [_portable(item) for item in islice(stream, size)]:
            names.update("".join(f"{item.name}\0" for item in some).encode("utf-8", "surrogateescape"))
            shards.append(pickle.dumps(some))
            images += len(some)
        return cls(shards, images, names.hexdigest())


def _portable(item: ImageSource) -> ImageSource:
    """The image as any machine finds it."""
    if isinstance(item.source, bytes):
        raise ConfigError(
            f"{item.name!r} is read by one process only",
            "engine=ray takes files, folders, tables, addresses of images and s3://: unpack it",
        )
    return replace(item, source=item.source.absolute()) if isinstance(item.source, Path) else item


def answer_shards(
    asked: RaySettings, model: Path, dealt: ShardPlan, job: ShardJob
) -> Iterator[tuple[int, AnswerCounter]]:
    """Have all shards answered and written; the number of each and what is told of it, as they are done.

    Raises:
        ClusterError: There is no cluster, or workers died again and again.
        ClassifierError: What a worker found that no other try would mend.
    """
    sent = WorkerModel.of(model)
    with _ray(asked) as folder:
        import pyarrow  # type: ignore[import-untyped]
        import ray
        import ray.data

        job.shards.begin()
        reference = ray.put(sent)
        told = replace(job, fetch=_Fetch(reference), folder=folder)
        shards = [pyarrow.table({"shard": [number], "items": [items]}) for number, items in enumerate(dealt.shards)]
        most = asked.workers or (None if asked.address else max(1, usable_cores() // asked.cpus))
        workers = most and min(most, len(shards))
        with warnings.catch_warnings():
            # Without `max_retries` Ray Data tries for ever; it is to be passed in another way from 2.64 on, before which pyproject.toml stops.
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            dataset = ray.data.from_arrow(shards).map_batches(
                answer,  # type: ignore[arg-type]
                batch_size=1,
                fn_args=(told,),
                num_cpus=asked.cpus,
                compute=ray.data.TaskPoolStrategy(workers),
                max_retries=asked.retries,
            )
        try:
            for row in dataset.iter_rows():
                found = pickle.loads(row["told"])
                if isinstance(found, ClassifierError):
                    raise found
                yield row["shard"], found
        except ray.exceptions.RayTaskError:
            raise  # a bug: its traceback is that of the worker
        except ray.exceptions.RayError as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ClusterError(
                f"the cluster gave up ({reason})",
                "look at the machines' memory; --resume goes on with what is answered",
            ) from error


@dataclass(frozen=True)
class _Fetch:
    """Gets the model from Ray's store, for the one time that a worker loads it."""

    reference: Any

    def __call__(self) -> WorkerModel:
        import ray

        return ray.get(self.reference)  # type: ignore[no-any-return]


@contextmanager
def _ray(asked: RaySettings) -> Iterator[str | None]:
    """Ray while the block runs; the folder of a cluster that is for this run only, which goes with it."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    if asked.address is not None:
        with _joined(asked, address=asked.address):
            yield None
        return
    # Read by Ray when it is imported: it listens on loopback only, and asks for a password that no file holds.
    os.environ |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with tempfile.TemporaryDirectory(prefix="ic-", ignore_cleanup_errors=True) as folder:
        if len(folder) + _SOCKETS > 107:
            raise ConfigError(
                f"{tempfile.gettempdir()!r} is too long for the names of Ray's sockets", "set TMPDIR to a short folder"
            )
        processors = (asked.workers or max(1, usable_cores() // asked.cpus)) * asked.cpus
        with _joined(asked, address="local", num_cpus=processors, include_dashboard=False, _temp_dir=folder):
            yield f"{folder}/models"


@contextmanager
def _joined(asked: RaySettings, **options: Any) -> Iterator[None]:
    """This process as a driver of Ray; it leaves at a signal too."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    try:
        try:
            _connect(asked, options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = "here" if asked.address is None else f"at {asked.address!r}"
            fact = f"there is no Ray cluster {where} ({' '.join(str(error).split())[:200]})"
            raise ClusterError(fact, "see docs/delivery.md, On a cluster") from error
        signal.signal(signal.SIGTERM, _end)  # Ray's own ends with the number of the signal
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _connect(asked: RaySettings, options: dict[str, Any]) -> None:
    import ray
    import ray.data

    if asked.address not in (None, "auto"):
        host, _, port = str(asked.address).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()  # Ray would try for minutes
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    _check_room(ray.nodes(), asked)  # type: ignore[no-untyped-call]


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _check_room(nodes: Sequence[dict[str, Any]], asked: RaySettings) -> None:
    """Say where no machine has room for a worker yet: one may still join, and until then nothing moves."""
    largest = max((node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]), default=0)
    if largest < asked.cpus:
        log.warning("no machine of the cluster has %d processors for a worker: waiting for one", asked.cpus)
