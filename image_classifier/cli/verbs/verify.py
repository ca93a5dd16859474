"""The verb `verify`: the hashes of a bundle's files, then the golden images on each backend."""

from __future__ import annotations

from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.inference.verify import VerifySettings, checkable, verify_backend


def verify(config: Any) -> None:
    """Print a line for each check; the first failure ends it.

    Raises:
        CheckpointError: A file is missing or damaged.
        ParityError: A backend answers differently from the checkpoint.
    """
    settings = hydra_app.typed(VerifySettings, config, "")
    bundle = settings.bundle()
    print(f"hashes    all {len(bundle.info.files)} files are unchanged")
    for name in [settings.backend] if settings.backend else checkable(bundle):
        check = verify_backend(bundle, name, settings.trusted_packages, settings.server)
        print(
            f"{name:<9} {check.agreement:.0%} of {check.images} golden images have the right class, "
            f"probabilities differ by at most {check.largest_difference:.1e}, {check.milliseconds:.1f} ms an image"
        )
