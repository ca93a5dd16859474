"""A run's name and folders, and the facts that say where its result came from."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from image_classifier import __version__
from image_classifier.errors import ConfigError, StorageError, storage_errors

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "onnx", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files: `directory` while it lives, `bundle` and `plots` when it is done."""

    name: str
    directory: Path
    bundle: Path
    plots: Path


@contextmanager
def claim_run(name: str | None, default: str, runs_dir: Path, models_dir: Path, plots_dir: Path, overwrite: bool) -> Iterator[RunFolder]:
    """Claim a name and its run folder; a run that fails before it has a checkpoint leaves no folder behind.

    Without a name the run is called `default`, numbered when that is taken.

    Raises:
        ConfigError: The name cannot be a folder's.
        StorageError: The name is taken and `overwrite` is false, or a folder may not be written.
    """
    if name is not None and (not re.fullmatch(r"[^/\\\0]{1,150}", name) or name.startswith(".")):
        raise ConfigError(f"name={name!r} cannot be the name of a folder", "use letters, digits, '-', '_' or '.'")
    for directory in (runs_dir, models_dir, plots_dir):
        _check_writable(directory)
    run = _claim(name, default, runs_dir, models_dir, plots_dir, overwrite)
    handler = logging.FileHandler(run.directory / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield run
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        if not run.bundle.exists() and not any(run.directory.glob("checkpoints/*.ckpt")):
            shutil.rmtree(run.directory, ignore_errors=True)


def _claim(name: str | None, default: str, runs_dir: Path, models_dir: Path, plots_dir: Path, overwrite: bool) -> RunFolder:
    number = 1
    while True:
        candidate = name or (default if number == 1 else f"{default}-{number}")
        run = RunFolder(candidate, runs_dir / candidate, models_dir / candidate, plots_dir / candidate)
        if name and overwrite:
            shutil.rmtree(run.directory, ignore_errors=True)
        try:
            if run.bundle.exists() and not (name and overwrite):
                raise FileExistsError
            run.directory.mkdir(parents=True)  # one winner where two runs start at once
            return run
        except FileExistsError:
            if name:
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
