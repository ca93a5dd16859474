"""Going on with a run that stopped: which folder and which checkpoint, and whether it is still the same run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.errors import CheckpointError, ConfigError, DataError
from image_classifier.manifest import Manifest
from image_classifier.training.callbacks.exact_resume import KEY
from image_classifier.training.callbacks.preemption import slurm_job
from image_classifier.training.checkpoint_io import damage, go_back_to, newest_readable, read_part
from image_classifier.training.run_dir import RunSettings, read_notes

log = logging.getLogger(__name__)

# What a run is: it cannot change half-way. Of the data only where they lie and how they are kept may, as their manifest is compared.
_FIXED = (
    "seed",
    "data.",
    "model.",
    "loss.",
    "optimizer.",
    "scheduler.",
    "augment.",
    "callbacks.averaging.",
    "callbacks.unfreeze.",
    "trainer.accumulate",
)
_FREE = (
    "data.dir",
    "data.archive",
    "data.sha256",
    "data.dvc",
    "data.name",
    "data.manifest_path",
    "data.exclude_path",
    "data.fix_path",
    "data.cache.",
    "data.limits.",
)

_LENGTH = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")


@dataclass(frozen=True)
class ResumePoint:
    """A run to go on with: its folder (None: a checkpoint without one starts a new run), from which checkpoint, and whether it gets longer."""

    directory: Path | None
    checkpoint: Path | None = None
    longer: bool = False


def find_resume_point(asked: RunSettings, line: Sequence[str]) -> ResumePoint | None:
    """The run that `resume` names, or that a requeued SLURM job had begun; None where a new one is to start.

    Args:
        asked: The settings at the root of the configuration.
        line: What the command line gives.

    Raises:
        CheckpointError: There is no such run.
    """
    runs = Path(asked.runs_dir)
    if asked.resume is None:
        return _requeued(runs, line) if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else None
    if asked.resume != "last":
        return _at(Path(asked.resume))
    if asked.name:
        if not (runs / asked.name).is_dir():
            raise CheckpointError(f"there is no run {str(runs / asked.name)!r} to go on with", _known(runs))
        return ResumePoint(runs / asked.name)
    found = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    alike = [path for path in found if read_notes(path.parent).get("line") == command_line_of(line)]
    if not found:
        raise CheckpointError(f"there is no run in {str(runs)!r} to go on with", "start one without resume")
    return ResumePoint((alike or found)[-1].parent)


def _at(path: Path) -> ResumePoint:
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise CheckpointError(
                f"{str(path)!r} is not the folder of a run", "give runs/NAME, or a .ckpt in its checkpoints/"
            )
        return ResumePoint(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no {str(path)!r} to go on from", "give runs/NAME, a .ckpt in its checkpoints/, or resume=last"
        )
    if reason := damage(path):
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged ({reason})", "give its run folder: the newest whole one is taken"
        )
    read_part(path, KEY)
    folder = path.resolve().parent.parent
    own = path.resolve().parent.name == "checkpoints" and (folder / "config.yaml").is_file()
    return ResumePoint(Path(os.path.relpath(folder)) if own else None, path)


def _requeued(runs: Path, line: Sequence[str]) -> ResumePoint | None:
    """The run folder of this SLURM job before it was requeued; of several, as in a sweep, the one of this command line."""
    for path in sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        notes = read_notes(path.parent)
        if notes.get("slurm_job") == slurm_job() and notes.get("line") == command_line_of(line):
            log.info("SLURM started job %s again: going on with %s", slurm_job(), path.parent)
            return ResumePoint(path.parent)
    return None


def command_line_of(line: Sequence[str]) -> list[str]:
    """A command line by which a run is found again: `resume` is not part of it."""
    return sorted(item for item in line if not item.startswith("resume="))


def _known(runs: Path) -> str:
    names = sorted(path.parent.name for path in runs.glob("*/run.json"))
    return f"there are {', '.join(names[:10])}" if names else "start one without resume"


def run_notes(going: ResumePoint | None, line: Sequence[str], flat: Mapping[str, Any]) -> dict[str, Any]:
    """What a run writes down about itself in run.json, for this file to find it again; `line` is what the command line gives."""
    before = read_notes(going.directory) if going and going.directory else {}
    given = before.get("given", {}) | {_key(item): item for item in command_line_of(line)}
    job = {"slurm_job": slurm_job()} if slurm_job() else {}
    return {
        "line": before.get("line", command_line_of(line)),
        "given": given,
        "length": training_length(flat),
        "finished": False,
        **job,
    }


def new_overrides(directory: Path, line: Sequence[str]) -> list[str]:
    """What of a command line the run has not been given before: what it was given may have been settled since, such as `auto`."""
    given = read_notes(directory).get("given", {})
    return [item for item in command_line_of(line) if given.get(_key(item)) != item]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def score_if_finished(going: ResumePoint, flat: Mapping[str, Any], asked: str | None) -> float | None:
    """The value of a requeued run that has nothing left to do, None where something is left.

    Raises:
        ConfigError: The user asks to go on with a run that is finished, and not for more epochs.
    """
    notes = read_notes(going.directory) if going.directory else {}
    if not notes.get("finished") or notes.get("length") != training_length(flat):
        return None
    if asked is None:
        log.info("%s is finished", going.directory)
        return float(notes["score"])
    raise ConfigError(
        f"the run {str(going.directory)!r} is finished",
        "give more trainer.max_epochs to train on, or overwrite=true without resume to start anew",
    )


def validate_resume(going: ResumePoint, facts: Mapping[str, Any], flat: Mapping[str, Any]) -> ResumePoint:
    """The same with its checkpoint, said in the log, or with none where the run was stopped before it had one, and begins again.

    Raises:
        CheckpointError: All checkpoints are damaged.
        DataError, ConfigError: This is another run than the checkpoint's.
    """
    path = going.checkpoint or (newest_readable(going.directory / "checkpoints") if going.directory else None)
    if path is None:
        log.warning("%s has no checkpoint yet: the run begins again", going.directory)
        return going
    longer = _check_same(path, facts, flat)
    log.info("resume: from %s, step %d", path, read_part(path, "global_step"))
    return ResumePoint(going.directory, path, longer)


def prune_later_checkpoints(going: ResumePoint) -> None:
    """Remove the run's checkpoints after the one it goes on from, which the user chose to go back to; not before the folder is claimed."""
    if going.directory and going.checkpoint:
        go_back_to(going.checkpoint, read_part(going.checkpoint, "global_step"))


