"""The verb `verify`: whether a bundle's files are those that were sealed, and every backend still gives the golden answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier import settings
from image_classifier.bundle import INFO_NAME, Bundle, read_bundle
from image_classifier.errors import CheckpointError, ConfigError, ParityError
from image_classifier.inference.backends import EXACT, NAMES, ServerAt, fitting, open_backend
from image_classifier.inference.golden import Golden
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.inference.predictor import Backend
from image_classifier.predictions import softmax

TOLERANCE = 1e-4


@dataclass(frozen=True)
class VerifySettings:
    """The keys of conf/verify.yaml."""

    checkpoint_name: str
    backend: str | None = None
    url: str | None = None
    server_timeout_s: float = 60.0
    models_dir: str = "models"
    dvc: bool | None = None
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.backend not in (None, *NAMES):
            raise ConfigError(f"there is no backend {self.backend!r}", f"use one of {', '.join(NAMES)}")
        self.server.fits(self.backend)

    @property
    def server(self) -> ServerAt:
        """Where the backend triton asks."""
        return ServerAt(self.url, self.server_timeout_s)


@dataclass(frozen=True)
class Check:
    """What one backend answers for the golden images: share of equal classes, largest difference of a probability, milliseconds an image."""

    backend: str
    images: int
    agreement: float
    largest_difference: float
    milliseconds: float

    def fails(self, tolerance: float) -> bool:
        """Whether an image gets another class, or a probability differs by more than `tolerance`."""
        return self.agreement < 1 or not self.largest_difference <= tolerance


def verify(config: Any) -> None:
    """Print a line for each check; the first failure ends it.

    Raises:
        CheckpointError: A file is missing or damaged.
        ParityError: A backend answers otherwise.
    """
    asked = settings.typed(VerifySettings, config, "")
    path = pulled_checkpoint(asked.checkpoint_name, Path(asked.models_dir), asked.dvc)
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(f"{str(path)!r} is not a bundle", "only a bundle says which hashes and answers are right")
    bundle = read_bundle(path)
    bundle.verify()
    print(f"hashes    {len(bundle.info.files)} files are as they were sealed")
    known = [name for name in fitting(bundle) if name in EXACT or bundle.info.exports.get(name, {}).get("files")]
    for check in verified(bundle, [asked.backend] if asked.backend else known, asked.trusted_packages, asked.server):
        difference = f"largest difference of a probability {check.largest_difference:.1e}"
        print(f"{check.backend:<9} {check.agreement:.0%} of {check.images} golden images, {difference}, {check.milliseconds:.1f} ms an image")


def verified(
    bundle: Bundle,
    backends: Sequence[str],
    trusted: Sequence[str] = (),
    server: ServerAt = ServerAt(),  # noqa: B008  # frozen
) -> list[Check]:
    """Each backend's answers for the golden images; errors as `verify`."""
    golden, checks = Golden.of(bundle), []
    for name in backends:
        check = checked(name, open_backend(bundle, name, trusted, server), golden, bundle.info.temperature)
        tolerance = float(bundle.info.exports.get(name, {}).get("tolerance", TOLERANCE))
        if check.fails(tolerance):
            fact = f"the backend {name} of {bundle.info.name!r} agrees on {check.agreement:.0%} of {check.images} golden images"
            raise ParityError(f"{fact} and differs by up to {check.largest_difference:.2g} (allowed {tolerance:g})", f"export it again: --to {name}")
        checks.append(check)
    return checks


def checked(name: str, backend: Backend, golden: Golden, temperature: float) -> Check:
    """What a backend answers for the golden images, and how fast, once warm."""
    actual = backend.logits(golden.pixels)
    start = time.perf_counter()
    backend.logits(golden.pixels)
    seconds = (time.perf_counter() - start) / len(golden.pixels)
    if actual.shape != golden.logits.shape:
        return Check(name, len(golden.pixels), 0.0, float("inf"), 1000 * seconds)
    difference = np.abs(softmax(actual, temperature) - softmax(golden.logits, temperature)).max()
    agreement = float((actual.argmax(axis=1) == golden.logits.argmax(axis=1)).mean())
    return Check(name, len(golden.pixels), agreement, float(difference) if np.isfinite(difference) else float("inf"), 1000 * seconds)
