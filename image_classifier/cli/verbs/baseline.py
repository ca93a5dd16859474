"""The verb `baseline`: what simple classifiers reach on the same split, for a model to beat."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.train_config import model_config
from image_classifier.cli.verbs.prepare import typed_settings
from image_classifier.evaluation.baselines import lines
from image_classifier.manifest import SPLITS
from image_classifier.training.baseline import BaselineSettings, evaluate_baselines


def baseline(config: DictConfig) -> Path:
    """Evaluate the baselines, and print their scores and the path of baselines.json."""
    settings = hydra_app.selected(BaselineSettings, config)
    data, audit, _ = typed_settings(config)
    scores = evaluate_baselines(settings, model_config(config), data, audit)
    for split in SPLITS[1:]:
        print("\n".join(lines(scores.baselines, split)))
    print(f"scores   {scores.path}")
    return scores.path
