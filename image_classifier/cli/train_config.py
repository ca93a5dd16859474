"""The typed configuration of a training, from the one that Hydra composed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.recipes import with_recipe
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.settings import NO_WEIGHTS, DataSettings
from image_classifier.evaluation.reliability.abstention import DEFAULTS, DecisionSettings
from image_classifier.paths import CONF_DIR
from image_classifier.training.config import (
    AUTO,
    FinetuneSettings,
    ModelConfig,
    Node,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
    TrainerConfig,
    has_own_preprocessing,
)
from image_classifier.training.diagnostics import DiagnosticsSettings
from image_classifier.training.hardware import SpeedSettings
from image_classifier.training.run_dir import RunSettings

_OWN_TRAINER_KEYS = ("channels_last", "speed", "compile", "on_nan")  # of conf/trainer; all others are Lightning's


def compose_train_config(overrides: Iterable[str], conf: Path = CONF_DIR) -> TrainConfig:
    """Return what `train` would run with, from Python; the overrides are Hydra's, such as "trainer.max_epochs=3".

    Raises:
        ConfigError: An override that the command line would refuse.
    """
    with hydra_app.composer(conf):
        return train_config(hydra_app.composed("train", overrides), tuple(overrides))


def train_config(config: DictConfig, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the typed configuration of a training; `overrides` are those that it was composed from.

    Raises:
        ConfigError: A key that is unknown, or a value of the wrong type.
    """
    config = _with_default_preprocessing(config)
    plain = hydra_app.to_plain(config)
    return TrainConfig(
        run=hydra_app.selected(RunSettings, config),
        data=hydra_app.typed(DataSettings, config.data, "data"),
        audit=hydra_app.typed(AuditSettings, config.audit, "audit"),
        model=model_config(config),
        finetune=hydra_app.typed(FinetuneSettings, config.finetune, "finetune"),
        loss=plain["loss"],
        optimizer=_optimizer(plain["optimizer"]),
        scheduler=SchedulerConfig(**_known(SchedulerConfig, plain["scheduler"])),
        augment=plain["augment"] or None,
        trainer=_trainer(config.trainer),
        callbacks={name: node for name, node in (plain.get("callbacks") or {}).items() if node},
        loggers=_loggers(plain.get("logger") or {}),
        decision=hydra_app.typed(DecisionSettings, config.decision, "decision").or_else(DEFAULTS),
        diagnostics=hydra_app.typed(DiagnosticsSettings, config.diagnostics, "diagnostics"),
        plain=plain,
        yaml=hydra_app.to_yaml(config),
        change=lambda values: train_config(hydra_app.replaced(config, values), overrides),
        recompose=lambda recipe: _recomposed(recipe, overrides),
    )


def _recomposed(recipe: Sequence[str], given: Sequence[str]) -> TrainConfig:
    """Return the configuration of a recipe with the given overrides on top, which win."""
    line = with_recipe(recipe, given)
    context = nullcontext() if GlobalHydra.instance().is_initialized() else hydra_app.composer(CONF_DIR)
    with context:
        return train_config(hydra_app.composed("train", line), line)


def _with_default_preprocessing(config: DictConfig) -> DictConfig:
    """Return the configuration with numbers where the preprocessing is auto and no pretrained weights will decide."""
    backbone: Any = hydra_app.to_plain(config.model)["backbone"]
    if backbone == AUTO or has_own_preprocessing(backbone, config.model.weights, config.model["from"]):
        return config
    found = {f"data.{name}": value for name, value in NO_WEIGHTS.items() if config.data[name] == AUTO}
    return hydra_app.replaced(config, found) if found else config


def model_config(config: DictConfig) -> ModelConfig:
    """Return the section `model`, which the verbs `train`, `baseline` and `suspects` share."""
    plain = hydra_app.to_plain(config.model)
    known = _known(ModelConfig, plain)
    texts = {key: str(plain[key]) for key in ("weights", "name", "teacher") if plain.get(key)}
    bundle = str(plain["from"]) if plain.get("from") else None
    trusted = tuple(config.get("trusted_packages") or ())
    return ModelConfig(**known | texts, bundle=bundle, models_dir=str(config.models_dir), trusted_packages=trusted)


def _known(cls: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values of a section that a dataclass has a field for: an open set may have others."""
    return {item.name: plain[item.name] for item in fields(cls) if item.name in plain}


def _optimizer(plain: Mapping[str, Any]) -> OptimizerConfig:
    node = {key: value for key, value in plain.items() if key != "layer_decay"}
    return OptimizerConfig(node, plain.get("lr"), plain.get("layer_decay", 1.0))


def _trainer(config: DictConfig) -> TrainerConfig:
    plain = hydra_app.to_plain(config)
    node = {key: value for key, value in plain.items() if key not in _OWN_TRAINER_KEYS}
    speed = hydra_app.selected(SpeedSettings, config, "trainer")
    return TrainerConfig(**_known(TrainerConfig, plain) | {"node": node, "speed": speed})


def _loggers(plain: Mapping[str, Any]) -> dict[str, Node]:
    """Return the loggers of `logger` by key: one node, or several under names of their own."""
    if "_target_" in plain:
        return {"logger": plain}
    return {f"logger.{name}": node for name, node in plain.items() if node}
