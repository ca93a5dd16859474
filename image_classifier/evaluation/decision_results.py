"""What a judged part says of how far its answers can be trusted: calibration.json and figures in its folder, lines for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from image_classifier.evaluation.calibration import CalibrationScore, Reliability, calibration_score
from image_classifier.evaluation.decision_plots import plot_reliability
from image_classifier.files import write_text
from image_classifier.records import PredictionTable


@dataclass(frozen=True)
class Trust:
    """How well calibrated one part is."""

    calibration: CalibrationScore

    def lines(self, split: str) -> Iterator[str]:
        """The figures in words, for a terminal."""
        yield self.calibration.line(split)


def write_trust(table: PredictionTable, directory: Path, title: str) -> Trust:
    """Judge one part's calibration; writes calibration.json and reliability.png."""
    score = calibration_score(table)
    before, after = Reliability.of(replace(table, temperature=1.0)), Reliability.of(table)
    content = {**score.as_dict(), "bins_before": before.as_dict(), "bins_after": after.as_dict()}
    write_text(directory / "calibration.json", json.dumps(content, indent=2) + "\n")
    plot_reliability(before, after, table.temperature, directory / "reliability.png", title)
    return Trust(score)
