"""A training that takes a fraction of a second: a small network on coloured noise, without files, for tests of what
steps the weights.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from image_classifier.modeling.classifier import build_classifier
from image_classifier.modeling.convnet import ConvNet
from image_classifier.training.callbacks.exact_resume import ExactResume
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.schedules import SchedulerSettings

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
CLASSES, SIZE = 3, 8


def images(number: int, seed: int = 0) -> TensorDataset:
    """Noise whose colour says the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(number) % CLASSES
    colours = torch.eye(CLASSES)[targets].view(number, CLASSES, 1, 1) * 60
    noise = torch.randint(0, 180, (number, 3, SIZE, SIZE), generator=generator)
    return TensorDataset((noise + colours).to(torch.uint8), targets)


def small_module(
    make_optimizer: Any = SGD,
    scheduler: SchedulerSettings = SchedulerSettings(),  # noqa: B008 (frozen)
    norm: bool = True,
    **arguments: Any,
) -> ClassifierModule:
    """The same network each time."""
    torch.manual_seed(0)
    order = ("conv", "norm", "activation", "pool") if norm else ("conv", "activation", "pool")
    backbone = ConvNet(SIZE, (4, 6, 8), order)
    classifier = build_classifier(backbone, CLASSES, SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    names = tuple(str(number) for number in range(CLASSES))
    return ClassifierModule(
        classifier,
        criterion=nn.CrossEntropyLoss(),
        make_optimizer=make_optimizer,
        scheduler=scheduler,
        classes=names,
        blueprint={},
        **arguments,
    )


def fit(
    module: pl.LightningModule,
    folder: Path,
    callbacks: Sequence[pl.Callback] = (),
    batch_size: int = 12,
    num_images: int = 48,
    ckpt_path: Path | None = None,
    **arguments: Any,
) -> pl.Trainer:
    """Train in the images' order; `arguments` are the Trainer's."""
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[ExactResume({}), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_epochs": 3} | arguments),
    )
    datamodule = pl.LightningDataModule()
    datamodule.train_dataloader = lambda: DataLoader(images(num_images), batch_size)  # type: ignore[method-assign]
    datamodule.val_dataloader = lambda: DataLoader(images(24, seed=1), 24)  # type: ignore[method-assign]
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


class SaveAt(pl.Callback):
    """Saves a checkpoint as a run does between two epochs."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


class Rates(pl.Callback):
    """Every learning rate that a step was really made with, and the one a logger would have seen after it."""

    def __init__(self) -> None:
        self.used: list[list[float]] = []
        self.logged: list[float] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.used.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.logged.append(trainer.optimizers[0].param_groups[0]["lr"])


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules agree to the last bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
