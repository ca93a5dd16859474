"""The verb `show`: a sheet of augmented training images to look at."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.verbs.prepare import typed_settings
from image_classifier.training.show import ShowSettings, show_augmentation


def show(config: DictConfig) -> Path:
    """Write the sheet, and print where it is."""
    settings = hydra_app.selected(ShowSettings, config)
    data, audit, _ = typed_settings(config)
    path = show_augmentation(settings, data, audit, hydra_app.to_plain(config.augment))
    print(f"sheet    {path}")
    return path
