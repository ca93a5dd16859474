"""A sheet of training images and their augmented versions, made by the code that training uses."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from image_classifier.atomic_io import write_bytes
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.run import prepare_dataset
from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ConfigError, DataError
from image_classifier.instantiate import instantiate
from image_classifier.manifest import Manifest
from image_classifier.training.config import Node
from image_classifier.training.datamodule import Batch, ImageDataModule

_CELL, _GAP, _LINE = 128, 12, 15  # pixels: smallest side of a picture, space around it, height of a line of text
_SMALLEST_SHARE = 0.005  # of a mixed image's label; smaller ones are not written


@dataclass(frozen=True)
class ShowSettings:
    """The keys of conf/show.yaml besides the groups."""

    seed: int = 0
    count: int = 8
    versions: int = 8
    output: str | None = None
    plots_dir: str = "plots"
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("count", "versions"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.output is not None and not self.output.lower().endswith(".png"):
            raise ConfigError(f"output={self.output} does not end with .png", "write output=NAME.png")


def show_augmentation(settings: ShowSettings, data: DataSettings, audit: AuditSettings, augment: Node | None) -> Path:
    """Write the sheet, originals at the left and augmented versions beside them with their labels, and return its path.

    Raises:
        DataError: There are no training images.
    """
    manifest, _ = prepare_dataset(data, audit, settings.trusted_packages)
    rows = choose_rows(manifest, settings.count, settings.seed)
    if not len(rows):
        raise DataError("there are no training images to show", "lower data.split.val and data.split.test")
    shown = manifest.take(rows)
    operation = instantiate(augment, key="augment", trusted=settings.trusted_packages) if augment else None
    cache = open_cache(shown, data.preprocess, data.cache, data.limits)  # decodes no other images
    datamodule = ImageDataModule(
        cache, shown, data.batch_size, operation, settings.seed, channels_last=False, balanced=False
    )
    original = datamodule.batches[np.arange(len(shown))]
    batches = [original, *(datamodule.augmented(original, step) for step in range(1, settings.versions + 1))]
    path = _path(settings, data.name or manifest.root.resolve().name, augment or {}, operation)
    write_bytes(path, draw_sheet(batches, shown.classes))
    return path


def _path(settings: ShowSettings, data_name: str, augment: Node, operation: object) -> Path:
    name = f"{data_name}-{augment.get('name') or type(operation).__name__}".replace("/", "_")
    return Path(settings.output or Path(settings.plots_dir) / "show" / f"{name}.png")


def choose_rows(manifest: Manifest, count: int, seed: int) -> np.ndarray:
    """Return up to `count` training rows, int64, of as many classes as there are, decided by `seed`."""
    # Shuffle the rows, then sort them by class.
    rows = np.random.default_rng(seed).permutation(manifest.indices("train"))
    order = np.argsort(manifest.targets[rows], kind="stable")
    rows = rows[order]
    targets = manifest.targets[rows]
    # Take the first of each class, in a random order of the classes, then the second of each, and so on.
    turn = np.arange(len(rows)) - np.searchsorted(targets, targets)
    class_order = np.random.default_rng(seed).permutation(manifest.targets.max() + 1)
    chosen = rows[np.lexsort((class_order[targets], turn))[:count]]
    return np.asarray(chosen[np.argsort(manifest.targets[chosen], kind="stable")])


def draw_sheet(batches: list[Batch], classes: tuple[str, ...]) -> bytes:
    """Return a PNG with one column per batch and one row per image; the first column shows originals and classes."""
    scale = max(1, -(-_CELL // batches[0][0].shape[2]))  # whole pixels: one sees what the network sees
    side = scale * batches[0][0].shape[2]
    is_mixed = any(targets.is_floating_point() for _, targets in batches)
    height = side + (3 if is_mixed else 1) * _LINE + _GAP
    sheet = Image.new("RGB", (_GAP + len(batches) * (side + _GAP) + _GAP, _GAP + len(batches[0][0]) * height), "white")
    for column, (pixels, targets) in enumerate(batches):
        left = _GAP + column * (side + _GAP) + (_GAP if column else 0)
        for row, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            top = _GAP + row * height
            lines = labels(targets[row], classes) if column == 0 or targets.is_floating_point() else []
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (left, top))
            _write(sheet, (left, top + side), lines, side)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def labels(target: torch.Tensor, classes: tuple[str, ...]) -> list[str]:
    """Return a class's name, or the names of the two largest shares in per cent.

    >>> labels(torch.tensor(1), ("cat", "dog")), labels(torch.tensor([0.3, 0.7]), ("cat", "dog"))
    (['dog'], ['70% dog', '30% cat'])
    """
    if not target.is_floating_point():
        return [classes[int(target)]]
    shares, codes = target.topk(min(2, len(classes)))
    named = zip(shares.tolist(), codes.tolist(), strict=True)
    return [
        f"{share:.0%} {classes[code]}" if share < 1 - _SMALLEST_SHARE else classes[code]
        for share, code in named
        if share > _SMALLEST_SHARE
    ]


def _write(sheet: Image.Image, corner: tuple[int, int], lines: list[str], width: int) -> None:
    font = ImageFont.truetype(findfont("DejaVu Sans"), 11)  # ships with matplotlib; Latin, Greek and Cyrillic
    for number, line in enumerate(lines):
        text = " ".join(line.encode("utf-8", "replace").decode("utf-8").split())
        if font.getlength(text) > width:
            kept = next(kept for kept in range(len(text), -1, -1) if font.getlength(text[:kept] + "…") <= width)
            text = text[:kept] + "…"
        ImageDraw.Draw(sheet).text((corner[0], corner[1] + 1 + number * _LINE), text, fill="#222222", font=font)
