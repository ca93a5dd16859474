"""Weights from a file, matched with a classifier by name and shape; the log names tensors that do not match."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_classifier.errors import CheckpointError
from image_classifier.modeling.classifier import Classifier
from image_classifier.text import listed

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
# Keys of saved state dicts in the files of various training loops, averaged ones first.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "network",
    "net",
    "weights",
)
_MIN_SHARE = 0.5  # of the backbone's numbers: a file with fewer is of another network


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a `.safetensors` or torch file (`.pth`, `.pt`, `.bin`, `.ckpt`); run no code in it.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds code or no state dict.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {str(path)!r}", "model.weights takes a .pth, .pt, .bin, .safetensors or .ckpt"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    # "_orig_mod." is the prefix of a compiled module.
    tensors = {key.replace("_orig_mod.", ""): value for key, value in _state_dict(content).items()}
    if not tensors:
        raise CheckpointError(f"{str(path)!r} has no state dict", "save the network's state_dict() in it")
    return tensors


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about damaged files are misleading
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file torch raises any type, assertions too
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is None:
            raise _damaged(path, error) from error
        hint = "save the network's state_dict() alone, or as .safetensors"
        raise CheckpointError(
            f"{str(path)!r} has more than weights in it ({code.group(1)}); code in a file is never run", hint
        ) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} is damaged or not a file of weights ({type(error).__name__})", "copy it again, or give another"
    )


def _state_dict(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for name in _WRAPPERS:
        if found := _state_dict(content.get(name)):
            return found
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Fit:
    """Tensors of a file matched with a backbone.

    Attributes:
        fitting: The file's tensors under the backbone's names, where the shapes agree.
        other_shape: The file's tensors under the backbone's names, where they do not.
        missing: The backbone's names that are not in the file.
        unused: The file's other tensors, under its own names.
    """

    fitting: Tensors
    other_shape: Tensors
    missing: Sequence[str]
    unused: Tensors


def fit(backbone: nn.Module, tensors: Tensors, source: str) -> Fit:
    """Match a file's tensors with a backbone's, whatever prefix a wrapper has put before the names.

    Raises:
        CheckpointError: Less than half of the backbone's numbers are in the file; names some of both sides.
    """
    expected = backbone.state_dict()
    prefix = _prefix(expected, tensors)
    named = {name: tensors[prefix + name] for name in expected if prefix + name in tensors}
    fitting = {name: value for name, value in named.items() if value.shape == expected[name].shape}
    if _count(fitting) < _MIN_SHARE * _count(expected) or not fitting:
        share = f"{len(fitting)} of its {len(expected)} tensors"
        raise CheckpointError(
            f"the weights in {source!r} are from another network: the backbone finds {share}",
            f"it has {listed(list(expected), 3)}, the file has {listed(list(tensors), 3)}",
        )
    missing = [name for name in expected if name not in named and not name.endswith("num_batches_tracked")]
    used = {prefix + name for name in named}
    unused = {key: value for key, value in tensors.items() if key not in used}
    other_shape = {name: value for name, value in named.items() if name not in fitting}
    return Fit(fitting, other_shape, missing, unused)


def _prefix(expected: Tensors, tensors: Tensors) -> str:
    """Return the prefix of the backbone's names in the file: of all that occur, the one by which most numbers fit."""
    fitting: Counter[str] = Counter()
    for key, value in tensors.items():
        start = 0
        while start >= 0:
            name = key[start:]
            if name in expected and expected[name].shape == value.shape:
                fitting[key[:start]] += value.numel()
            start = key.find(".", start) + 1 or -1
    return max(fitting, key=lambda prefix: fitting[prefix], default="")


def load_weights(classifier: Classifier, tensors: Tensors, source: str) -> None:
    """Load a file's tensors into a classifier; the log counts them and names those that keep their initial values.

    Raises:
        CheckpointError: The file is of another network.
    """
    match = fit(classifier.backbone, tensors, source)
    expected = classifier.backbone.state_dict()
    classifier.backbone.load_state_dict(match.fitting, strict=False)
    log.info("weights: %d of the backbone's %d tensors from %s", len(match.fitting), len(expected), source)
    for name, value in match.other_shape.items():
        shapes = f"its shape is {list(expected[name].shape)}, in the file {list(value.shape)}"
        log.info("weights: %s is new: %s", name, shapes)
    if match.missing:
        log.info("weights: not in the file, so new: %s", listed(match.missing))
    used = _load_head(classifier, match.unused)
    if rest := [name for name in match.unused if name not in used and not name.endswith("num_batches_tracked")]:
        log.info("weights: in the file, but not in the backbone: %s", listed(rest))


def _load_head(classifier: Classifier, unused: Tensors) -> set[str]:
    """Load the head where the file has one of its shape; return the names of the file's head."""
    linear = last_linear(classifier.head)
    heads = [
        name
        for name, value in unused.items()
        if name.endswith("weight") and value.ndim == 2 and value.shape[1] == linear.in_features
    ]
    if len(heads) != 1:
        log.info("weights: the head is new: the file has none that fits")
        return set()
    bias_name = heads[0].removesuffix("weight") + "bias"
    weight = unused[heads[0]]
    bias = unused.get(bias_name)
    if weight.shape == linear.weight.shape and bias is not None and bias.shape == linear.bias.shape:
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        log.info("weights: the head from %s of the file, whose classes must be in the same order", heads[0])
    else:
        shapes = f"its shape is {list(linear.weight.shape)}, in the file {list(weight.shape)} ({heads[0]})"
        log.info("weights: the head is new: %s", shapes)
    return {heads[0], bias_name}


def inherit(classifier: Classifier, source: Classifier, classes: Sequence[str], known: Sequence[str]) -> None:
    """Load a classifier for `classes` from one with the same backbone for `known`; common classes keep their row."""
    classifier.backbone.load_state_dict(source.backbone.state_dict())
    new = last_linear(classifier.head)
    old = last_linear(source.head)
    if new.in_features != old.in_features:
        log.info("head: new, as it has another number of features than before")
        return
    kept = [name for name in classes if name in known]
    rows = [list(classes).index(name) for name in kept]
    sources = [list(known).index(name) for name in kept]
    with torch.no_grad():
        new.weight[rows] = old.weight[sources]
        new.bias[rows] = old.bias[sources]
    added = [name for name in classes if name not in known]
    removed = [name for name in known if name not in classes]
    groups = [("kept", kept), ("new", added), ("removed", removed)]
    log.info("head: classes %s", "; ".join(f"{group}: {listed(names)}" for group, names in groups if names))


def last_linear(head: nn.Module) -> nn.Linear:
    """Return the head's last linear layer, which gives the logits."""
    return next(module for module in reversed(list(head.modules())) if isinstance(module, nn.Linear))


def _count(tensors: Tensors) -> int:
    return sum(value.numel() for value in tensors.values())
