"""The backend `checkpoint`: a Lightning checkpoint, run by torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from image_classifier.errors import CheckpointError, ClassifierError
from image_classifier.inference.backends import OpenOptions
from image_classifier.instantiate import NETWORKS, instantiate
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.ensemble import EnsembleClassifier

ENSEMBLE = "ensemble"  # of a blueprint: how many classifiers of this network are one; missing: it is a single one
# Arguments by which a network loads weights from elsewhere. The checkpoint's weights would replace them at once, and a
# file must not make us load another file.
_FETCHING = {"pretrained": False, "weights": None, "weights_backbone": None}
_LOADING = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_FETCHERS = {"timm.create_model": "pretrained", "image_classifier.modeling.backbones.torchvision_backbone": "weights"}


def open_checkpoint(path: Path, options: OpenOptions) -> tuple[CheckpointBackend, Mapping[str, Any]]:
    """Return a backend over a `.ckpt`, and its blueprint; see `backends.Opener`."""
    classifier, blueprint = load_classifier(path, options.trusted)
    return CheckpointBackend(classifier), blueprint


def load_classifier(path: Path, trusted: Sequence[str] = ()) -> tuple[Classifier, dict[str, Any]]:
    """Return the classifier of a `.ckpt` in evaluation mode, and its blueprint; nothing in the file is executed.

    `trusted` names packages of the user that the network may come from: the file itself cannot allow that.

    Raises:
        CheckpointError: The file is damaged, or was not written by this package.
        ConfigError: Its network comes from a package that is not trusted, or takes other arguments.
    """
    blueprint, weights, arguments = _read(path)
    try:
        members = [
            build_classifier(instantiate(network_of(blueprint), trusted=trusted, known=NETWORKS), *arguments)
            for _ in range(_num_members(blueprint, weights))
        ]
        normalise = blueprint["normalise"]
        is_ensemble = blueprint.get(ENSEMBLE) is not None
        classifier = EnsembleClassifier(members, normalise["mean"], normalise["std"]) if is_ensemble else members[0]
    except ClassifierError:
        raise
    except Exception as error:  # a library may raise anything for the arguments of a strange file
        reason = f"{type(error).__name__}: {str(error)[:160]}"
        raise CheckpointError(
            f"the network that {str(path)!r} describes cannot be built ({reason})", "give another, or train again"
        ) from error
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of {str(path)!r} do not fit its network", "was timm or torchvision changed since?"
        ) from error
    return classifier.eval(), blueprint


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[Any, ...]]:
    """Return a checkpoint's blueprint, its weights, and the arguments of `build_classifier` behind the backbone."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        blueprint = content["hyper_parameters"]["blueprint"]
        weights = {
            key.removeprefix("classifier."): value
            for key, value in content["state_dict"].items()
            if key.startswith("classifier.")
        }
        arguments = (
            len(blueprint["classes"]),
            blueprint["preprocess"]["size"],
            blueprint["normalise"]["mean"],
            blueprint["normalise"]["std"],
            blueprint["head_dropout"],
            blueprint.get("tta", "none"),
        )
    except Exception as error:  # a damaged file makes torch raise anything, assertions too
        raise CheckpointError(
            f"{str(path)!r} is damaged, or not a checkpoint of this package ({type(error).__name__})",
            "give another, or train again",
        ) from error
    return blueprint, weights, arguments


def _num_members(blueprint: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> int:
    """Return how many classifiers a checkpoint holds; CheckpointError for a number that its weights cannot fill."""
    count = blueprint.get(ENSEMBLE)
    if count is None:
        return 1
    if not isinstance(count, int) or not 1 <= count <= len(weights):
        fact = f"the checkpoint is damaged: it names {str(count)[:20]} networks"
        raise CheckpointError(fact, "give another, or train again")
    return count


def network_of(blueprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node that builds a blueprint's network, without arguments that would open or download a file.

    Raises:
        CheckpointError: It names a network by an address, or contains what training never writes.
    """
    node = _without_loading(blueprint["backbone"])
    if not isinstance(node, dict):
        raise CheckpointError(
            f"a checkpoint describes its network as {type(node).__name__}", "give another, or train again"
        )
    key = _FETCHERS.get(str(node.get("_target_")))
    return {**node, key: _FETCHING[key]} if key else node


def _without_loading(node: Any) -> Any:
    """Return a node without arguments that load something, on every level."""
    if isinstance(node, str) and "${" in node:
        raise _refused(node)  # an interpolation could read this machine's environment
    if isinstance(node, list | tuple):
        return [_without_loading(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "_args_" in node:
        raise _refused("_args_")  # arguments without a name cannot be checked
    for value in (node.get("model_name"), node.get("name")):
        if re.search("[:/]", str(value)):
            raise _refused(str(value))  # in timm this is an address at Hugging Face, or a folder
    return {
        key: _FETCHING[key] if key in _FETCHING else _without_loading(value)
        for key, value in node.items()
        if key not in _LOADING
    }


def _refused(text: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint refers to another file, {text[:100]!r}, which is not read", "give another, or train again"
    )


class CheckpointBackend:
    """Runs a `.ckpt` with torch, on the device of its weights.

    Pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D].
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self.logits_and_embeddings(pixels)[0]

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits, embeddings = self.classifier.answer(torch.from_numpy(pixels).to(self.classifier.scale.device))
        return logits.cpu().numpy(), embeddings.cpu().numpy()
