"""Distillation: a network learns from the answers of a larger one, its teacher, besides the labels.

Source: Hinton et al. (2015). Teacher and student see the same augmented images, as in Beyer et al. (2022).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from image_classifier.bundle import INFO_NAME, read_bundle
from image_classifier.dataset.train_overlap import exact_duplicates_of_train
from image_classifier.dataset.unlabelled import absolute_paths
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.checkpoint import load_classifier
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.losses import distillation_loss
from image_classifier.text import listed
from image_classifier.training.config import ModelConfig
from image_classifier.training.distributed import world_size
from image_classifier.training.hardware import Hardware

log = logging.getLogger(__name__)

_CHECKPOINT = "model.ckpt"


@dataclass(frozen=True)
class TeacherBundle:
    """The bundle of a teacher: `sha256` is that of its model.ckpt, `accuracy` (0 to 1) that on its `split`."""

    name: str
    directory: Path
    classes: tuple[str, ...]
    sha256: str
    split: str
    accuracy: float | None

    def check(self, manifest: Manifest) -> None:
        """Check that the teacher has the classes of the data; log a warning where it has seen images of val or test.

        Raises:
            ConfigError: It has other classes.
        """
        mine, theirs = set(manifest.classes), set(self.classes)
        if mine != theirs:
            parts = (("it lacks", mine - theirs), ("only it has", theirs - mine))
            facts = [f"{words} {listed(sorted(map(repr, names)))}" for words, names in parts if names]
            raise ConfigError(
                f"the teacher {self.name!r} has other classes than the data: {'; '.join(facts)}",
                "give a teacher that was trained on the same classes",
            )
        path = self.directory / "manifest.csv"
        if not path.is_file():
            return
        known = Manifest.read(path, Path())
        for split in ("val", "test"):
            part = manifest.part(split)
            seen = int(exact_duplicates_of_train(part, known).sum())
            if seen:
                said = "%d of %d %s images are copies of training images of the teacher: their scores are too good"
                log.warning(said, seen, len(part), split)


@dataclass(frozen=True)
class Distillation:
    """What a run learns from besides its labels: a teacher, and images without labels, or None."""

    teacher: TeacherBundle
    unlabelled: Manifest | None = None

    @property
    def paths(self) -> Sequence[str]:
        """The paths of the unlabelled images."""
        return absolute_paths(self.unlabelled) if self.unlabelled else ()

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What cannot change when a run is resumed, by the key that gives it."""
        teacher = {"model.teacher": self.teacher.sha256}
        if not self.unlabelled:
            return teacher
        # How many images of a batch are unlabelled depends on the number of processes.
        return {**teacher, "model.unlabelled": self.unlabelled.sha256, "trainer.devices": str(world_size())}

    @property
    def provenance(self) -> dict[str, Any]:
        """What bundle.json says of the teacher."""
        teacher = self.teacher
        images = {"unlabelled_images": len(self.unlabelled)} if self.unlabelled else {}
        facts = {"name": teacher.name, "sha256": teacher.sha256, "split": teacher.split, "accuracy": teacher.accuracy}
        return {**facts, **images}


class Teacher:
    """A trained classifier whose answers are learned; neither a module nor part of a checkpoint."""

    def __init__(
        self, classifier: Classifier, image_size: int, order: Sequence[int], weight: float, temperature: float
    ) -> None:
        """Set up the teacher.

        Args:
            classifier: The teacher's network.
            image_size: What it was trained at, pixels.
            order: The place of each of the student's classes among those of the teacher.
            weight: Share of the teacher's loss, above 0 to 1.
            temperature: Softens the probabilities of both.
        """
        self.classifier = classifier.eval().requires_grad_(False)
        self.image_size = image_size
        self.order = torch.tensor(order)
        self.weight = weight
        self.temperature = temperature

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # averaged copies of a module share their teacher

    def joined(self, label_loss: torch.Tensor, logits: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Return (1 - weight) x the loss of the labels + weight x that of the teacher on all images, a scalar.

        Args:
            label_loss: The loss of the images that have labels.
            logits: The student's, [N, C].
            pixels: What the student saw, uint8 [N, 3, H, W].
        """
        taught = distillation_loss(logits, self.logits(pixels), self.temperature)
        return (1 - self.weight) * label_loss + self.weight * taught

    @torch.no_grad()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits for the student's classes, float32 [N, C]; one view an image, also with tta."""
        classifier = self.classifier.to(pixels.device)
        if pixels.shape[2:] != (self.image_size, self.image_size):
            pixels = functional.interpolate(pixels.float(), self.image_size, mode="bilinear", antialias=True)
        self.order = self.order.to(pixels.device)
        return classifier.classify(classifier.embed(pixels))[:, self.order]


def find_teacher(model: ModelConfig) -> TeacherBundle | None:
    """Return the bundle that `model.teacher` names, its checkpoint compared with its hash; None without a teacher.

    Raises:
        CheckpointError: There is no such bundle, or it is damaged.
    """
    if not model.teacher:
        return None
    path = pulled_checkpoint(model.teacher, Path(model.models_dir))
    if not (path / INFO_NAME).is_file():
        raise CheckpointError(f"the teacher {str(path)!r} is not a bundle", "give the name or folder of one")
    bundle = read_bundle(path)
    bundle.verify([_CHECKPOINT])
    info = bundle.info
    split = "test" if "test" in info.metrics else "val"
    accuracy = info.metrics.get(split, {}).get("accuracy")
    shown = "unknown" if accuracy is None else f"{accuracy:.4f}"
    log.info(
        "teacher: %s, %s accuracy %s, %g of the loss at temperature %g",
        path,
        split,
        shown,
        model.teacher_weight,
        model.teacher_temperature,
    )
    return TeacherBundle(info.name, path, info.classes, info.files[_CHECKPOINT], split, accuracy)


def build_teacher(
    distillation: Distillation | None,
    model: ModelConfig,
    criterion: nn.Module,
    classes: Sequence[str],
    hardware: Hardware,
) -> Teacher | None:
    """Return the teacher of a run whose loss of labels is `criterion`; None without one.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The loss trains the network by its embeddings alone, so that no logits would teach it.
    """
    if distillation is None:
        return None
    if getattr(criterion, "head_apart", False):
        raise ConfigError(
            "model.teacher teaches by the logits, and this loss trains only the head by them",
            "use loss=cross_entropy, or loss=cross_entropy_supcon",
        )
    return load_teacher(distillation.teacher, model, classes, hardware.channels_last)


def load_teacher(bundle: TeacherBundle, model: ModelConfig, classes: Sequence[str], channels_last: bool) -> Teacher:
    """Return the teacher of a bundle for a student of these classes; random states stay as they are.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    with torch.random.fork_rng(devices=[]):  # a network draws its first weights before it is given others
        classifier, blueprint = load_classifier(bundle.directory / _CHECKPOINT, model.trusted_packages)
    if channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)
    order = [list(blueprint["classes"]).index(label) for label in classes]
    return Teacher(classifier, blueprint["preprocess"]["size"], order, model.teacher_weight, model.teacher_temperature)
