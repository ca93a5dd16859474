"""The verb `verify`: whether a bundle's files are those that were sealed, and every backend still gives the golden answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.bundle import Bundle
from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError, ParityError
from image_classifier.inference.backends import (
    BACKENDS,
    EXACT,
    NAMES,
    ServerAddress,
    exported,
    fitting,
    open_backend,
    takes_minutes,
)
from image_classifier.inference.golden import Check, Golden, checked
from image_classifier.inference.load import pulled_bundle
from image_classifier.inference.sealed import FILE, SealedSquares

TOLERANCE = 1e-4
SEALED = "sealed"


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
    def server(self) -> ServerAddress:
        """Where the backend triton asks."""
        return ServerAddress(self.url, self.server_timeout_s)


def verify(config: Any) -> None:
    """Print a line for each check; the first failure ends it.

    Raises:
        CheckpointError: A file is missing or damaged.
        ParityError: A backend answers otherwise.
    """
    asked = hydra_app.typed(VerifySettings, config, "")
    bundle = pulled_bundle(asked.checkpoint_name, Path(asked.models_dir), asked.dvc)
    print(f"hashes    {len(bundle.info.files)} files are as they were sealed")
    for check in verified(
        bundle, [asked.backend] if asked.backend else checkable(bundle), asked.trusted_packages, asked.server
    ):
        difference = f"largest difference of a probability {check.largest_difference:.1e}"
        print(
            f"{check.backend:<9} {check.agreement:.0%} of {check.images} golden images, {difference}, {check.milliseconds:.1f} ms an image"
        )


def verified(
    bundle: Bundle,
    backends: Sequence[str],
    trusted: Sequence[str] = (),
    server: ServerAddress = ServerAddress(),  # noqa: B008  # frozen
) -> list[Check]:
    """Each backend's answers for the golden images; errors as `verify`."""
    golden, checks = Golden.of(bundle), []
    for name in backends:
        backend = SealedSquares(bundle) if name == SEALED else open_backend(bundle, name, trusted, server)
        check, kind = checked(name, backend, golden, bundle.info.temperature), BACKENDS.get(name)
        tolerance = float(bundle.info.exports.get(name, {}).get("tolerance", kind.tolerance if kind else TOLERANCE))
        least = bundle.info.exports.get(name, {}).get("golden_agreement", 1.0)  # of int8, whose contract is another
        if check.fails(tolerance, least):
            fact = f"the backend {name} of {bundle.info.name!r} agrees on {check.agreement:.0%} of {check.images} golden images"
            mend = kind.mend if kind else f"export it again: --to {name}"
            raise ParityError(
                f"{fact} and differs by up to {check.largest_difference:.2g} (allowed {tolerance:g})", mend
            )
        checks.append(check)
    return checks


def checkable(bundle: Bundle) -> list[str]:
    """What `verify` asks unless it is told: the exact backends that are installed, and other forms that the bundle has.

    The golden images are squares: a sealed model takes them as they are only where it crops nothing off.
    """
    known = [
        name
        for name in fitting(bundle)
        if (name in EXACT or exported(bundle, name)) and not takes_minutes(bundle, name)
    ]
    return (
        [*known, SEALED] if FILE in bundle.info.files and bundle.info.preprocess.get("crop_fraction", 1) == 1 else known
    )
