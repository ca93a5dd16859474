"""The images of a report: those behind the cells of the confusion matrix, and the worst mistakes with what explains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.evaluation.plots.heat_map import explanation_name
from image_classifier.evaluation.report.confusions import images_of_cells
from image_classifier.html.text import plain
from image_classifier.html.thumbnails import BUDGET, NO_PICTURE, Thumbnail, thumbnail
from image_classifier.images import DecodeLimits
from image_classifier.predictions import PredictionTable, softmax

_CELL_IMAGES, _EACH = 1000, 24  # behind all cells, behind one
_CELL_SIDE, _CELL_QUALITY = 96, 65
_WORST, _EXPLANATION_SIDE = 24, 480
_MARKUP = 120  # characters of JSON around one image
_WORKERS = 4


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: what it shows, what it was taken for and how surely, how probable the truth was held, and what explains the answer."""

    path: str
    truth: str
    answer: str
    confidence: float
    truth_probability: float
    picture: Thumbnail
    explanation: Thumbnail


def cell_images(
    table: PredictionTable, confidence: np.ndarray, root: Path | None, limits: DecodeLimits
) -> dict[str, Any]:
    """What the page's script shows behind a cell, ready for JSON: `cells` "truth,predicted" -> numbers of `images`; `confidence` is [N]."""
    chosen = images_of_cells(table, confidence, _CELL_IMAGES if root else _CELL_IMAGES // 4, _EACH)
    rows = [row for found in chosen.values() for row in found]
    places = {row: place for place, row in enumerate(rows)}
    pictures = _drawn([table.paths[row] for row in rows], root, limits, _CELL_SIDE, _CELL_QUALITY, BUDGET * 5 // 7)
    images = [
        {
            "path": plain(table.paths[row]),
            "sure": round(float(confidence[row]), 3),
            "picture": picture.address,
            "small": picture.small,
        }
        for row, picture in zip(rows, pictures, strict=True)
    ]
    cells = {f"{truth},{predicted}": [places[row] for row in found] for (truth, predicted), found in chosen.items()}
    return {"classes": [plain(label) for label in table.classes], "cells": cells, "images": images}


def _drawn(
    paths: Sequence[str], root: Path | None, limits: DecodeLimits, side: int, quality: int, room: int
) -> list[Thumbnail]:
    """The pictures of these files, as many as there is room for (characters)."""
    if root is None:
        return [NO_PICTURE] * len(paths)
    with ThreadPoolExecutor(_WORKERS) as pool:
        pictures = list(
            pool.map(partial(thumbnail, limits=limits, side=side, quality=quality), [root / path for path in paths])
        )
    spent = np.cumsum(
        [len(picture.address) + len(path) + _MARKUP for path, picture in zip(paths, pictures, strict=True)]
    )
    return [picture if total <= room else NO_PICTURE for picture, total in zip(pictures, spent.tolist(), strict=True)]


def worst(
    table: PredictionTable, root: Path | None, limits: DecodeLimits, explanations: Path, roots: Sequence[Path]
) -> list[Mistake]:
    """The surest wrong answers; the folder `explanations` has figures of what lies, or lay when it was explained, in one of the `roots`."""
    predicted, confidence = table.answers()
    rows = table.surest_mistakes(_WORST).tolist()
    pictures = _drawn([table.paths[row] for row in rows], root, limits, 160, 75, BUDGET // 7)
    known = {path.name: path for path in explanations.glob("*.png")} if explanations.is_dir() else {}
    return [
        Mistake(
            plain(table.paths[row]),
            plain(table.classes[table.targets[row]]),
            plain(table.classes[predicted[row]]),
            float(confidence[row]),
            float(softmax(table.block(slice(row, row + 1)))[0, table.targets[row]]),
            picture,
            _explanation(table.paths[row], roots, known),
        )
        for row, picture in zip(rows, pictures, strict=True)
    ]


def _explanation(path: str, roots: Sequence[Path], known: Mapping[str, Path]) -> Thumbnail:
    found = next((known[name] for name in (explanation_name(root / path) for root in roots) if name in known), None)
    return thumbnail(found, side=_EXPLANATION_SIDE, quality=70) if found else NO_PICTURE
