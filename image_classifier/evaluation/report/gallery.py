"""The images of a report: those of the cells of the confusion matrix, and the worst mistakes with explanations."""

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

_CELL_IMAGES = 1000  # of all cells
_IMAGES_PER_CELL = 24
_CELL_SIDE = 96
_CELL_QUALITY = 65
_NUM_WORST = 24
_EXPLANATION_SIDE = 480
_MARKUP = 120  # characters of JSON around one image
_WORKERS = 4


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction: true and predicted class with their probabilities, the image, and its explanation."""

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
    """Return the images of each cell for the page's script: `cells` "true,predicted" -> numbers of `images`.

    `confidence` is [N].
    """
    chosen = images_of_cells(table, confidence, _CELL_IMAGES if root else _CELL_IMAGES // 4, _IMAGES_PER_CELL)
    rows = [row for of_cell in chosen.values() for row in of_cell]
    numbers = {row: number for number, row in enumerate(rows)}
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
    cells = {
        f"{truth},{predicted}": [numbers[row] for row in of_cell] for (truth, predicted), of_cell in chosen.items()
    }
    return {"classes": [plain(label) for label in table.classes], "cells": cells, "images": images}


def _drawn(
    paths: Sequence[str], root: Path | None, limits: DecodeLimits, side: int, quality: int, room: int
) -> list[Thumbnail]:
    """Return thumbnails of these files, until `room` characters are used."""
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
    """Return the most confident wrong predictions, with figures from the folder `explanations`.

    `roots` are the folders that the images may have been in when they were explained.
    """
    predicted, confidence = table.answers()
    rows = table.surest_mistakes(_NUM_WORST).tolist()
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
    names = (explanation_name(root / path) for root in roots)
    figure = next((known[name] for name in names if name in known), None)
    return thumbnail(figure, side=_EXPLANATION_SIDE, quality=70) if figure else NO_PICTURE
