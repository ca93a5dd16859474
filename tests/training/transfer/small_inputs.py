"""What a small fine-tuning is made from: images of coloured noise in memory, and a network with two blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from image_classifier.cli.train_config import compose_train_config
from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.manifest import Manifest, Record
from image_classifier.modeling.classifier import build_classifier
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.hardware import Hardware
from image_classifier.training.module import ClassifierModule, SchedulerSettings

SIZE, CLASSES = 16, 3


def small_inputs(
    folder: Path, *overrides: str, num_train: int = 37, num_val: int = 12, hint: int = 100
) -> TrainingInputs:
    """Noise to which `hint` grey levels are added in the channel of the class; caches are in `folder`."""
    splits = ["train"] * num_train + ["val"] * num_val
    records = [
        Record(f"{row:02d}.png", "abc"[row % CLASSES], split, f"{row:016x}", f"{row:064x}", SIZE, SIZE)
        for row, split in enumerate(splits)
    ]
    pixels = np.random.default_rng(0).integers(0, 256 - hint, (len(splits), SIZE, SIZE, 3), dtype=np.uint8)
    for row in range(len(splits)):
        pixels[row, :, :, row % CLASSES] += hint
    line = ("experiment=finetune", f"data.cache.dir={folder / 'cache'}", f"data.image_size={SIZE}", "data.batch_size=8")
    config = compose_train_config([*line, *overrides])
    manifest = Manifest.of(folder, records)
    return TrainingInputs(config, manifest, PixelCache(pixels, np.arange(len(splits))), Hardware("32-true", False))


def small_backbone() -> nn.Module:
    """Two blocks with all that has a state of its own; batch statistics are not those of a new network."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return backbone


def small_module(inputs: TrainingInputs) -> ClassifierModule:
    """A classifier on that backbone."""
    classifier = build_classifier(small_backbone(), CLASSES, SIZE, [0.5] * 3, [0.25] * 3, 0.1)
    return ClassifierModule(
        classifier,
        criterion=nn.CrossEntropyLoss(),
        make_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05),
        scheduler=SchedulerSettings(),
        classes=inputs.manifest.classes,
        blueprint={},
    )
