"""What a run with `model=auto` does, decided by the images and by what weights can be had, as overrides of train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classifier.errors import ConfigError
from image_classifier.manifest import Manifest
from image_classifier.text import counted
from image_classifier.training.config import AUTO, TrainConfig
from image_classifier.training.launch import uses_gpu
from image_classifier.training.transfer.pretrained import Pretrained, network_of_file, network_of_hub

RECIPES = {"quick": "probe", "normal": "finetune", "thorough": "finetune_thorough"}
_FROM_SCRATCH = "from_scratch"
# A pretrained network needs about these pixels; smaller pictures are enlarged to them, or trained from scratch.
_SMALLEST, _TINY = 64, 48
_MIN_PER_CLASS = 50  # with fewer tiny pictures a class even enlarged ones beat a network from scratch
_SCRATCH_SIZES = (24, 64)  # sides at which the network for small images is trained
# Of a training from scratch: the fewest epochs, and how many images it sees, each counted once an epoch.
_SCRATCH = {"quick": (5, 20_000), "normal": (8, 50_000), "thorough": (12, 250_000)}
_MOST_EPOCHS = 60


@dataclass(frozen=True)
class ImageFacts:
    """Number of training images and classes, and the median width and height in pixels."""

    num_train: int
    num_classes: int
    width: int
    height: int

    @classmethod
    def of(cls, manifest: Manifest) -> ImageFacts:
        """Return the facts of a manifest."""
        rows = manifest.indices("train")
        width, height = (int(np.median(sides[rows])) for sides in (manifest.widths, manifest.heights))
        return cls(len(rows), len(manifest.classes), width, height)

    @property
    def side(self) -> int:
        """The shorter median side."""
        return min(self.width, self.height)

    def __str__(self) -> str:
        images = counted(self.num_train, "training image")
        return f"{images} of {counted(self.num_classes, 'class')}, median {self.width} x {self.height} px"


@dataclass(frozen=True)
class Plan:
    """The overrides of a recipe, and three lines that say what was chosen and why."""

    overrides: tuple[str, ...]
    lines: tuple[str, str, str]


def plan(facts: ImageFacts, found: Pretrained | str, effort: str | None, fetching: str) -> Plan:
    """Return what to do with these images.

    Args:
        facts: Of the images.
        found: The pretrained network, or in words why there is none.
        effort: quick, normal or thorough; None: normal.
        fetching: The command that fetches weights, for a run without.
    """
    effort = effort or "normal"
    images = f"images   {facts}"
    if isinstance(found, str):
        why = f"network  from scratch: {found}; expect less of photographs. To fetch weights: {fetching}"
        return _from_scratch(facts, effort, images, why)
    is_tiny = facts.side < _TINY
    # A network that the user named is used, whatever the images are.
    is_free = bool(found.overrides)
    if is_free and is_tiny and facts.num_train >= _MIN_PER_CLASS * facts.num_classes:
        why = (
            f"network  from scratch, without the weights of {found.name}: at {facts.side} px weights of photographs "
            f"help less. To use them: {' '.join(found.overrides)}"
        )
        return _from_scratch(facts, effort, images, why)
    size = [f"data.image_size={_SMALLEST}"] if is_free and is_tiny else []
    at = f" at {_SMALLEST} px" if size else " at the size it was trained with"
    return Plan(
        (f"experiment={RECIPES[effort]}", f"effort={effort}", *found.overrides, *size),
        (
            images,
            f"network  {found.name}, pretrained ({found.origin}){at}",
            f"plan     effort={effort}: {_WORDS[effort]}",
        ),
    )


def find_pretrained(config: TrainConfig) -> Pretrained | str | None:
    """Return the pretrained network that a run is planned around, or in words why there is none.

    None: the run is configured already.

    Raises:
        CheckpointError: The file of weights is missing or damaged.
        ConfigError: `effort` is given for a network without pretrained weights.
    """
    model, effort = config.model, config.run.effort
    is_auto = model.backbone == AUTO
    if not is_auto and (effort is None or config.finetune.probe):
        return None
    if model.bundle:
        return Pretrained((), Path(model.bundle).name, "a bundle")
    if not is_auto:
        backbone = model.backbone or {}
        if not (model.weights or backbone.get("pretrained") or backbone.get("weights")):
            raise ConfigError(
                f"effort={effort} is for pretrained weights, and {model.name} has none",
                "leave effort out, or choose weights: model.weights=FILE",
            )
        return Pretrained((), str(model.name), "as configured")
    if model.weights:
        return network_of_file(model.weights)
    return network_of_hub(uses_gpu(config.trainer.accelerator))


_WORDS = {
    "quick": "logistic regression on its frozen features",
    "normal": "logistic regression on its frozen features, then fine-tuning; the better one on val is delivered",
    "thorough": "logistic regression on its frozen features, then long fine-tuning; the better one on val is delivered",
}


def _from_scratch(facts: ImageFacts, effort: str, images: str, why: str) -> Plan:
    """Return a training of the network for small images: at the images' own size up to 64 px."""
    low, high = _SCRATCH_SIZES
    size = min(high, max(low, 4 * round(facts.side / 4)))
    # Small sets need small batches: an epoch of at least ten steps.
    batch = min(500 if facts.num_train > 20_000 else 250, max(50, 10 * (facts.num_train // 100)))
    fewest, seen = _SCRATCH[effort]
    epochs = min(_MOST_EPOCHS, max(fewest, round(seen / max(1, facts.num_train))))
    overrides = (
        f"experiment={_FROM_SCRATCH}",
        "model.weights=null",  # also where the user offers a file: another network is trained
        f"effort={effort}",
        f"data.image_size={size}",
        f"data.batch_size={batch}",
        # The recipe's rate grows with the batch: its loss is a sum over it.
        f"optimizer.auxiliary_lr={0.052 * batch:g}",
        f"trainer.max_epochs={epochs}",
    )
    return Plan(
        overrides, (images, why, f"plan     effort={effort}: {epochs} epochs at {size} px in batches of {batch}")
    )