def run_fingerprint(manifest: Manifest, flat: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with, as plain values; `flat` are the settings by dotted key."""
    return {
        "manifest_sha256": manifest.sha256,
        "classes": list(manifest.classes),
        "settings": {
            key: json.dumps(value)
            for key, value in flat.items()
            if key.startswith(_FIXED) and not key.startswith(_FREE)
        },
        "length": training_length(flat),
    }


def _check_same(path: Path, facts: Mapping[str, Any], flat: Mapping[str, Any]) -> bool:
    """Refuse to go on with another run than the checkpoint's; returns whether this one is to be longer."""
    before = read_part(path, KEY)["facts"]
    anew = "start a new run; model.from=NAME starts it from these weights"
    if before["classes"] != facts["classes"]:
        raise DataError(
            f"the run to go on with has other classes ({_shown(before['classes'])}; now {_shown(facts['classes'])})",
            anew,
        )
    if before["manifest_sha256"] != facts["manifest_sha256"]:
        raise DataError(
            "the images or their parts are not those of the run to go on with", f"bring them back, or {anew}"
        )
    for key in sorted(before["settings"].keys() | facts["settings"].keys()):
        old, new = before["settings"].get(key), facts["settings"].get(key)
        if old != new:
            raise ConfigError(
                f"{key}={new} in a run that began with {old}", f"a run keeps it to its end: leave it out, or {anew}"
            )
    return _is_longer(before["length"], flat, read_part(path, "epoch"), anew)


def _is_longer(before: Mapping[str, Any], flat: Mapping[str, Any], reached: int, anew: str) -> bool:
    """Whether the run's end was moved, said in the log; refused where the learning rate already falls towards the old one."""
    now = training_length(flat)
    moved = [key for key in _LENGTH if before.get(key) != now[key]]
    epochs, warmup = now["trainer.max_epochs"], float(flat.get("scheduler.warmup") or 0)
    if "trainer.max_epochs" in moved and epochs is not None and 0 <= epochs < reached:
        raise ConfigError(f"trainer.max_epochs={epochs}, and the run has made {reached}", "give at least as many")
    laid_out = next((words for words, is_so in _laid_out(flat, warmup) if is_so), "")
    for key in moved:
        if (key != "trainer.max_time" or epochs is None) and laid_out:
            raise ConfigError(f"{key}={now[key]} in a run whose {laid_out} for {before.get(key)}", anew)
        log.warning("%s: %s instead of %s", key, now[key], before.get(key))
    return bool(moved)


def _laid_out(flat: Mapping[str, Any], warmup: float) -> Iterator[tuple[str, bool]]:
    """What may depend on a run's length from its beginning on, and whether it does."""
    yield "learning rate is laid out", bool(flat.get("scheduler.length")) or 0 < warmup < 1
    yield "image sizes are laid out (data.progressive_sizes)", bool(flat.get("data.progressive_sizes"))
    yield "averaging is laid out (callbacks=swa)", flat.get("callbacks.averaging.start") is not None


def training_length(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that end a run, as plain values."""
    return {key: flat.get(key) for key in _LENGTH}


def _shown(classes: Sequence[str]) -> str:
    return f"{len(classes)}: {', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}"
