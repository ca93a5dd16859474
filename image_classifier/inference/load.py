"""From a bundle, a `.ckpt` or an `.onnx` to a Predictor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from image_classifier.bundle import INFO_NAME, Bundle, find_checkpoint, read_bundle, reading
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.evaluation.reliability.abstention import Decision, DecisionSettings
from image_classifier.evaluation.reliability.ood import DETECTOR, Detector
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits, Preprocess
from image_classifier.inference.backend_selection import AUTO, fastest_backend
from image_classifier.inference.backends import BACKENDS, NAMES, ServerAddress, open_backend
from image_classifier.inference.predictor import Backend, Predictor, Shaped
from image_classifier.sources.dvc import pull_missing

log = logging.getLogger(__name__)


def pulled_checkpoint(name: str, models_dir: Path, dvc: bool | None = None) -> Path:
    """What `bundle.find_checkpoint` finds, after DVC fetched it where it is tracked and missing.

    Raises:
        CheckpointError: Nothing, or more than one thing, has that name.
        SourceError: DVC tracks it and cannot fetch it.
    """
    for place in (Path(name).expanduser(), models_dir / name):
        with reading(place):
            (place / INFO_NAME).is_file()  # says so of a name that no file can have, and of a folder that is closed
        pull_missing(place, None if dvc else dvc)  # null and true are one here: a name need not be a path
    return find_checkpoint(name, models_dir)


def pulled_bundle(name: str, models_dir: Path, dvc: bool | None = None) -> Bundle:
    """The bundle of that name, every file compared with its hash.

    Raises:
        CheckpointError: As `pulled_checkpoint`, or what is found is a lone file, or a file of the bundle is damaged.
    """
    path = pulled_checkpoint(name, models_dir, dvc)
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(
            f"{str(path)!r} is not a bundle",
            "only a bundle says which hashes and answers are right: give its folder or its name",
        )
    bundle = read_bundle(path)
    bundle.verify()
    return bundle


def load_predictor(
    path: Path,
    backend: str | None = None,
    batch_size: int = 64,
    trusted: Sequence[str] = (),
    limits: DecodeLimits = DEFAULT_LIMITS,
    asked: DecisionSettings = DecisionSettings(),  # noqa: B008  # frozen
    server: ServerAddress = ServerAddress(),  # noqa: B008  # frozen
    callers: int = 1,
) -> Predictor:
    """A predictor over what `bundle.find_checkpoint` found; `backend` null takes ONNX for a bundle, else what the file is; auto as `auto.fastest`.

    `trusted` names packages of the user's own that a checkpoint's network may come from; `asked` are other limits than the model was delivered with;
    `server` is where the backend triton asks; so many `callers` want to run batches at once.

    Raises:
        ConfigError: The backend is unknown or does not fit the file, or limits are asked of one that does not know what val told.
        CheckpointError: The file is damaged or says too little of itself.
        ServerError: The server does not answer, or not as the bundle.
    """
    if backend not in (None, AUTO, *NAMES):
        raise ConfigError(f"there is no backend {backend!r}", f"use one of {', '.join((*NAMES, AUTO))}")
    server.fits(backend)
    if (path / INFO_NAME).is_file():
        bundle = read_bundle(path)
        name = backend or "onnx"
        name, runner = (
            fastest_backend(bundle, trusted, callers)
            if name == AUTO
            else (name, open_backend(bundle, name, trusted, server, callers))
        )
        return _decided(_from_bundle(bundle, name, runner, batch_size, limits), asked, path)
    own = "checkpoint" if path.suffix == ".ckpt" else "onnx"
    if backend not in (None, AUTO, own):
        raise ConfigError(
            f"{path.name} cannot be run by the backend {backend!r}", f"leave --backend out, or use --backend {own}"
        )
    runner, facts = BACKENDS[own].open(path, trusted, _read, callers)
    return _decided(replace(_predictor(runner, facts, batch_size, path, limits), backend_name=own), asked, path)


def _read(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


def _decided(predictor: Predictor, asked: DecisionSettings, path: Path) -> Predictor:
    """The predictor with the limits that are asked for in place of its own; the log says where they cannot be kept."""
    if asked == DecisionSettings():
        return predictor
    if predictor.decision is None:
        raise ConfigError(
            f"{path.name!r} does not say what its val part told, from which decision.* is chosen",
            "use a bundle of this version",
        )
    decision = predictor.decision.again(asked)
    if decision.note:
        log.warning(decision.note)
    return replace(predictor, decision=decision)


def _from_bundle(bundle: Bundle, backend: str, runner: Backend, batch_size: int, limits: DecodeLimits) -> Predictor:
    predictor = replace(
        _predictor(runner, {**vars(bundle.info)}, batch_size, bundle.directory, limits), backend_name=backend
    )
    if DETECTOR not in bundle.info.files or predictor.decision is None or predictor.decision.evidence.ood_scores == ():
        return predictor
    bundle.verify([DETECTOR])
    return replace(predictor, detector=Detector.read(bundle.path(DETECTOR)))


def _predictor(
    runner: Backend, facts: Mapping[str, Any], batch_size: int, path: Path, limits: DecodeLimits
) -> Predictor:
    if "classes" not in facts or "preprocess" not in facts:
        raise CheckpointError(
            f"{str(path)!r} does not say its classes and preprocessing",
            "use a model exported by this package, or its bundle",
        )
    try:
        preprocess, temperature = Preprocess.from_dict(facts["preprocess"]), float(facts.get("temperature", 1.0))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} describes no preprocessing that can be ({error})", "use a model exported by this package"
        ) from error
    decision = Decision.from_dict(facts["decision"]) if facts.get("decision") else None
    if isinstance(runner, Shaped):
        runner.check(preprocess.size, len(facts["classes"]))
    return Predictor(
        runner, tuple(facts["classes"]), preprocess, temperature, batch_size, limits=limits, decision=decision
    )
