"""Inference over many images: from files, folders, archives and addresses to answers in a stream, a file or shards."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from image_classifier.atomic_io import atomic_file, file_lock
from image_classifier.bundle import INFO_NAME, sha256_of
from image_classifier.errors import ConfigError, storage_errors
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.images import DecodeLimits
from image_classifier.inference.backend_selection import AUTO
from image_classifier.inference.cluster import RaySettings, ShardPlan, answer_shards, check_installed
from image_classifier.inference.cluster_worker import ShardJob
from image_classifier.inference.load import load_predictor
from image_classifier.inference.model_reference import ModelReference
from image_classifier.inference.predictor import Predictor
from image_classifier.inference.resume_log import CompletionRecord, NameHash, ResumeLog, check_same_run
from image_classifier.inference.shards import Shards
from image_classifier.inference.writers import (
    Answer,
    AnswerCounter,
    check_format,
    check_output_path,
    refuse_output,
    write_answers,
)
from image_classifier.sources.archive import ArchiveLimits
from image_classifier.sources.dvc import pull_missing
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.inputs import STDIN, Inputs, is_address
from image_classifier.sources.object_store import Storage, is_stored
from image_classifier.sources.web import UrlLimits, WebClient

log = logging.getLogger(__name__)

ENGINES = ("local", "ray")

Advance = Callable[[int], None]  # called with the number of images answered since the last call


@dataclass(frozen=True, kw_only=True)
class InferSettings(ModelReference):
    """The keys of conf/infer.yaml."""

    images: list[str]
    format: str = "table"
    top_k: int | None = None
    threshold: float = 0.0
    batch_size: int = 64
    output: str | None = None
    resume: bool = False
    sort_into: str | None = None
    explain: bool | str = False
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    archive: ArchiveLimits = field(default_factory=ArchiveLimits)
    fetch: UrlLimits = field(default_factory=UrlLimits)
    allow_private_urls: bool = False
    engine: str = "local"
    ray: RaySettings = field(default_factory=RaySettings)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    plots_dir: str = "plots"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.format, self.output is not None)
        if self.batch_size < 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError("batch_size and top_k must be at least 1")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"invalid threshold {self.threshold}: expected a confidence from 0 to 1, such as 0.8")
        if self.resume and not self.output:
            raise ConfigError("resume=true needs an output file to resume", "add --output FILE")
        if self.engine not in ENGINES:
            raise ConfigError(f"there is no engine {self.engine!r}", f"use one of {', '.join(ENGINES)}")
        if self.engine == "ray":
            self._check_ray()
        elif self.output and is_stored(self.output):
            raise ConfigError(
                f"only a cluster can write to output={self.output!r}", "add --engine ray, or write to a local file"
            )

    def _check_ray(self) -> None:
        if self.format != "parquet" or not self.output:
            raise ConfigError(
                "engine=ray writes a folder of Parquet files", "add --format parquet --output DIR or s3://BUCKET/FOLDER"
            )
        unsupported = [f"--{key}" for key in ("explain", "sort_into") if getattr(self, key)]
        if STDIN in self.images:
            unsupported.append("--images -")
        if unsupported:
            raise ConfigError(
                f"engine=ray does not support {' and '.join(unsupported)}", "leave it out, or use --engine local"
            )

    def local_items(self) -> list[str]:
        """Return the images that are named as files, folders or patterns of this machine."""
        return [item for item in self.images if item != STDIN and not is_address(item)]


@dataclass(frozen=True)
class InferSummary:
    """Counts of a finished run.

    Args:
        images: Number of answers, errors included.
        failed: Number of images that could not be read; their answers hold the reason.
        first_error: Path and reason of the first of these, or "".
        output: The file or folder with the answers; None where they went to a stream.
    """

    images: int
    failed: int
    first_error: str
    output: str | None


def infer(
    settings: InferSettings,
    stream: IO[bytes] | None = None,
    stdin: Callable[[], IO[bytes]] = lambda: sys.stdin.buffer,
    advance: Advance = lambda count: None,
) -> InferSummary:
    """Answer for each image, into `settings.output` or else into `stream`.

    An image that cannot be read gets an answer with the reason; it stops nothing.

    Raises:
        ConfigError: The settings do not fit together, the model or the output.
        DataError: There are no images.
        CheckpointError: The model is missing or damaged.
        ServerError: The server of the backend `triton` does not answer.
        ClusterError: There is no cluster, or its workers died repeatedly.
    """
    path = settings.path()
    for item in settings.local_items():
        pull_missing(Path(item), None if settings.dvc else settings.dvc)
    web = WebClient(settings.fetch, settings.allow_private_urls)
    inputs = Inputs(settings.images, stdin, settings.limits, settings.archive, web)
    inputs.check()
    if settings.output and settings.engine == "local":
        check_output_path(Path(settings.output), settings.local_items())
        ResumeLog.of(Path(settings.output)).check()
    counter = AnswerCounter()
    try:
        if settings.engine == "ray":
            _to_shards(settings, path, inputs, counter, advance)
        elif settings.output:
            _to_file(settings, path, inputs, Path(settings.output), counter, advance)
        elif stream is not None:
            answers = _answers(settings, path, _predictor(settings, path, settings.backend), inputs, advance)
            with storage_errors("the answers"):
                write_answers(counter.of(answers), settings.format, settings.top_k, stream)
        else:
            raise ConfigError("output is missing", "name a file, or pass a stream for the answers")
    finally:
        inputs.web.stop()  # after Ctrl-C and errors too
    return InferSummary(counter.count, counter.failed, counter.first, settings.output)


def _predictor(settings: InferSettings, path: Path, backend: str | None) -> Predictor:
    predictor = load_predictor(
        path,
        backend,
        settings.batch_size,
        settings.trusted_packages,
        settings.limits,
        settings.decision,
        settings.server,
    )
    return replace(predictor, threshold=settings.threshold)


def _answers(
    settings: InferSettings, path: Path, predictor: Predictor, items: Iterable[ImageSource], advance: Advance
) -> Iterator[Answer]:
    """Yield the answers as they come, after each image was explained and sorted where the settings want that."""
    answers = predictor.answers(items, keep=bool(settings.explain or settings.sort_into))
    if settings.explain:
        from image_classifier.inference.explain_images import explained, explainer_of

        default = Path(settings.plots_dir) / (path.name if path.is_dir() else path.stem) / "explain"
        directory = default if settings.explain is True else Path(settings.explain)
        answers = explained(answers, explainer_of(path, settings.trusted_packages, settings.limits), directory)
    if settings.sort_into:
        from image_classifier.inference.sort_into import Sorter

        sorter = Sorter(Path(settings.sort_into), settings.limits)
        sorter.check(settings.images)
        answers = sorter.sorted(answers)
    for prediction, _ in answers:
        yield prediction.answer(settings.top_k)
        advance(1)


def _to_file(
    settings: InferSettings, path: Path, inputs: Inputs, output: Path, counter: AnswerCounter, advance: Advance
) -> None:
    """Write the answers to FILE.part, then FILE in one step; resume a killed run where the settings want that."""
    resume_log = ResumeLog.of(output)
    completed = CompletionRecord(output)
    with _exclusive(output):
        # A run that was killed left FILE.part; one that finished left FILE and its record.
        killed = resume_log.run()
        ended = completed.run() if settings.resume and killed is None else None
        # `auto` must choose the same backend as before, or the answers would not be of one run.
        backend = settings.backend
        if settings.resume and backend == AUTO:
            backend = (killed or ended or {}).get("backend", AUTO)
        predictor = _predictor(settings, path, backend)
        items = refuse_output(inputs, output)
        run = _fingerprint(settings, path, predictor)
        if ended is not None:
            check_same_run(ended, run, repr(str(output)))
            counter.add(completed.counter(items))
            log.info("resume: all %d images are answered", counter.count)
            return
        _begin(resume_log, killed, run, items, settings)
        resume_log.append(_answers(settings, path, predictor, items, advance))
        # All answers are in FILE.part: write FILE in its format, then the record, and only then remove FILE.part.
        names = NameHash()
        with atomic_file(output) as file:
            write_answers(counter.of(names.of(resume_log.answers())), settings.format, settings.top_k, file)
        completed.write(run, counter, names)
        resume_log.path.unlink()


def _begin(
    resume_log: ResumeLog,
    killed: Mapping[str, Any] | None,
    run: Mapping[str, Any],
    items: Iterator[ImageSource],
    settings: InferSettings,
) -> None:
    """Resume a killed run, or start over."""
    if killed is not None and settings.resume:
        check_same_run(killed, run, repr(str(resume_log.path)))
        done = resume_log.keep(settings.batch_size)
        resume_log.skip(items, done)
        log.info("resume: %d images are answered", done)
        return
    if killed is not None:
        log.warning("%s of a stopped run is overwritten; --resume would have continued it", resume_log.path)
    elif settings.resume:
        log.info("resume: there is no stopped run to resume, all images are answered")
    resume_log.begin(run)


def _to_shards(settings: InferSettings, path: Path, inputs: Inputs, counter: AnswerCounter, advance: Advance) -> None:
    """Answer on a cluster, into the files of a folder; files that a killed run wrote are kept when resuming."""
    check_installed()
    output = str(settings.output)
    started = time.monotonic()
    predictor = _predictor(settings, path, settings.backend)  # errors of the settings come before a cluster starts
    plan = ShardPlan.of(inputs, settings.batch_size * settings.ray.shard_batches)
    fingerprint = _fingerprint(settings, path, predictor)
    run = {**fingerprint, "shard_batches": settings.ray.shard_batches, "images": plan.sha256}
    shards = Shards(output, Storage.here(), run, len(plan.shards))
    load = partial(_predictor, settings, backend=predictor.backend_name)
    job = ShardJob(run["model"], load, shards, settings.top_k, settings.ray.cpus)
    with nullcontext() if is_stored(output) else _exclusive(Path(os.path.abspath(output))):
        if done := shards.check(settings.resume):
            log.info("resume: %d of %d files of answers exist", done, len(plan.shards))
        by_number: dict[int, AnswerCounter] = {}
        for number, of_shard in answer_shards(settings.ray, path, plan, job):
            by_number[number] = of_shard
            advance(of_shard.count)
        for number in sorted(by_number):
            counter.add(by_number[number])
        shards.finish(counter.count, counter.failed)
    log.info("%d images in %d files, %.1f s", counter.count, shards.count, time.monotonic() - started)


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Hold the lock of an output; ConfigError where another run holds it."""
    lock = output.with_name(f".{output.name}.lock")
    try:
        with file_lock(lock, wait=False, remove=True):
            yield
    except BlockingIOError as error:
        raise ConfigError(
            f"another run is writing {str(output)!r}", "wait for it, or choose another --output"
        ) from error


def _fingerprint(settings: InferSettings, path: Path, predictor: Predictor) -> dict[str, Any]:
    """Return what must be equal for answers to be of one run: the model, and every key that they depend on."""
    keys = {name: getattr(settings, name) for name in ("top_k", "threshold", "batch_size", "explain", "sort_into")}
    nested = {
        f"{name}.{key}": value
        for name in ("decision", "limits", "archive")
        for key, value in vars(getattr(settings, name)).items()
    }
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in (keys | nested).items()}
    return {"model": sha256_of(path / INFO_NAME if path.is_dir() else path), "backend": predictor.backend_name, **plain}
