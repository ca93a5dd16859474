"""A run's name and folders, and where its result came from."""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from image_classifier import __version__
from image_classifier.atomic_io import file_lock, write_text
from image_classifier.errors import ConfigError, StorageError, storage_errors

EFFORTS = ("quick", "normal", "thorough")
_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "onnx", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class RunDir:
    """The paths of a run: `directory` while it trains, `bundle` and `plots` when it is finished; `key` is unique."""

    name: str
    directory: Path
    bundle: Path
    plots: Path
    key: str = ""
    resumed: bool = False


@dataclass(frozen=True)
class PlotSettings:
    """The keys of `plots`: whether figures are drawn, and in how many parts learning curves are drawn too.

    With `parts` None the loss is drawn in four, from 40 epochs.
    """

    figures: bool = True
    parts: int | None = None

    def __post_init__(self) -> None:
        if self.parts is not None and not 1 <= self.parts <= 12:
            raise ConfigError(f"plots.parts must be from 1 to 12, or null, not {self.parts}")


@dataclass(frozen=True)
class RunSettings:
    """The keys at the root of conf/train.yaml."""

    name: str | None = None
    seed: int = 0
    overwrite: bool = False
    resume: str | None = None
    models_dir: str = "models"
    plots_dir: str = "plots"
    runs_dir: str = "runs"
    baselines: bool = False
    effort: str | None = None
    test: bool = True
    plots: PlotSettings = field(default_factory=PlotSettings)
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        name = self.name
        if name is not None and (not re.fullmatch(r"[^/\\\0]{1,150}", name) or name.startswith(".")):
            raise ConfigError(f"invalid name={name!r}", "it names a folder: use letters, digits, '-', '_' or '.'")
        if self.effort is not None and self.effort not in EFFORTS:
            raise ConfigError(f"invalid effort={self.effort!r}", f"use {', '.join(EFFORTS)}, or null")
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**32:
            raise ConfigError(f"invalid seed={self.seed}", "use a whole number from 0 to 4294967295")


def check_name(settings: RunSettings, resumed: Path | None = None) -> None:
    """Refuse a name that is taken before the data is read: `acquire_run_dir`, which decides it, comes after.

    Raises:
        StorageError: A run of that name is in progress, or its folder or bundle exists without `overwrite`.
    """
    if settings.name is None or resumed:
        return
    run = _folders(settings, settings.name)
    if run.directory.exists() or run.bundle.exists():
        with _name_lock(settings):  # a run in progress is no run to resume
            if not settings.overwrite:
                raise _name_is_taken(run)


@contextmanager
def buffered_log() -> Iterator[list[logging.LogRecord]]:
    """Collect log records for a run that has no folder yet; `acquire_run_dir` writes them to train.log."""
    handler = _LogBuffer()
    logging.getLogger().addHandler(handler)
    try:
        yield handler.records
    finally:
        logging.getLogger().removeHandler(handler)


