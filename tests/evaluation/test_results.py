"""The folder of a judged part: its pictures are read within the limits that it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from image_classifier.errors import UnreadableImage
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.evaluation.results import write_evaluation
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits
from image_classifier.predictions import PredictionTable
from tests.conftest import listed


def test_pictures_are_read_within_the_limits_of_the_run(tree: Path, tmp_path: Path) -> None:
    part = listed(tree)
    table = PredictionTable(tuple(part.paths), part.targets, np.eye(2, dtype=np.float32)[part.targets], part.classes)
    largest = max(part.file(record).stat().st_size for record in part)
    write_evaluation(
        table, compute_metrics(table, 0), part, tmp_path / "within", "run", DecodeLimits(max_bytes=largest)
    )
    assert (tmp_path / "within/samples.png").is_file() and largest < DEFAULT_LIMITS.max_bytes
    with pytest.raises(UnreadableImage):
        write_evaluation(
            table, compute_metrics(table, 0), part, tmp_path / "beyond", "run", DecodeLimits(max_bytes=largest - 1)
        )
