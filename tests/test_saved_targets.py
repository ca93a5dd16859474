"""Dotted paths of classes in configurations, run folders and bundles that were saved before the classes moved."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from image_classifier.errors import ConfigError
from image_classifier.instantiate import ALIASES, TRUSTED, check_targets, instantiate

# Every public class below the allow-listed prefixes before the move, by module.
BEFORE = {
    "dataset.sources": ["Digits", "Folder", "Hub", "TorchvisionDataset", "deferred"],
    "modeling.backbones": ["torchvision_backbone"],
    "modeling.classifier": ["Classifier"],
    "modeling.convnet": ["ConvNet", "MLP"],
    "modeling.features": ["EmbeddingStore"],
    "modeling.held": ["Held"],
    "modeling.losses": ["CrossEntropy", "FocalLoss", "BinaryCrossEntropy", "SupervisedContrastive"],
    "modeling.weights": ["Fit"],
    "modeling.whitened": ["WhitenedNet"],
    "training.augment": ["BatchAugment", "Mix", "RandomOperations"],
    "training.augment.batch": ["BatchAugment"],
    "training.augment.mix": ["Mix"],
    "training.augment.operations": ["Draw", "RandomOperations"],
    "training.callbacks.averaging": ["EMA", "SWA"],
    "training.callbacks.bad_loss": ["BadLoss"],
    "training.callbacks.checkpoints": ["BetweenSteps", "LastCheckpoint", "BestCheckpoint"],
    "training.callbacks.compiling": ["Compiling"],
    "training.callbacks.history": ["RunHistory"],
    "training.callbacks.rehearsing": ["Sweep", "Stopwatch"],
    "training.callbacks.signals": ["Signals", "StopOnSignal"],
    "training.callbacks.state": ["ExactState"],
    "training.callbacks.throughput": ["Throughput"],
    "training.callbacks.tuner": ["ReportToTuner"],
    "training.callbacks.unfreeze": ["Unfreeze"],
    "training.loggers": ["MLflowLogger", "RunLoggers"],
    "training.optimizers.muon": ["Muon"],
    "training.optimizers.schedules": ["SchedulerSettings", "Moves"],
    "training.sharding": ["Sharded"],
}
NAMES = [f"image_classifier.{module}.{name}" for module, names in BEFORE.items() for name in names]
TUNER = "image_classifier.training.callbacks.tuner.ReportToTuner"
MIX = "image_classifier.training.augment.mix.Mix"


def loaded(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_of_before_is_found_and_trusted(name: str) -> None:
    assert callable(loaded(ALIASES.get(name, name)))
    check_targets({"_target_": name})


def test_an_alias_leads_from_a_path_that_is_gone_to_one_that_is_trusted() -> None:
    for old, new in ALIASES.items():
        with pytest.raises((ImportError, AttributeError)):
            loaded(old)
        assert new not in ALIASES and new.startswith(TRUSTED) and old in NAMES


def test_saved_nodes_are_built_by_the_new_class() -> None:
    from image_classifier.training.augment.mixup_cutmix import Mix
    from image_classifier.training.callbacks.optuna_pruning import OptunaPruning

    assert isinstance(instantiate({"_target_": TUNER, "metric": "val/loss"}, key="callbacks.tuner"), OptunaPruning)
    config = OmegaConf.create({"alpha": 0.5, "augment": {"mix": {"_target_": MIX, "mixup": "${alpha}"}}})
    mix = instantiate(config.augment.mix)
    assert isinstance(mix, Mix) and mix.mixup == 0.5
    assert config.augment.mix._target_ == MIX  # the configuration itself stays as it was
    augment = {"_target_": "image_classifier.training.augment.BatchAugment", "mix": dict(config.augment.mix)}
    assert isinstance(instantiate(augment).mix, Mix)


def test_errors_of_saved_nodes_name_their_key() -> None:
    config = OmegaConf.create({"augment": {"mix": {"_target_": MIX, "mixupp": 1.0}}})
    with pytest.raises(ConfigError, match=r"augment.mix.mixupp: .* did you mean mixup\?"):
        instantiate(config.augment.mix)


def test_an_old_path_is_judged_by_the_new_one() -> None:
    with pytest.raises(ConfigError, match="is not on the list"):
        check_targets({"_target_": TUNER}, known=("image_classifier.training.callbacks.tuner.",))


def test_checkpoints_know_callbacks_by_their_old_names(tmp_path: Path) -> None:
    from image_classifier.training.callbacks.averaging import EMA, SWA
    from image_classifier.training.callbacks.checkpoints import BestCheckpoint
    from image_classifier.training.callbacks.csv_metrics import CSVMetrics
    from image_classifier.training.callbacks.exact_resume import KEY
    from image_classifier.training.callbacks.nan_guard import NanGuard
    from image_classifier.training.callbacks.optuna_pruning import OptunaPruning
    from image_classifier.training.callbacks.throughput import Throughput

    throughput = Throughput()
    stateful = {
        "BadLoss": (NanGuard("stop", tmp_path), {"skipped", "in_a_row"}),
        "BestCheckpoint": (BestCheckpoint("."), {"score", "monitor"}),
        "EMA": (EMA(), {"latest_update_step"}),
        "ReportToTuner": (OptunaPruning("val/loss"), {"validations"}),
        "RunHistory": (CSVMetrics(tmp_path / "metrics.csv", throughput), {"rows", "validated"}),
        "SWA": (SWA(), {"latest_update_step"}),
        "Throughput": (throughput, {"images", "seconds"}),
    }
    for key, (callback, fields) in stateful.items():
        assert callback.state_key == key and callback.state_dict().keys() == fields
        callback.load_state_dict(callback.state_dict())
    assert KEY == "image_classifier"
