"""Resuming a run that stopped: which folder and which checkpoint, and whether it is still the same run."""

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
from image_classifier.text import listed
from image_classifier.training.callbacks.exact_resume import KEY
from image_classifier.training.callbacks.preemption import slurm_job
from image_classifier.training.checkpoint_io import damage, go_back_to, newest_readable, read_part
from image_classifier.training.run_dir import RunSettings, read_notes

log = logging.getLogger(__name__)

# These settings cannot change within a run.
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
# Of the data, where they lie and how they are kept may change: their manifest is compared.
_FREE = (
    "data.dir",
    "data.archive",
    "data.download.",
    "data.unpack.",
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
    """A run to resume.

    Attributes:
        directory: Its folder; None: a checkpoint without one starts a new run.
        checkpoint: Where it resumes; None: the newest readable one, or the beginning.
        longer: Whether it is given more epochs, steps or time than before.
    """

    directory: Path | None
    checkpoint: Path | None = None
    longer: bool = False


def find_resume_point(settings: RunSettings, overrides: Sequence[str]) -> ResumePoint | None:
    """Return the run that `resume` names, or that a requeued SLURM job had begun; None where a new one is to start.

    Args:
        settings: The settings at the root of the configuration.
        overrides: What the command line gives.

    Raises:
        CheckpointError: There is no such run.
    """
    runs = Path(settings.runs_dir)
    if settings.resume is None:
        return _requeued(runs, overrides) if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else None
    if settings.resume != "last":
        return _at(Path(settings.resume))
    if settings.name:
        if not (runs / settings.name).is_dir():
            raise CheckpointError(f"there is no run {str(runs / settings.name)!r} to resume", _known(runs))
        return ResumePoint(runs / settings.name)
    notes = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    same_line = [path for path in notes if read_notes(path.parent).get("line") == command_line_of(overrides)]
    if not notes:
        raise CheckpointError(f"there is no run in {str(runs)!r} to resume", "start one without resume")
    return ResumePoint((same_line or notes)[-1].parent)


def _at(path: Path) -> ResumePoint:
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise CheckpointError(
                f"{str(path)!r} is not a run folder", "give runs/NAME, or a .ckpt in its checkpoints/"
            )
        return ResumePoint(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no {str(path)!r} to resume from", "give runs/NAME, a .ckpt in its checkpoints/, or resume=last"
        )
    if reason := damage(path):
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged ({reason})",
            "give its run folder: the newest undamaged checkpoint is used",
        )
    read_part(path, KEY)
    folder = path.resolve().parent.parent
    is_in_run = path.resolve().parent.name == "checkpoints" and (folder / "config.yaml").is_file()
    return ResumePoint(Path(os.path.relpath(folder)) if is_in_run else None, path)


def _requeued(runs: Path, overrides: Sequence[str]) -> ResumePoint | None:
    """Return the folder of this SLURM job's run before it was requeued; in a sweep, that of this command line."""
    for path in sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        notes = read_notes(path.parent)
        if notes.get("slurm_job") == slurm_job() and notes.get("line") == command_line_of(overrides):
            log.info("SLURM started job %s again: resuming %s", slurm_job(), path.parent)
            return ResumePoint(path.parent)
    return None


def command_line_of(overrides: Sequence[str]) -> list[str]:
    """Return the command line by which a run is found again, without `resume`.

    >>> command_line_of(["seed=1", "resume=last", "model=mlp"])
    ['model=mlp', 'seed=1']
    """
    return sorted(item for item in overrides if not item.startswith("resume="))


def _known(runs: Path) -> str:
    names = sorted(path.parent.name for path in runs.glob("*/run.json"))
    return f"the runs are {listed(names, 10)}" if names else "start one without resume"


