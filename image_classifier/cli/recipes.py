"""Recipes as overrides: an experiment's file written out, so that what the user gives can win over each part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from image_classifier.cli.positional import given
from image_classifier.errors import ConfigError
from image_classifier.override_grammar import quoted
from image_classifier.paths import CONF_DIR

# Peak learning rates of optimizers that start from pretrained weights (docs/LOG.md, 2026-11-30): MobileNetV2 diverges
# with SGD from 0.03 on, and with AdamW at 3e-3 it never comes back to the probe.
FINETUNING_RATES = {"adamw": 6e-4, "adam": 6e-4, "sgd": 0.01, "muon": 1e-3}
_EXPERIMENT = "experiment="
_NO_WEIGHTS = "model.weights=null"
# Choices that say where the images are and what computes; a recipe's sizes and epochs are for any of them.
_ADDED_TO = {"data", "trainer"}


def with_recipe(recipe: Sequence[str], own: Sequence[str], conf: Path = CONF_DIR) -> tuple[str, ...]:
    """Return the overrides of a recipe with the user's own on top.

    A key or choice that is the user's wins, and with a choice of a group go all of the recipe's keys of that group,
    but for those of `data` and `trainer`.

    >>> with_recipe(["model=timm", "optimizer=adamw", "optimizer.lr=0.1"], ["model=auto", "optimizer=sgd", "seed=1"])
    ('model=timm', 'optimizer=sgd', 'seed=1')
    """
    kept = [override for override in own if override != "model=auto"]
    if _NO_WEIGHTS in recipe:  # a file that was offered to `model=auto`, and is of another network
        kept = [override for override in kept if not override.startswith("model.weights=")]
    mine = given(kept)
    # Another optimizer has another rate: that which was measured for it, in the place of its own for other trainings.
    chosen = next((override.partition("=")[2] for override in kept if override.startswith("optimizer=")), "")
    if chosen in FINETUNING_RATES and "optimizer.lr" not in mine and any("finetune" in item for item in recipe):
        kept.append(f"optimizer.lr={FINETUNING_RATES[chosen]}")
    replaced = mine - _ADDED_TO
    merged: dict[str, str] = {}
    for override in _written_out(recipe, conf):
        key = override.partition("=")[0]
        if key not in mine and key.partition(".")[0] not in replaced:
            merged[key] = override
    return (*merged.values(), *kept)


def _written_out(recipe: Sequence[str], conf: Path) -> Iterator[str]:
    """Yield the overrides, and those in the file of an experiment in its place."""
    for override in recipe:
        if not override.startswith(_EXPERIMENT):
            yield override
            continue
        path = conf / "experiment" / f"{override.removeprefix(_EXPERIMENT)}.yaml"
        content: Any = OmegaConf.to_container(OmegaConf.load(path))  # as Hydra reads it: 1e-3 is a number
        for item in content.pop("defaults", ()):
            if isinstance(item, Mapping):
                ((group, choice),) = item.items()
                yield f"{group.removeprefix('override').strip().lstrip('/')}={choice}"
            elif item != "_self_":
                yield from _written_out([f"{_EXPERIMENT}{item}"], conf)
        for key, value in flat_values(content):
            yield f"{key}={override_value(key, value)}"


def flat_values(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested settings by dotted key."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def override_value(key: str, value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        return quoted(os.fspath(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(override_value(key, item) for item in value)}]"
    raise ConfigError(
        f"{key} cannot hold a {type(value).__name__}", "use text, numbers, true or false, None, or lists of these"
    )
