"""Loading: from a bundle, a `.ckpt` or an `.onnx` to a Predictor."""

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
from image_classifier.inference.backends import BACKENDS, NAMES, OpenOptions, ServerAddress, open_backend
from image_classifier.inference.predictor import Backend, Predictor, Shaped
from image_classifier.sources.dvc import pull_missing

log = logging.getLogger(__name__)


def pulled_checkpoint(name: str, models_dir: Path, dvc: bool | None = None) -> Path:
    """Return the path that `bundle.find_checkpoint` finds, after DVC fetched it where it is tracked and missing.

    Raises:
        CheckpointError: Nothing, or more than one thing, has that name.
        SourceError: DVC tracks it and cannot fetch it.
    """
    for path in (Path(name).expanduser(), models_dir / name):
        with reading(path):
            (path / INFO_NAME).is_file()  # raises for a name that no file can have, and for an unreadable folder
        pull_missing(path, None if dvc else dvc)  # True means None here: a name need not be a path
    return find_checkpoint(name, models_dir)


def pulled_bundle(name: str, models_dir: Path, dvc: bool | None = None) -> Bundle:
    """Return the bundle of that name, every file compared with its hash.

    Raises:
        CheckpointError: As `pulled_checkpoint`, or it is a lone file, or a file of the bundle is damaged.
    """
    path = pulled_checkpoint(name, models_dir, dvc)
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(
            f"{str(path)!r} is not a bundle",
            "this needs the hashes and golden images of a bundle: give its folder or name",
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
    decision: DecisionSettings = DecisionSettings(),  # noqa: B008  # frozen
    server: ServerAddress = ServerAddress(),  # noqa: B008  # frozen
    concurrent_runs: int = 1,
) -> Predictor:
    """Return a predictor over the bundle or file that `bundle.find_checkpoint` found.

    Args:
        path: The bundle or file.
        backend: None: ONNX for a bundle, else by the kind of file; auto: as `backend_selection.fastest_backend`.
        batch_size: Images in one run of the backend.
        trusted: Packages of the user that a checkpoint's network may come from.
        limits: Limits of one file, checked before it is decoded.
        decision: Limits that replace those the model was delivered with.
        server: The server that the backend `triton` calls.
        concurrent_runs: Batches that will run at the same time.

    Raises:
        ConfigError: The backend is unknown or does not fit the file, or the model cannot choose other limits.
        CheckpointError: The file is damaged or lacks metadata.
        ServerError: The server does not answer, or differently from the bundle.
    """
    if backend not in (None, AUTO, *NAMES):
        raise ConfigError(f"there is no backend {backend!r}", f"use one of {', '.join((*NAMES, AUTO))}")
    server.check(backend)
    if (path / INFO_NAME).is_file():
        bundle = read_bundle(path)
        if backend == AUTO:
            name, runner = fastest_backend(bundle, trusted, concurrent_runs)
        else:
            name = backend or "onnx"
            runner = open_backend(bundle, name, trusted, server, concurrent_runs)
        return _with_decision(_of_bundle(bundle, name, runner, batch_size, limits), decision, path)
    predictor = _of_file(path, backend, batch_size, trusted, limits, concurrent_runs)
    return _with_decision(predictor, decision, path)


def _of_file(
    path: Path, backend: str | None, batch_size: int, trusted: Sequence[str], limits: DecodeLimits, concurrent_runs: int
) -> Predictor:
    """Return the predictor of a lone `.ckpt` or `.onnx`, which only one backend can run."""
    only = "checkpoint" if path.suffix == ".ckpt" else "onnx"
    if backend not in (None, AUTO, only):
        raise ConfigError(
            f"the backend {backend!r} cannot run {path.name}", f"leave --backend out, or use --backend {only}"
        )
    runner, metadata = BACKENDS[only].open(path, OpenOptions(_read, trusted, concurrent_runs))
    return replace(_predictor(runner, metadata, batch_size, path, limits), backend_name=only)


def _read(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


def _with_decision(predictor: Predictor, settings: DecisionSettings, path: Path) -> Predictor:
    """Return the predictor with the limits of the settings; the log names a limit that cannot be kept."""
    if settings == DecisionSettings():
        return predictor
    if predictor.decision is None:
        raise ConfigError(
            f"{path.name!r} has no validation results from which decision.* could be chosen",
            "use a bundle of this version",
        )
    decision = predictor.decision.again(settings)
    if decision.note:
        log.warning(decision.note)
    return replace(predictor, decision=decision)


def _of_bundle(bundle: Bundle, backend: str, runner: Backend, batch_size: int, limits: DecodeLimits) -> Predictor:
    """Return the predictor of a bundle, with its detector of unfamiliar images where the bundle has one."""
    predictor = _predictor(runner, vars(bundle.info), batch_size, bundle.directory, limits)
    predictor = replace(predictor, backend_name=backend)
    if DETECTOR not in bundle.info.files or predictor.decision is None or predictor.decision.evidence.ood_scores == ():
        return predictor
    bundle.verify([DETECTOR])
    return replace(predictor, detector=Detector.read(bundle.path(DETECTOR)))


def _predictor(
    runner: Backend, metadata: Mapping[str, Any], batch_size: int, path: Path, limits: DecodeLimits
) -> Predictor:
    if "classes" not in metadata or "preprocess" not in metadata:
        raise CheckpointError(
            f"{str(path)!r} does not contain its classes and preprocessing",
            "use a model exported by this package, or its bundle",
        )
    try:
        preprocess = Preprocess.from_dict(metadata["preprocess"])
        temperature = float(metadata.get("temperature", 1.0))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} describes an invalid preprocessing ({error})", "use a model exported by this package"
        ) from error
    classes = tuple(metadata["classes"])
    decision = Decision.from_dict(metadata["decision"]) if metadata.get("decision") else None
    if isinstance(runner, Shaped):
        runner.check(preprocess.size, len(classes))
    return Predictor(runner, classes, preprocess, temperature, batch_size, limits=limits, decision=decision)
