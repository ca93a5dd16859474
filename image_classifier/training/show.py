"""The verb `show`: a sheet of training images and what the augmentation makes of them, by training's own path."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from image_classifier.atomic_io import write_bytes
from image_classifier.cli import hydra_app
from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.run import prepare_from
from image_classifier.errors import ConfigError, DataError
from image_classifier.manifest import Manifest
from image_classifier.training.builders import build_datamodule
from image_classifier.training.datamodule import Batch
from image_classifier.training.hardware import Hardware

_CELL, _GAP, _LINE = 128, 12, 15  # pixels: least side of a picture, space around it, height of a line of text
_SPOKEN = 0.005  # shares below this are not written


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
            raise ConfigError(f"the sheet is a PNG, and output={self.output} does not end so", "write output=NAME.png")


def show(config: Any) -> Path:
    """Write the sheet and say where it is: originals at the left, augmented versions beside them, with their labels."""
    asked = hydra_app.typed(ShowSettings, hydra_app.only(config, *ShowSettings.__dataclass_fields__), "")
    whole, data = prepare_from(config)
    rows = choose_rows(whole, asked.count, asked.seed)
    if not len(rows):
        raise DataError("there are no training images to show", "lower data.split.val and data.split.test")
    manifest = whole.take(rows)
    cache = open_cache(manifest, data.preprocess, data.cache, data.limits)  # decodes no others
    datamodule = build_datamodule(config, manifest, data, cache, Hardware("32-true", channels_last=False))
    original = datamodule.batches[np.arange(len(manifest))]
    batches = [original, *(datamodule.augmented(original, step) for step in range(1, asked.versions + 1))]
    place = whole.root.resolve().name if data.name is None else data.name
    name = f"{place}-{config.augment.get('name') or type(datamodule.augment).__name__}".replace("/", "_")
    path = Path(asked.output or Path(asked.plots_dir) / "show" / f"{name}.png")
    write_bytes(path, draw_sheet(batches, manifest.classes))
    print(f"sheet    {path}")
    return path


def choose_rows(manifest: Manifest, count: int, seed: int) -> np.ndarray:
    """Up to `count` rows of the train part, int64, of as many classes as there are, decided by `seed`."""
    rows = np.random.default_rng(seed).permutation(manifest.indices("train"))
    order = np.argsort(manifest.targets[rows], kind="stable")
    targets = manifest.targets[rows][order]
    turn = np.arange(len(rows)) - np.searchsorted(targets, targets)  # which of its class a row is
    chosen = rows[order][
        np.lexsort((np.random.default_rng(seed).permutation(manifest.targets.max() + 1)[targets], turn))[:count]
    ]
    return np.asarray(chosen[np.argsort(manifest.targets[chosen], kind="stable")])


def draw_sheet(batches: list[Batch], classes: tuple[str, ...]) -> bytes:
    """A PNG with one column a batch and one row an image; the first column is the originals, whose class is every row's heading."""
    scale = max(1, -(-_CELL // batches[0][0].shape[2]))  # whole pixels: what is seen is what is learnt
    side = scale * batches[0][0].shape[2]
    mixed = any(targets.is_floating_point() for _, targets in batches)
    height = side + (3 if mixed else 1) * _LINE + _GAP
    sheet = Image.new("RGB", (_GAP + len(batches) * (side + _GAP) + _GAP, _GAP + len(batches[0][0]) * height), "white")
    for column, (pixels, targets) in enumerate(batches):
        for row, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            place = (_GAP + column * (side + _GAP) + (_GAP if column else 0), _GAP + row * height)
            lines = labels(targets[row], classes) if column == 0 or targets.is_floating_point() else []
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), place)
            _write(sheet, (place[0], place[1] + side), lines, side)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def labels(target: torch.Tensor, classes: tuple[str, ...]) -> list[str]:
    """A class's name, or the names of the two greatest shares in per cent."""
    if not target.is_floating_point():
        return [classes[int(target)]]
    shares, codes = target.topk(min(2, len(classes)))
    named = zip(shares.tolist(), codes.tolist(), strict=True)
    return [
        f"{share:.0%} {classes[code]}" if share < 1 - _SPOKEN else classes[code]
        for share, code in named
        if share > _SPOKEN
    ]


def _write(sheet: Image.Image, place: tuple[int, int], lines: list[str], width: int) -> None:
    font = ImageFont.truetype(findfont("DejaVu Sans"), 11)  # ships with matplotlib; Latin, Greek and Cyrillic
    for number, line in enumerate(lines):
        text = " ".join(line.encode("utf-8", "replace").decode("utf-8").split())
        if font.getlength(text) > width:
            kept = next(kept for kept in range(len(text), -1, -1) if font.getlength(text[:kept] + "…") <= width)
            text = text[:kept] + "…"
        ImageDraw.Draw(sheet).text((place[0], place[1] + 1 + number * _LINE), text, fill="#222222", font=font)
