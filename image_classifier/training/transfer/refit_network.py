"""The delivered network, trained on for a few epochs of train and val together."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

from image_classifier.text import counted
from image_classifier.training.builders import TrainingInputs, build_datamodule, build_trainer
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.fit import fit
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.schedules import SchedulerSettings
from image_classifier.training.transfer.activations import (
    ActivationLoader,
    KeptActivations,
    refit_epochs,
    with_val_views,
)

log = logging.getLogger(__name__)

_RATE = 0.5  # of the peak rate, at the start; it falls to 0


def refit_network(
    module: ClassifierModule,
    inputs: TrainingInputs,
    kept: KeptActivations | None,
    epochs: int,
    directory: Path,
) -> int:
    """Train the module's classifier on for half of its epochs, on train and val; return how many these are.

    Args:
        module: The training; its classifier has the weights to go on from.
        inputs: What the training is built from.
        kept: Activations below the trained layers; None: all is computed from pixels.
        epochs: That the network was trained for.
        directory: Of the run.
    """
    more = refit_epochs(epochs)
    device = module.classifier.scale.device
    both = inputs.manifest.moved("val", "train")
    fixed: dict[str, object] = {
        "callbacks": {},
        "logger": None,
        "trainer.max_time": None,
        "trainer.max_steps": -1,
        "trainer.max_epochs": more,
        "trainer.check_val_every_n_epoch": 1,
    }
    config = inputs.config.with_values(fixed)
    datamodule = build_datamodule(replace(inputs, config=config, manifest=both))
    if kept:
        known = with_val_views(kept, inputs, datamodule, directory, min(more, len(kept.train)))
        datamodule.replaced = lambda loader: ActivationLoader(known, loader)
    falling = partial(torch.optim.lr_scheduler.LinearLR, start_factor=_RATE, end_factor=0.0)
    module.scheduler = SchedulerSettings(falling, interval="step", length="total_iters")
    pl.seed_everything(config.run.seed, workers=True, verbose=False)  # the same after a resumed run
    trainer = build_trainer(config, inputs.hardware, Throughput())
    trainer.limit_val_batches = 0
    module.train()
    fit(trainer, module, datamodule, None)
    module.classifier.eval().float().to(device)
    rows = len(both.indices("train"))
    log.info("refit: %s on train and val together, %d images", counted(more, "more epoch"), rows)
    return more
