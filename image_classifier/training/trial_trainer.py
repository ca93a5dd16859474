"""Short trainings of throw-away networks, by which a run finds numbers before it begins."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from image_classifier.training.builders import TrainingInputs, build_datamodule, build_module, build_trainer
from image_classifier.training.callbacks.exact_resume import random_state, set_random_state
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.config import AUTO, TrainConfig
from image_classifier.training.hardware import Hardware
from image_classifier.training.launch import uses_gpu
from image_classifier.training.transfer.activations import KeptActivations, for_network, train_above_cut

_RATE = 1e-4  # where none is found yet; any will do, since such a trial measures time and memory
UNSCHEDULED = {"scheduler.build": None, "scheduler.warmup": 0.0}

Values = Mapping[str, Any]  # of the configuration, by dotted key


@dataclass(frozen=True)
class TrialTrainer:
    """Trains throw-away networks on everything that the run itself will be made of.

    Attributes:
        inputs: Of the run.
        kept: Activations to train the upper layers from, as the run will; None: all layers, from pixels.
    """

    inputs: TrainingInputs
    kept: KeptActivations | None = None

    @property
    def config(self) -> TrainConfig:
        """The configuration of the run."""
        return self.inputs.config

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.inputs.manifest.indices("train"))

    @property
    def on_gpu(self) -> bool:
        """Whether steps run on a GPU, whose memory counts then."""
        return uses_gpu(self.config.trainer.accelerator)

    def fit(self, values: Values, *callbacks: pl.Callback, hardware: Hardware | None = None) -> None:
        """Train a fresh network with these values in the configuration, and forget it."""
        is_auto = self.config.optimizer.lr == AUTO  # it is found after what this trial finds
        fixed: Values = {
            **({"optimizer.lr": _RATE} if is_auto else {}),
            "callbacks": {},
            "logger": None,
            "trainer.max_time": None,
            "trainer.check_val_every_n_epoch": 1,
        }
        config = self.config.with_values({**fixed, **values})
        inputs = replace(self.inputs, config=config, hardware=hardware or self.inputs.hardware)
        with without_trace():
            self._train(inputs, callbacks)

    def _train(self, inputs: TrainingInputs, callbacks: Sequence[pl.Callback]) -> None:
        """Train; in a method of its own, so that the network is gone before memory is counted again."""
        datamodule = build_datamodule(inputs)
        module = build_module(inputs)
        if self.kept:
            train_above_cut(for_network(self.kept, module.classifier), module, datamodule)
        trainer = build_trainer(inputs.config, inputs.hardware, Throughput(), *callbacks)
        try:
            trainer.fit(module, datamodule=datamodule)
        except SIGTERMException:
            raise SystemExit(143) from None
        if trainer.interrupted:
            raise KeyboardInterrupt


@contextmanager
def without_trace() -> Iterator[None]:
    """Put every random state back at the end of the block, and log only warnings in it."""
    logger = logging.getLogger("image_classifier")
    level, state = logger.level, random_state()
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        set_random_state(state)
        logger.setLevel(level)
        gc.collect()
        torch.cuda.empty_cache()
