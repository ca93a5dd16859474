"""The verb `prepare`, and the first step of `train`: from the config group `data` to a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_classifier import settings
from image_classifier.dataset.prepare import DataSettings, prepare
from image_classifier.records import Manifest


def prepare_from(config: Any) -> tuple[Manifest, DataSettings]:
    """Fetch the images that `config.data` describes, split them and write the manifest; says the counts and the path.

    Raises:
        ConfigError: A key of `data` that cannot be.
        DataError: Images that cannot be found or trained on.
    """
    data = settings.typed(DataSettings, config.data, "data")
    source = settings.instantiate(config.data.source, trusted=config.get("trusted_packages") or ())
    return prepare(Path(source()), data), data
