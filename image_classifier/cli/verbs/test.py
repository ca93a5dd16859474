"""The verb `test`: how good a model is on the test split it never saw, or on a labelled folder."""

from __future__ import annotations

import json
import sys
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.evaluation.metrics.compute import ClassificationMetrics
from image_classifier.inference.evaluate import TestSettings, evaluate


def test(config: Any) -> ClassificationMetrics:
    """Evaluate the model and print the metrics, as a table or as JSON; errors as `inference.evaluate.evaluate`."""
    settings = hydra_app.typed(TestSettings, config, "")
    result = evaluate(settings, progress=sys.stderr.isatty())
    if settings.format == "json":
        print(json.dumps(result.as_dict(), ensure_ascii=False))
    else:
        print("\n".join(result.lines()))
    return result.metrics


test.__test__ = False  # type: ignore[attr-defined]  # not a test of pytest's
