"""Small trainings in this process that can be cut at any hook and gone on with, to compare bit by bit with one that
never stopped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from torch import nn

from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.manifest import Manifest, Record
from image_classifier.modeling.classifier import build_classifier
from image_classifier.training.augment import BatchAugment, Mix
from image_classifier.training.callbacks.averaging import EMA, SWA
from image_classifier.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.callbacks.exact_resume import ExactResume
from image_classifier.training.callbacks.nan_guard import NanGuard
from image_classifier.training.callbacks.preemption import SignalHandler, StopOnSignal
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.checkpoint_io import SafeCheckpointIO, newest_readable
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.module import ClassifierModule, SchedulerSettings

SIZE, CLASSES, NUM_TRAIN, NUM_VAL, BATCH = 8, 3, 26, 9, 4
BATCHES = NUM_TRAIN // BATCH


@dataclass(frozen=True)
class Options:
    """What a training is made of."""

    epochs: int = 3
    accumulate: int = 1
    average: str = ""  # ema, swa
    scheduler: str = "one_cycle"
    keep: int = 2
    every_n_steps: int | None = None
    every_n_epochs: int | None = 1
    on_nan: str = "stop"
    optimizer: Callable[..., torch.optim.Optimizer] = field(default_factory=lambda: partial(torch.optim.AdamW, lr=0.02))
    trainer: dict[str, Any] = field(default_factory=dict)
    patience: int = 0


def data() -> tuple[Manifest, PixelCache]:
    """Noise with a hint of its class."""
    splits = ["train"] * NUM_TRAIN + ["val"] * NUM_VAL
    records = [
        Record(f"{row:02d}.png", "abc"[row % CLASSES], split, f"{row:016x}", f"{row:064x}", SIZE, SIZE)
        for row, split in enumerate(splits)
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (len(splits), SIZE, SIZE, 3), dtype=np.uint8)
    for row in range(len(splits)):
        pixels[row, :, :, row % CLASSES] |= 0x80
    return Manifest.of(Path("images"), records), PixelCache(pixels, np.arange(len(splits)))


class Cut(Callback):
    """Ends the training at the n-th call of a hook: as a signal does, or (`killed`) as a kill does, at once and with
    nothing saved.
    """

    def __init__(self, hook: str, number: int, signals: SignalHandler, killed: bool) -> None:
        self.left, self.signals, self.killed = number, signals, killed
        setattr(self, hook, self._called)

    def _called(self, *arguments: Any, **named: Any) -> None:
        self.left -= 1
        if self.left == 0:
            if self.killed:
                raise SystemExit(137)
            self.signals.received = 15


@dataclass(frozen=True)
class Result:
    """What a training left: the weights of the newest and of the best checkpoint, the metrics of each epoch, and the
    module itself.
    """

    ended: bool
    last: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    rows: list[dict[str, float]]
    module: ClassifierModule

    def same_as(self, other: Result) -> bool:
        return self.rows == other.rows and same(self.last, other.last) and same(self.best, other.best)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def network() -> nn.Module:
    """Everything that has a state of its own: batch norm, dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )


def schedule(name: str) -> SchedulerSettings:
    if name == "plateau":
        build: Any = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0)
        return SchedulerSettings(build, "epoch", None, "val/loss")
    if name == "exponential":
        return SchedulerSettings(partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.7), "epoch")
    return SchedulerSettings(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.02), "step", "total_steps")


def train(
    folder: Path,
    options: Options,
    cut: tuple[str, int] | None = None,
    killed: bool = False,
    *more: Callback,
    longer: bool = False,
) -> Result:
    """Train from the newest checkpoint in `folder`, or from the beginning, to the end or to where the run is cut."""
    pl.seed_everything(7, verbose=False)
    manifest, cache = data()
    classifier = build_classifier(network(), CLASSES, SIZE, [0.5] * 3, [0.25] * 3, 0.2)
    module = ClassifierModule(
        classifier,
        criterion=nn.CrossEntropyLoss(),
        make_optimizer=options.optimizer,
        scheduler=schedule(options.scheduler),
        classes=manifest.classes,
        blueprint={},
    )
    datamodule = ImageDataModule(
        cache, manifest, BATCH, BatchAugment(mix=Mix()), 3, channels_last=False, balanced=False
    )
    signals, throughput = SignalHandler(), Throughput()
    history = CSVMetrics(folder / "metrics.csv", throughput)
    best = BestCheckpoint(str(folder), "val/loss", "min")
    last = LastCheckpoint(str(folder), options.keep, options.every_n_epochs, options.every_n_steps)
    averaging = {"": [], "ema": [EMA(0.9)], "swa": [SWA(0.4)]}[options.average]
    stopping = [EarlyStopping("val/loss", patience=options.patience, mode="min")] if options.patience else []
    ends = [Cut(*cut, signals, killed)] if cut else []
    first = [ExactResume({}, longer), StopOnSignal(signals), last, best]
    callbacks = [*first, throughput, history, NanGuard(options.on_nan, folder), *stopping, *averaging]
    start = newest_readable(folder)
    trainer = small_trainer(options, folder, [*callbacks, *more, *ends])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two would wait for each other
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
        ended = True
    except SystemExit:
        ended = False
    finally:
        torch.set_num_threads(threads)
    return Result(ended, weights(folder / "last.ckpt"), weights(folder / "best.ckpt"), history.rows, module)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All that learns in a checkpoint: the network, its average, and what the optimizer remembers."""
    if not path.exists():
        return {}
    content = torch.load(path, weights_only=True)
    current = {f"current.{name}": value for name, value in content.get("current_model_state", {}).items()}
    states = content["optimizer_states"][0]["state"]
    remembered = {
        f"{number}.{name}": torch.as_tensor(value) for number, state in states.items() for name, value in state.items()
    }
    return content["state_dict"] | current | remembered


def small_trainer(options: Options, folder: Path, callbacks: list[Callback]) -> pl.Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"),
        False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(
            accelerator="cpu",
            devices=1,
            deterministic=True,
            max_epochs=options.epochs,
            accumulate_grad_batches=options.accumulate,
            callbacks=callbacks,
            plugins=[SafeCheckpointIO()],
            num_sanity_val_steps=0,
            default_root_dir=folder,
            **quiet,
            **options.trainer,
        )