def run_notes(resume: ResumePoint | None, overrides: Sequence[str], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return what run.json keeps so that the run is found again; `flat` are the settings by dotted key."""
    before = read_notes(resume.directory) if resume and resume.directory else {}
    given = before.get("given", {}) | {_key(item): item for item in command_line_of(overrides)}
    job = {"slurm_job": slurm_job()} if slurm_job() else {}
    return {
        "line": before.get("line", command_line_of(overrides)),
        "given": given,
        "length": training_length(flat),
        "finished": False,
        **job,
    }


def new_overrides(directory: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that a run was not given before; `auto` that it was given may be a number by now."""
    given = read_notes(directory).get("given", {})
    return [item for item in command_line_of(overrides) if given.get(_key(item)) != item]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def score_if_finished(resume: ResumePoint, flat: Mapping[str, Any], requested: str | None) -> float | None:
    """Return the score of a requeued run that is finished, None where something is left to do.

    Args:
        resume: The run.
        flat: The settings by dotted key.
        requested: The key `resume`; None: SLURM requeued the job.

    Raises:
        ConfigError: The user resumes a finished run, and does not give it more epochs.
    """
    notes = read_notes(resume.directory) if resume.directory else {}
    if not notes.get("finished") or notes.get("length") != training_length(flat):
        return None
    if requested is None:
        log.info("%s is finished", resume.directory)
        return float(notes["score"])
    raise ConfigError(
        f"the run {str(resume.directory)!r} is finished",
        "give a larger trainer.max_epochs to train longer, or overwrite=true without resume to start again",
    )


def validate_resume(resume: ResumePoint, fingerprint: Mapping[str, Any], flat: Mapping[str, Any]) -> ResumePoint:
    """Return the resume point with its checkpoint; with none where the run stopped before it had one, and begins again.

    Raises:
        CheckpointError: All checkpoints are damaged.
        DataError, ConfigError: The checkpoint belongs to another run.
    """
    path = resume.checkpoint or (newest_readable(resume.directory / "checkpoints") if resume.directory else None)
    if path is None:
        log.warning("%s has no checkpoint yet: the run begins again", resume.directory)
        return resume
    longer = _check_same(path, fingerprint, flat)
    log.info("resume: from %s, step %d", path, read_part(path, "global_step"))
    return ResumePoint(resume.directory, path, longer)


def prune_later_checkpoints(resume: ResumePoint) -> None:
    """Remove the run's checkpoints after the one that the user chose to resume; not before the folder is claimed."""
    if resume.directory and resume.checkpoint:
        go_back_to(resume.checkpoint, read_part(resume.checkpoint, "global_step"))


def run_fingerprint(
    manifest: Manifest, flat: Mapping[str, Any], hashes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what a resumed run and its checkpoint must share.

    Args:
        manifest: The images.
        flat: The settings by dotted key.
        hashes: What else cannot change, such as the sha256 of what a setting names, by the setting's key.
    """
    fixed = {key: value for key, value in flat.items() if key.startswith(_FIXED) and not key.startswith(_FREE)}
    return {
        "manifest_sha256": manifest.sha256,
        "classes": list(manifest.classes),
        "settings": {key: json.dumps(value) for key, value in fixed.items()},
        "hashes": dict(hashes or {}),
        "length": training_length(flat),
    }


def _check_same(path: Path, fingerprint: Mapping[str, Any], flat: Mapping[str, Any]) -> bool:
    """Refuse to resume another run than the checkpoint's; return whether this one is to be longer."""
    before = read_part(path, KEY)["facts"]
    hint = "start a new run; model.from=NAME starts it from these weights"
    if before["classes"] != fingerprint["classes"]:
        old, new = _shown(before["classes"]), _shown(fingerprint["classes"])
        raise DataError(f"the run to resume has other classes ({old}; now {new})", hint)
    if before["manifest_sha256"] != fingerprint["manifest_sha256"]:
        raise DataError("the images or their splits are not those of the run to resume", f"restore them, or {hint}")
    for key in sorted(before["settings"].keys() | fingerprint["settings"].keys()):
        old, new = before["settings"].get(key), fingerprint["settings"].get(key)
        if old != new:
            raise ConfigError(
                f"{key}={new} in a run that began with {old}", f"it cannot change within a run: leave it out, or {hint}"
            )
    for key, sha256 in fingerprint["hashes"].items():
        if before.get("hashes", {}).get(key) != sha256:
            raise ConfigError(f"{key} is not what it was when the run began", f"restore it, or {hint}")
    return _is_longer(before["length"], flat, read_part(path, "epoch"), hint)


def _is_longer(before: Mapping[str, Any], flat: Mapping[str, Any], epochs_done: int, hint: str) -> bool:
    """Return whether the run's end was moved; refused where the learning rate already falls towards the old end."""
    now = training_length(flat)
    moved = [key for key in _LENGTH if before.get(key) != now[key]]
    epochs, warmup = now["trainer.max_epochs"], float(flat.get("scheduler.warmup") or 0)
    if "trainer.max_epochs" in moved and epochs is not None and 0 <= epochs < epochs_done:
        raise ConfigError(f"trainer.max_epochs={epochs}, but the run has done {epochs_done}", "give at least as many")
    planned = next((words for words, is_so in _planned(flat, warmup) if is_so), "")
    for key in moved:
        if (key != "trainer.max_time" or epochs is None) and planned:
            raise ConfigError(f"{key}={now[key]} in a run whose {planned} for {before.get(key)}", hint)
        log.warning("%s: %s instead of %s", key, now[key], before.get(key))
    return bool(moved)


def _planned(flat: Mapping[str, Any], warmup: float) -> Iterator[tuple[str, bool]]:
    """Yield what may depend on a run's length from its start, and whether it does."""
    yield "learning rate is planned", bool(flat.get("scheduler.length")) or 0 < warmup < 1
    yield "image sizes are planned (data.progressive_sizes)", bool(flat.get("data.progressive_sizes"))
    yield "averaging is planned (callbacks=swa)", flat.get("callbacks.averaging.start") is not None


def training_length(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that end a run.

    >>> training_length({"trainer.max_epochs": 3, "seed": 0})
    {'trainer.max_epochs': 3, 'trainer.max_steps': None, 'trainer.max_time': None}
    """
    return {key: flat.get(key) for key in _LENGTH}


def _shown(classes: Sequence[str]) -> str:
    return f"{len(classes)}: {listed(classes)}"
