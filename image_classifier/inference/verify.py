"""Verification of a bundle: each backend must answer its golden images as the checkpoint did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from image_classifier.bundle import Bundle
from image_classifier.errors import ConfigError, ParityError
from image_classifier.inference.backends import (
    BACKENDS,
    EXACT,
    NAMES,
    ServerAddress,
    fitting,
    is_exported,
    open_backend,
    takes_minutes,
)
from image_classifier.inference.golden import Check, Golden, check_golden
from image_classifier.inference.model_reference import ModelReference
from image_classifier.inference.sealed import FILE, SealedSquares

TOLERANCE = 1e-4
SEALED = "sealed"


@dataclass(frozen=True, kw_only=True)
class VerifySettings(ModelReference):
    """The keys of conf/verify.yaml."""

    def __post_init__(self) -> None:
        if self.backend not in (None, *NAMES):
            raise ConfigError(f"there is no backend {self.backend!r}", f"use one of {', '.join(NAMES)}")
        super().__post_init__()


def verify_backend(
    bundle: Bundle,
    name: str,
    trusted: Sequence[str] = (),
    server: ServerAddress = ServerAddress(),  # noqa: B008  # frozen
) -> Check:
    """Return what one backend answers for the golden images.

    Raises:
        CheckpointError: A file is missing or damaged.
        ParityError: The answers differ from the checkpoint's by more than is allowed.
        ServerError: The server of the backend `triton` does not answer.
    """
    backend = SealedSquares(bundle) if name == SEALED else open_backend(bundle, name, trusted, server)
    check = check_golden(name, backend, Golden.of(bundle), bundle.info.temperature)
    spec = BACKENDS.get(name)
    export = bundle.info.exports.get(name, {})
    tolerance = float(export.get("tolerance", spec.tolerance if spec else TOLERANCE))
    min_agreement = export.get("golden_agreement", 1.0)  # below 1 for int8, which promises an accuracy instead
    if check.fails(tolerance, min_agreement):
        raise ParityError(
            f"the backend {name} of {bundle.info.name!r} gives {check.agreement:.0%} of {check.images} golden images "
            f"the right class, and probabilities differ by up to {check.largest_difference:.2g} "
            f"(allowed {tolerance:g})",
            spec.remedy if spec else f"export it again: --to {name}",
        )
    return check


def checkable(bundle: Bundle) -> list[str]:
    """Return the backends that `verify` checks by default: the exact ones that are installed, and exported forms.

    A sealed model is among them where it crops nothing off, as golden images are squares.
    """
    names = [
        name
        for name in fitting(bundle)
        if (name in EXACT or is_exported(bundle, name)) and not takes_minutes(bundle, name)
    ]
    is_uncropped = bundle.info.preprocess.get("crop_fraction", 1) == 1
    return [*names, SEALED] if FILE in bundle.info.files and is_uncropped else names
