"""A run's name and folders, and the facts that say where its result came from."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from image_classifier import __version__
from image_classifier.errors import ConfigError, StorageError, storage_errors
from image_classifier.files import locked

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "onnx", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files: `directory` while it lives, `bundle` and `plots` when it is done."""

    name: str
    directory: Path
    bundle: Path
    plots: Path


@dataclass(frozen=True)
class RunSettings:
    """The keys at the root of conf/train.yaml."""

    name: str | None = None
    seed: int = 0
    overwrite: bool = False
    models_dir: str = "models"
    plots_dir: str = "plots"
    runs_dir: str = "runs"
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        name = self.name
        if name is not None and (not re.fullmatch(r"[^/\\\0]{1,150}", name) or name.startswith(".")):
            raise ConfigError(f"name={name!r} cannot be the name of a folder", "use letters, digits, '-', '_' or '.'")
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} cannot be", "use a whole number from 0 to 4294967295")


@contextmanager
def remembered_log() -> Iterator[list[logging.LogRecord]]:
    """What is logged in the block, for a run that has no folder yet; `claim_run` writes it to train.log."""
    handler = _Memory()
    logging.getLogger().addHandler(handler)
    try:
        yield handler.records
    finally:
        logging.getLogger().removeHandler(handler)


class _Memory(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def claim_run(asked: RunSettings, default: str, early: Sequence[logging.LogRecord] = ()) -> Iterator[RunFolder]:
    """Claim a name and its run folder; a run that fails before it has a checkpoint leaves no folder behind.

    Without a name the run is called `default`, numbered when that is taken. With `overwrite` the old run folder is put aside until
    the new run has succeeded, and comes back if that fails before it has a checkpoint of its own.

    Raises:
        StorageError: The name is taken and `overwrite` is false, or a folder may not be written.
    """
    for directory in (asked.runs_dir, asked.models_dir, asked.plots_dir):
        _check_writable(Path(directory))
    with _alone(asked), _old_run_aside(asked):
        with storage_errors(asked.runs_dir):
            run = _claim(asked, default.replace("/", "-").lstrip("."))
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
            if failed and not _has_checkpoint(run.directory):
                shutil.rmtree(run.directory, ignore_errors=True)


@contextmanager
def _alone(asked: RunSettings) -> Iterator[None]:
    """Refuse a second run under a name that was asked for while the first is under way: `overwrite` would pull its folder away."""
    if asked.name is None:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(Path(asked.runs_dir) / f".{asked.name}.lock", wait=False))
        except BlockingIOError:
            raise StorageError(f"a run named {asked.name!r} is under way", "wait for it, or choose another name=") from None
        yield


@contextmanager
def _old_run_aside(asked: RunSettings) -> Iterator[None]:
    """With `overwrite`, put the old run folder aside; it goes when the block ends well and comes back when no checkpoint took its place."""
    directory = Path(asked.runs_dir) / (asked.name or "")
    if not (asked.name and asked.overwrite):
        yield
        return
    aside = _put_aside(directory)
    try:
        yield
    except BaseException:
        if aside.exists() and not _has_checkpoint(directory):
            shutil.rmtree(directory, ignore_errors=True)
            aside.rename(directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _has_checkpoint(directory: Path) -> bool:
    return any(directory.glob("checkpoints/*.ckpt"))


class _LogFile(logging.FileHandler):
    """A log that a full disk ends quietly: the terminal still shows each line."""

    def handleError(self, record: logging.LogRecord) -> None: ...  # noqa: N802


def _put_aside(directory: Path) -> Path:
    """Rename a run folder out of the way; an older one that is still aside is the last that succeeded, and stays."""
    aside = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        if aside.exists():
            shutil.rmtree(directory)
        else:
            directory.rename(aside)
    return aside


def _claim(asked: RunSettings, default: str) -> RunFolder:
    number = 1
    while True:
        name = asked.name or (default if number == 1 else f"{default}-{number}")
        run = RunFolder(name, Path(asked.runs_dir) / name, Path(asked.models_dir) / name, Path(asked.plots_dir) / name)
        try:
            if run.bundle.exists() and not (asked.name and asked.overwrite):
                raise FileExistsError
            run.directory.mkdir(parents=True)  # one winner where two runs start at once
            return run
        except FileExistsError:
            if asked.name:
                taken = run.bundle if run.bundle.exists() else run.directory
                raise StorageError(f"the name {name!r} is taken: {str(taken)!r} exists", "choose another name=, or pass overwrite=true") from None
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
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