class _LogBuffer(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def acquire_run_dir(
    settings: RunSettings,
    default: str,
    early: Sequence[logging.LogRecord] = (),
    notes: dict[str, Any] | None = None,
    resumed: Path | None = None,
) -> Iterator[RunDir]:
    """Take a name and its run folder for the block; a run that fails without a checkpoint leaves no folder behind.

    With `overwrite` the old run folder is put aside until the new run has succeeded, and restored if that fails without
    a checkpoint.

    Args:
        settings: Name and folders.
        default: The name where the settings have none, numbered when it is taken.
        early: Log records from before there was a folder.
        notes: Kept in the folder's run.json.
        resumed: The folder of a run to resume, which is used as it is.

    Raises:
        StorageError: The name is taken (without `overwrite` or `resumed`), the run is in progress, or a folder is not
            writable.
    """
    for directory in (settings.runs_dir, settings.models_dir, settings.plots_dir):
        _check_writable(Path(directory))
    with _name_lock(settings), _old_run_aside(settings, resumed), ExitStack() as held:
        with storage_errors(settings.runs_dir):
            run = _reopened(settings, resumed) if resumed else _new(settings, default.replace("/", "-").lstrip("."))
            held.enter_context(_folder_lock(run.directory))
            from image_classifier.training.checkpoint_io import sweep  # torch, which `tune` does without

            sweep(run.directory)
            run = replace(run, key=_note(run.directory, notes or {})["key"])
            handler = _LogFile(run.directory / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        for record in early:
            handler.handle(record)
        logging.getLogger().addHandler(handler)
        failed = True
        try:
            yield run
            failed = False
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()
            if failed and not _is_worth_keeping(run.directory):
                shutil.rmtree(run.directory, ignore_errors=True)


@contextmanager
def _name_lock(settings: RunSettings) -> Iterator[None]:
    """Refuse a second run under a given name while the first is in progress: `overwrite` would move its folder away."""
    if settings.name is None:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(Path(settings.runs_dir) / f".{settings.name}.lock", wait=False))
        except BlockingIOError:
            raise StorageError(
                f"a run named {settings.name!r} is in progress", "wait for it, or choose another name="
            ) from None
        yield


@contextmanager
def _folder_lock(directory: Path) -> Iterator[None]:
    """Refuse a run folder in which another process works."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(directory / ".lock", wait=False))
        except BlockingIOError:
            raise StorageError(
                f"the run in {str(directory)!r} is in progress", "wait for it, or stop it first"
            ) from None
        yield


@contextmanager
def _old_run_aside(settings: RunSettings, resumed: Path | None) -> Iterator[None]:
    """With `overwrite`, put the old run folder aside; remove it after success, restore it after a failure."""
    directory = Path(settings.runs_dir) / (settings.name or "")
    if not (settings.name and settings.overwrite):
        yield
        return
    aside = directory.with_name(f".{directory.name}.old") if resumed else _put_aside(directory)
    try:
        yield
    except BaseException:
        if aside.exists() and not _is_worth_keeping(directory):
            shutil.rmtree(directory, ignore_errors=True)
            aside.rename(directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_worth_keeping(directory: Path) -> bool:
    """Return whether a run that failed left something to resume from, or that shows why it failed."""
    patterns = ("checkpoints/*.ckpt", "folds/*/checkpoints/*.ckpt", "bad_batch*.txt")
    return any(any(directory.glob(pattern)) for pattern in patterns)


def read_notes(directory: Path) -> dict[str, Any]:
    """Return what a run keeps about itself in run.json; nothing where it is missing or damaged."""
    try:
        notes = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _note(directory: Path, notes: dict[str, Any]) -> dict[str, Any]:
    """Add to run.json, with a unique key for the run."""
    notes = {"key": uuid.uuid4().hex[:16], **read_notes(directory), **notes}
    write_text(directory / "run.json", json.dumps(notes, indent=2) + "\n")
    return notes


def mark_finished(run: RunDir, score: float, length: Mapping[str, Any]) -> None:
    """Note in run.json that a run is finished, with its length (`resume.training_length`) and its score."""
    _note(run.directory, {"finished": True, "score": score, "length": length})


class _LogFile(logging.FileHandler):
    """A log file whose errors, such as a full disk, are ignored: the terminal still shows each line."""

    def handleError(self, record: logging.LogRecord) -> None: ...  # noqa: N802


def _put_aside(directory: Path) -> Path:
    """Rename a run folder out of the way; an older one that was put aside is the last that succeeded, and stays."""
    aside = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        with _folder_lock(directory):
            pass
        if aside.exists():
            shutil.rmtree(directory)
        else:
            directory.rename(aside)
    return aside


def _folders(settings: RunSettings, name: str) -> RunDir:
    return RunDir(
        name,
        directory=Path(settings.runs_dir) / name,
        bundle=Path(settings.models_dir) / name,
        plots=Path(settings.plots_dir) / name,
    )


def _reopened(settings: RunSettings, directory: Path) -> RunDir:
    return replace(_folders(settings, directory.name), directory=directory, resumed=True)


def _new(settings: RunSettings, default: str) -> RunDir:
    for number in itertools.count(1):
        run = _folders(settings, settings.name or (default if number == 1 else f"{default}-{number}"))
        try:
            if run.bundle.exists() and not (settings.name and settings.overwrite):
                raise FileExistsError
            run.directory.mkdir(parents=True)  # only one succeeds where two runs start at once
        except FileExistsError:
            if settings.name:
                raise _name_is_taken(run) from None
        else:
            return run
    raise AssertionError("itertools.count never ends")


def _name_is_taken(run: RunDir) -> StorageError:
    taken = run.directory if run.directory.exists() else run.bundle
    can_resume = taken == run.directory and not read_notes(taken).get("finished")
    resume = "pass resume=last to resume it, " if can_resume else ""
    return StorageError(
        f"the name {run.name!r} is taken: {str(taken)!r} exists",
        f"{resume}choose another name=, or pass overwrite=true",
    )


def _check_writable(directory: Path) -> None:
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()


def provenance(seed: int, **facts: Any) -> dict[str, Any]:
    """Return where a result came from: versions, code, command and time, and the given facts."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": git_commit(),
        "seed": seed,
        "python": platform.python_version(),
        "packages": versions,
        **facts,
    }


def git_commit() -> str | None:
    """Return the commit of the code, with `-dirty` where files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
