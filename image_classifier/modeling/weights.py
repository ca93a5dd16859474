"""Weights from a file, fitted to a classifier by name and shape; what does not fit keeps its fresh values and is named in the log."""

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

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
# Where training loops keep a state dict inside what they save, the averaged one first.
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
_LEAST_SHARE = 0.5  # of the backbone's numbers: a file with fewer is another network's
_NAMED = 5  # tensors of one kind that a message names


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a `.safetensors`, or in what torch saved (`.pth`, `.pt`, `.bin`, `.ckpt`); no code in the file is run.

    Raises:
        CheckpointError: There is no such file, it is damaged, holds code, or no state dict.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {str(path)!r}", "model.weights takes a .pth, .pt, .bin, .safetensors or .ckpt"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = {
        key.replace("_orig_mod.", ""): value for key, value in _state_dict(content).items()
    }  # the mark of a compiled module
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no state dict", "save the network's state_dict() in it")
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
            warnings.simplefilter("ignore")  # of damaged files torch tells strange things
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything, assertions too
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is None:
            raise _damaged(path, error) from error
        hint = "save the network's state_dict() alone, or as .safetensors"
        raise CheckpointError(
            f"{str(path)!r} holds more than weights ({code.group(1)}), and code in it is never run", hint
        ) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} is damaged, or no file of weights ({type(error).__name__})", "copy it anew, or give another"
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
    """How the tensors of a file lie on a backbone.

    Attributes:
        fitting: The file's tensors under the backbone's names, where the shapes agree.
        other_shape: The file's tensors under the backbone's names, where they do not.
        missing: The backbone's names that the file lacks.
        left: The file's tensors, under its own names, that the backbone has no place for.
    """

    fitting: Tensors
    other_shape: Tensors
    missing: Sequence[str]
    left: Tensors


def fit(backbone: nn.Module, tensors: Tensors, source: str) -> Fit:
    """Match a file's tensors with a backbone's, whatever prefix a wrapper has put before the names.

    Raises:
        CheckpointError: Less than half of the backbone's numbers are in the file; both sides' first names are told.
    """
    own = backbone.state_dict()
    prefix = _prefix(own, tensors)
    found = {name: tensors[prefix + name] for name in own if prefix + name in tensors}
    fitting = {name: value for name, value in found.items() if value.shape == own[name].shape}
    if _count(fitting) < _LEAST_SHARE * _count(own) or not fitting:
        share = f"{len(fitting)} of its {len(own)} tensors"
        raise CheckpointError(
            f"the weights in {source!r} are of another network: the backbone finds {share}",
            f"it has {_names(list(own), 3)}, the file has {_names(list(tensors), 3)}",
        )
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    used = {prefix + name for name in found}
    left = {key: value for key, value in tensors.items() if key not in used}
    return Fit(fitting, {name: value for name, value in found.items() if name not in fitting}, missing, left)


def _prefix(own: Tensors, tensors: Tensors) -> str:
    """What stands before the backbone's names in the file: of all that occur, what makes most numbers fit."""
    fitting: Counter[str] = Counter()
    for key, value in tensors.items():
        start = 0
        while start >= 0:
            name = key[start:]
            if name in own and own[name].shape == value.shape:
                fitting[key[:start]] += value.numel()
            start = key.find(".", start) + 1 or -1
    return max(fitting, key=lambda prefix: fitting[prefix], default="")


def load_weights(classifier: Classifier, tensors: Tensors, source: str) -> None:
    """Fill a classifier from a file's tensors; the log counts them, and names all that starts anew with both shapes.

    Raises:
        CheckpointError: The file is another network's.
    """
    found = fit(classifier.backbone, tensors, source)
    own = classifier.backbone.state_dict()
    classifier.backbone.load_state_dict(found.fitting, strict=False)
    log.info("weights: %d of the backbone's %d tensors from %s", len(found.fitting), len(own), source)
    for name, value in found.other_shape.items():
        log.info(
            "weights: %s starts anew: its shape is %s, in the file %s", name, list(own[name].shape), list(value.shape)
        )
    if found.missing:
        log.info("weights: not in the file, so they start anew: %s", _names(found.missing))
    used = _load_head(classifier, found.left)
    if rest := [name for name in found.left if name not in used and not name.endswith("num_batches_tracked")]:
        log.info("weights: in the file, but not in the backbone: %s", _names(rest))


def _load_head(classifier: Classifier, left: Tensors) -> set[str]:
    """Fill the head where the file has one of its shape; returns the names of the file's head."""
    linear = last_linear(classifier.head)
    heads = [
        name
        for name, value in left.items()
        if name.endswith("weight") and value.ndim == 2 and value.shape[1] == linear.in_features
    ]
    if len(heads) != 1:
        log.info("weights: the head starts anew: the file has none for it")
        return set()
    weight, bias = left[heads[0]], left.get(heads[0].removesuffix("weight") + "bias")
    if weight.shape == linear.weight.shape and bias is not None and bias.shape == linear.bias.shape:
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        log.info("weights: the head from %s of the file, whose classes must be in the same order", heads[0])
    else:
        shapes = f"its shape is {list(linear.weight.shape)}, in the file {list(weight.shape)} ({heads[0]})"
        log.info("weights: the head starts anew: %s", shapes)
    return {heads[0], heads[0].removesuffix("weight") + "bias"}


def inherit(classifier: Classifier, source: Classifier, classes: Sequence[str], known: Sequence[str]) -> None:
    """Fill a classifier of `classes` from one of the same backbone for `known`; a class of both keeps its row of the head."""
    classifier.backbone.load_state_dict(source.backbone.state_dict())
    new, old = last_linear(classifier.head), last_linear(source.head)
    kept = [name for name in classes if name in known]
    if new.in_features != old.in_features:
        log.info("head: starts anew: it has other features than the one before")
        return
    rows, sources = [list(classes).index(name) for name in kept], [list(known).index(name) for name in kept]
    with torch.no_grad():
        new.weight[rows] = old.weight[sources]
        new.bias[rows] = old.bias[sources]
    fresh, gone = [name for name in classes if name not in known], [name for name in known if name not in classes]
    parts = [("keep their row", kept), ("start anew", fresh), ("left out", gone)]
    log.info("head: classes that %s", "; ".join(f"{what}: {_names(names)}" for what, names in parts if names))


def last_linear(head: nn.Module) -> nn.Linear:
    """The head's last linear layer, which gives the logits."""
    return next(module for module in reversed(list(head.modules())) if isinstance(module, nn.Linear))


def _count(tensors: Tensors) -> int:
    return sum(value.numel() for value in tensors.values())


def _names(names: Sequence[str], most: int = _NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
