"""A run's name and folders, and the facts that say where its result came from."""

from __future__ import annotations

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

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "onnx", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class RunDir:
    """Where one run keeps its files: `directory` while it lives, `bundle` and `plots` when it is done; `key` is its alone."""

    name: str
    directory: Path
    bundle: Path
    plots: Path
    key: str = ""
    resumed: bool = False


@dataclass(frozen=True)
class PlotSettings:
    """The keys of `plots`: whether figures are drawn, and in how many parts learning curves, too (None: the loss in four, from 40 epochs)."""

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
    test: bool = True
    plots: PlotSettings = field(default_factory=PlotSettings)
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        name = self.name
        if name is not None and (not re.fullmatch(r"[^/\\\0]{1,150}", name) or name.startswith(".")):
            raise ConfigError(f"name={name!r} cannot be the name of a folder", "use letters, digits, '-', '_' or '.'")
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**32:
            raise ConfigError(f"invalid seed {self.seed}", "expected a whole number from 0 to 4294967295")


@contextmanager
def buffered_log() -> Iterator[list[logging.LogRecord]]:
    """What is logged in the block, for a run that has no folder yet; `claim_run` writes it to train.log."""
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
    asked: RunSettings,
    default: str,
    early: Sequence[logging.LogRecord] = (),
    notes: dict[str, Any] | None = None,
    going_on: Path | None = None,
) -> Iterator[RunDir]:
    """Claim a name and its run folder; a run that fails before it has a checkpoint leaves no folder behind.

    Without a name the run is called `default`, numbered when that is taken. With `overwrite` the old run folder is put aside until
    the new run has succeeded, and comes back if that fails before it has a checkpoint of its own. `going_on` is the folder of a run
    to go on with, which is taken as it is. `notes` are kept in the folder's run.json.

    Raises:
        StorageError: The name is taken and neither `overwrite` nor `going_on` is given, the run is under way, or a folder may not be written.
    """
    for directory in (asked.runs_dir, asked.models_dir, asked.plots_dir):
        _check_writable(Path(directory))
    with _alone(asked), _old_run_aside(asked, going_on), ExitStack() as held:
        with storage_errors(asked.runs_dir):
            run = _taken_up(asked, going_on) if going_on else _claim(asked, default.replace("/", "-").lstrip("."))
            held.enter_context(_held(run.directory))
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
def _alone(asked: RunSettings) -> Iterator[None]:
    """Refuse a second run under a name that was asked for while the first is under way: `overwrite` would pull its folder away."""
    if asked.name is None:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(Path(asked.runs_dir) / f".{asked.name}.lock", wait=False))
        except BlockingIOError:
            raise StorageError(
                f"a run named {asked.name!r} is under way", "wait for it, or choose another name="
            ) from None
        yield


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Refuse to work in a run folder in which another process works."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(directory / ".lock", wait=False))
        except BlockingIOError:
            raise StorageError(f"the run in {str(directory)!r} is under way", "wait for it, or stop it first") from None
        yield


@contextmanager
def _old_run_aside(asked: RunSettings, going_on: Path | None) -> Iterator[None]:
    """With `overwrite`, put the old run folder aside; it goes when the block ends well and comes back when no checkpoint took its place."""
    directory = Path(asked.runs_dir) / (asked.name or "")
    if not (asked.name and asked.overwrite):
        yield
        return
    aside = directory.with_name(f".{directory.name}.old") if going_on else _put_aside(directory)
    try:
        yield
    except BaseException:
        if aside.exists() and not _is_worth_keeping(directory):
            shutil.rmtree(directory, ignore_errors=True)
            aside.rename(directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_worth_keeping(directory: Path) -> bool:
    """Whether a run that failed left something to go on from, or to find out why."""
    return any(directory.glob("checkpoints/*.ckpt")) or any(directory.glob("bad_batch*.txt"))


def read_notes(directory: Path) -> dict[str, Any]:
    """What a run wrote down about itself in run.json; nothing where it is missing or damaged."""
    try:
        notes = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _note(directory: Path, notes: dict[str, Any]) -> dict[str, Any]:
    """Add to run.json, with a key for the run that no other has."""
    notes = {"key": uuid.uuid4().hex[:16], **read_notes(directory), **notes}
    write_text(directory / "run.json", json.dumps(notes, indent=2) + "\n")
    return notes


def mark_finished(run: RunDir, score: float, length: Mapping[str, Any]) -> None:
    """Write down that a run has done all it was to do, how much that was (`resume.length_of`), and the value that a sweep compares."""
    _note(run.directory, {"finished": True, "score": score, "length": length})


class _LogFile(logging.FileHandler):
    """A log that a full disk ends quietly: the terminal still shows each line."""

    def handleError(self, record: logging.LogRecord) -> None: ...  # noqa: N802


def _put_aside(directory: Path) -> Path:
    """Rename a run folder out of the way; an older one that is still aside is the last that succeeded, and stays."""
    aside = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        with _held(directory):
            pass
        if aside.exists():
            shutil.rmtree(directory)
        else:
            directory.rename(aside)
    return aside


def _folders(asked: RunSettings, name: str) -> RunDir:
    return RunDir(name, Path(asked.runs_dir) / name, Path(asked.models_dir) / name, Path(asked.plots_dir) / name)


def _taken_up(asked: RunSettings, directory: Path) -> RunDir:
    return replace(_folders(asked, directory.name), directory=directory, resumed=True)


def _claim(asked: RunSettings, default: str) -> RunDir:
    number = 1
    while True:
        run = _folders(asked, asked.name or (default if number == 1 else f"{default}-{number}"))
        try:
            if run.bundle.exists() and not (asked.name and asked.overwrite):
                raise FileExistsError
            run.directory.mkdir(parents=True)  # one winner where two runs start at once
            return run
        except FileExistsError:
            if asked.name:
                taken = run.directory if run.directory.exists() else run.bundle
                goes_on = (
                    "pass resume=last to go on with it, "
                    if taken == run.directory and not read_notes(taken).get("finished")
                    else ""
                )
                raise StorageError(
                    f"the name {asked.name!r} is taken: {str(taken)!r} exists",
                    f"{goes_on}choose another name=, or pass overwrite=true",
                ) from None
        number += 1


def _check_writable(directory: Path) -> None:
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()


def provenance(seed: int, **facts: Any) -> dict[str, Any]:
    """Where a result came from: versions, code, command, machine and time, beside the facts given."""
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
    """The commit of the code, with `-dirty` where files differ from it; None outside a repository."""
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
