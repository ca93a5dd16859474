"""The verb `report`: the page of one run, or of two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.evaluation.report.comparison import lines
from image_classifier.evaluation.report.write import ReportSettings, write_comparison, write_report


def report(config: Any) -> Path:
    """Write the page, print its result, and return its path."""
    settings = hydra_app.typed(ReportSettings, config, "")
    if settings.other is not None:
        written = write_comparison(settings, settings.other)
        print("\n".join([*lines(written.comparison, written.names, written.costs), f"page       {written.path}"]))
        return written.path
    run, path = write_report(settings)
    accuracy = f"{run.metrics['accuracy']:.4f}"
    bounds = run.interval("accuracy")
    interval = f", 95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""
    print(f"split      {run.split}\naccuracy   {accuracy}{interval}\npage       {path}")
    return path
