"""The verb `prepare`: images to manifest.csv."""

from __future__ import annotations

from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.run import prepare_dataset
from image_classifier.dataset.settings import DataSettings


def prepare(config: Any) -> None:
    """Find the images of a data set, audit and split them, and write manifest.csv; the log has counts and paths."""
    prepare_dataset(*typed_settings(config))


def typed_settings(config: Any) -> tuple[DataSettings, AuditSettings, tuple[str, ...]]:
    """Return the config groups `data` and `audit`, and the packages that `data.source` may name.

    Raises:
        ConfigError: An unknown key or an invalid value.
    """
    data = hydra_app.typed(DataSettings, config.data, "data").settled()
    audit = hydra_app.typed(AuditSettings, config.audit, "audit")
    return data, audit, tuple(config.get("trusted_packages") or ())
