"""The fit itself, with errors of Lightning and torch that a wrong setting causes as one line."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from image_classifier.errors import ConfigError
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.module import ClassifierModule


def fit(trainer: pl.Trainer, module: ClassifierModule, datamodule: ImageDataModule, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the start.

    Raises:
        ConfigError: A wrong setting that shows only while training.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise _explained(error, trainer) from error
    if trainer.interrupted:
        raise KeyboardInterrupt


def _explained(error: Exception, trainer: pl.Trainer) -> Exception:
    """Return a ConfigError for a wrong setting; anything else is a bug and stays as it is."""
    text = str(error)
    if "conditioned on metric" in text and "val/loss" not in trainer.callback_metrics:
        return ConfigError(
            "the run ended before its first validation",
            "let it train a whole epoch, or set callbacks.early_stopping=null",
        )
    if isinstance(error, MisconfigurationException) or "conditioned on metric" in text:
        return ConfigError(text)
    if isinstance(error, torch.OutOfMemoryError):
        return ConfigError(
            "the memory of the GPU is full", "lower data.batch_size, or let it be found with data.batch_size=auto"
        )
    if "does not have a deterministic implementation" in text:
        return ConfigError(text.partition(".")[0], "set trainer.deterministic=warn, or choose another network")
    if "Expected more than 1 value per channel" in text:
        return ConfigError(
            "batch normalisation needs more than one value a channel", "raise data.batch_size or data.image_size"
        )
    return error
