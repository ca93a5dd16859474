"""The verb `infer`: images on the command line to answers on standard output or in a file."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import atomic_file, file_lock
from image_classifier.bundle import INFO_NAME, sha256_of
from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError, DataError, storage_errors
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.images import DecodeLimits
from image_classifier.inference.backend_selection import AUTO
from image_classifier.inference.backends import ServerAddress
from image_classifier.inference.cluster import RaySettings, ShardPlan, answer_shards, check_installed
from image_classifier.inference.cluster_worker import ShardJob
from image_classifier.inference.destination import check_output, spared
from image_classifier.inference.finished import CompletionRecord, Names
from image_classifier.inference.load import load_predictor, pulled_checkpoint
from image_classifier.inference.predictor import Predictor
from image_classifier.inference.resume_log import ResumeLog, check_same_run
from image_classifier.inference.shards import Shards
from image_classifier.inference.writers import Answer, AnswerCounter, check_format, write_answers
from image_classifier.sources.archive import ArchiveLimits
from image_classifier.sources.dvc import pull_missing
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.inputs import STDIN, Inputs, is_address
from image_classifier.sources.object_store import Storage, is_stored
from image_classifier.sources.web import UrlLimits, WebClient

log = logging.getLogger(__name__)

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class InferSettings:
    """The keys of conf/infer.yaml."""

    checkpoint_name: str
    images: list[str]
    backend: str | None = None
    url: str | None = None
    server_timeout_s: float = 60.0
    format: str = "table"
    top_k: int | None = None
    threshold: float = 0.0
    batch_size: int = 64
    output: str | None = None
    resume: bool = False
    sort_into: str | None = None
    dvc: bool | None = None
    explain: bool | str = False
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    archive: ArchiveLimits = field(default_factory=ArchiveLimits)
    fetch: UrlLimits = field(default_factory=UrlLimits)
    allow_private_urls: bool = False
    engine: str = "local"
    ray: RaySettings = field(default_factory=RaySettings)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    models_dir: str = "models"
    plots_dir: str = "plots"
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_format(self.format, self.output is not None)
        if self.batch_size < 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError("batch_size and top_k must be at least 1")
        self.server.fits(self.backend)
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"invalid threshold {self.threshold}", "expected a confidence from 0 to 1, such as 0.8")
        if self.resume and not self.output:
            raise ConfigError("resume=true needs the file to go on with", "add --output FILE")
        if self.engine not in ENGINES:
            raise ConfigError(f"there is no engine {self.engine!r}", f"use one of {', '.join(ENGINES)}")
        if self.engine == "ray":
            self._check_ray()
        elif self.output and is_stored(self.output):
            raise ConfigError(
                f"output={self.output!r} is written by a cluster only", "add --engine ray, or write to a file here"
            )

    def _check_ray(self) -> None:
        if self.format != "parquet" or not self.output:
            raise ConfigError(
                "engine=ray writes a folder of Parquet files", "add --format parquet --output DIR or s3://BUCKET/FOLDER"
            )
        beside = [f"--{key}" for key in ("explain", "sort_into") if getattr(self, key)] + ["--images -"] * (
            STDIN in self.images
        )
        if beside:
            raise ConfigError(f"engine=ray cannot do {' and '.join(beside)}", "leave it out, or use --engine local")

    @property
    def server(self) -> ServerAddress:
        """Where the backend triton asks."""
        return ServerAddress(self.url, self.server_timeout_s)


def infer(config: Any) -> None:
    """Answer for each image; DataError at the end where some could not be read (their rows say why)."""
    asked = hydra_app.typed(InferSettings, config, "")
    path = pulled_checkpoint(asked.checkpoint_name, Path(asked.models_dir), asked.dvc)
    for item in asked.images:
        if item != STDIN and not is_address(item):
            pull_missing(Path(item), None if asked.dvc else asked.dvc)
    inputs = Inputs(
        asked.images,
        lambda: sys.stdin.buffer,
        asked.limits,
        asked.archive,
        WebClient(asked.fetch, asked.allow_private_urls),
    )
    inputs.check()
    if asked.output and asked.engine == "local":
        check_output(Path(asked.output), [item for item in asked.images if item != STDIN and not is_address(item)])
        ResumeLog.of(Path(asked.output)).check()
    told = AnswerCounter()
    try:
        if asked.engine == "ray":
            _to_shards(asked, path, inputs, told)
        elif asked.output:
            _to_file(asked, path, inputs, Path(asked.output), told)
        else:
            answers = _answers(asked, path, _predictor(asked, path, asked.backend), inputs)
            with storage_errors("the answers"):
                write_answers(told.of(answers), asked.format, asked.top_k, sys.stdout.buffer)
    finally:
        inputs.web.stop()  # after Ctrl-C, and after errors too
    if told.failed:
        raise DataError(
            f"{told.failed} of {told.count} images could not be read, first {told.first}", "their rows say why"
        )


def _predictor(asked: InferSettings, path: Path, backend: str | None) -> Predictor:
    found = load_predictor(
        path, backend, asked.batch_size, asked.trusted_packages, asked.limits, asked.decision, asked.server
    )
    return replace(found, threshold=asked.threshold)


def _answers(asked: InferSettings, path: Path, predictor: Predictor, items: Iterable[ImageSource]) -> Iterator[Answer]:
    """The answers as they come, after what is asked to be done with each image was done."""
    found = predictor.answers(items, keep=bool(asked.explain or asked.sort_into))
    if asked.explain:
        from image_classifier.inference.explain_images import explained, explainer_of

        default = Path(asked.plots_dir) / (path.name if path.is_dir() else path.stem) / "explain"
        directory = default if asked.explain is True else Path(asked.explain)
        found = explained(found, explainer_of(path, asked.trusted_packages, asked.limits), directory)
    if asked.sort_into:
        from image_classifier.inference.sort_into import Sorter

        sorter = Sorter(Path(asked.sort_into), asked.limits)
        sorter.check(asked.images)
        found = sorter.sorted(found)
    with _progress(asked) as advance:
        for prediction, _ in found:
            yield prediction.answer(asked.top_k)
            advance()


def _to_file(asked: InferSettings, path: Path, inputs: Inputs, output: Path, told: AnswerCounter) -> None:
    """Answer into FILE.part, from where a killed run broke off if that is asked for; then write FILE whole, unless it is there already."""
    part, finished = ResumeLog.of(output), CompletionRecord(output)
    with _alone(output):
        known = part.run()
        ended = finished.run() if asked.resume and known is None else None
        before = known or ended or {}
        predictor = _predictor(
            asked, path, before.get("backend", AUTO) if asked.resume and asked.backend == AUTO else asked.backend
        )
        items, run, names = spared(inputs, output), _run(asked, path, predictor), Names()
        if ended is not None:
            check_same_run(ended, run, repr(str(output)))
            told.add(finished.told(items))
            log.info("resume: all %d images are answered", told.count)
            return
        _begin(part, known, run, items, asked)
        part.append(_answers(asked, path, predictor, items))
        with atomic_file(output) as file:
            write_answers(told.of(names.of(part.answers())), asked.format, asked.top_k, file)
        finished.write(run, told, names)
        part.path.unlink()


def _begin(
    part: ResumeLog,
    known: Mapping[str, Any] | None,
    run: Mapping[str, Any],
    items: Iterator[ImageSource],
    asked: InferSettings,
) -> None:
    """Go on with what a killed run left, or start over."""
    if known is not None and asked.resume:
        check_same_run(known, run, repr(str(part.path)))
        done = part.keep(asked.batch_size)
        part.skip(items, done)
        log.info("resume: %d images are answered", done)
        return
    if known is not None:
        log.warning("%s of a run that was stopped is overwritten; --resume would have gone on with it", part.path)
    elif asked.resume:
        log.info("resume: no run was stopped here, all images are answered")
    part.begin(run)


def _to_shards(asked: InferSettings, path: Path, inputs: Inputs, told: AnswerCounter) -> None:
    """Have a cluster answer into the files of a folder, without those that a killed run left if that is asked for."""
    check_installed()
    output, started = str(asked.output), time.monotonic()
    predictor = _predictor(asked, path, asked.backend)  # what cannot be is said before a cluster starts
    dealt = ShardPlan.of(inputs, asked.batch_size * asked.ray.shard_batches)
    run = {**_run(asked, path, predictor), "shard_batches": asked.ray.shard_batches, "images": dealt.sha256}
    shards = Shards(output, Storage.here(), run, len(dealt.shards))
    load = partial(_predictor, asked, backend=predictor.backend_name)
    with nullcontext() if is_stored(output) else _alone(Path(os.path.abspath(output))):
        if done := shards.check(asked.resume):
            log.info("resume: %d of %d files of answers are there", done, len(dealt.shards))
        by_number: dict[int, AnswerCounter] = {}
        with _progress(asked) as advance:
            for number, of_shard in answer_shards(
                asked.ray, path, dealt, ShardJob(run["model"], load, shards, asked.top_k, asked.ray.cpus)
            ):
                by_number[number] = of_shard
                advance(of_shard.count)
        for number in sorted(by_number):
            told.add(by_number[number])
        shards.finish(told.count, told.failed)
    log.info("%d images in %d files, %.1f s", told.count, shards.count, time.monotonic() - started)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """One run at a time for one output; ConfigError where there is another."""
    lock = output.with_name(f".{output.name}.lock")
    try:
        with file_lock(lock, wait=False, remove=True):
            yield
    except BlockingIOError as error:
        raise ConfigError(
            f"another run is writing {str(output)!r}", "wait for it, or choose another --output"
        ) from error


def _run(asked: InferSettings, path: Path, predictor: Predictor) -> dict[str, Any]:
    """What must be the same for answers to be of one run: the model, and every key that they depend on."""
    keys = {name: getattr(asked, name) for name in ("top_k", "threshold", "batch_size", "explain", "sort_into")}
    nested = {
        f"{name}.{key}": value
        for name in ("decision", "limits", "archive")
        for key, value in vars(getattr(asked, name)).items()
    }
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in (keys | nested).items()}
    return {"model": sha256_of(path / INFO_NAME if path.is_dir() else path), "backend": predictor.backend_name, **plain}


@contextmanager
def _progress(asked: InferSettings) -> Iterator[Any]:
    """What is called after each image, or after several; it moves a bar on standard error where that is a terminal on which no answers appear."""
    if not sys.stderr.isatty() or (not asked.output and sys.stdout.isatty()):
        yield lambda count=1: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    speed = TextColumn("{task.fields[speed]}")
    with Progress(
        SpinnerColumn(),
        TextColumn("images"),
        MofNCompleteColumn(),
        speed,
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("images", total=None, speed="")

        def advance(count: int = 1) -> None:
            bar.advance(task, count)
            speed_now = bar.tasks[0].speed
            bar.update(task, speed=f"{speed_now:.0f} images/s" if speed_now else "")

        yield advance
