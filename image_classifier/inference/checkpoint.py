"""A Lightning checkpoint behind the seam: the only file of this room that needs torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from image_classifier.cli import hydra_app
from image_classifier.errors import CheckpointError, ClassifierError
from image_classifier.modeling.classifier import Classifier, build_classifier

# Arguments by which a network gets weights from elsewhere: the checkpoint's own would replace them at once, and a file must not make us load another.
_FETCHING = {"pretrained": False, "weights": None, "weights_backbone": None}
_LOADING = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_FETCHERS = {"timm.create_model": "pretrained", "image_classifier.modeling.backbones.torchvision_backbone": "weights"}


def load_classifier(path: Path, trusted: Sequence[str] = ()) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a `.ckpt` in evaluation mode, and its blueprint; nothing in the file is executed.

    `trusted` names packages of the user's own that the network may come from: the file itself cannot say so.

    Raises:
        CheckpointError: The file is damaged, or was not written by this package.
        ConfigError: Its network comes from a package that is not trusted, or takes other arguments.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        blueprint = content["hyper_parameters"]["blueprint"]
        weights = {
            key.removeprefix("classifier."): value
            for key, value in content["state_dict"].items()
            if key.startswith("classifier.")
        }
        shape = (
            len(blueprint["classes"]),
            blueprint["preprocess"]["size"],
            blueprint["normalise"]["mean"],
            blueprint["normalise"]["std"],
        )
        dropout, tta = blueprint["head_dropout"], blueprint.get("tta", "none")
    except Exception as error:  # a damaged file makes torch raise anything, assertions too
        raise CheckpointError(
            f"{str(path)!r} is damaged, or no checkpoint of this package ({type(error).__name__})",
            "give another, or train again",
        ) from error
    try:
        backbone = hydra_app.instantiate(network_of(blueprint), trusted=trusted, known=hydra_app.NETWORKS)
        classifier = build_classifier(backbone, *shape, dropout, tta)
    except ClassifierError:
        raise
    except Exception as error:  # what a stranger asks of a library makes it raise anything
        reason = f"{type(error).__name__}: {str(error)[:160]}"
        raise CheckpointError(
            f"the network that {str(path)!r} describes cannot be built ({reason})", "give another, or train again"
        ) from error
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of {str(path)!r} do not fit its own network", "was timm or torchvision changed since?"
        ) from error
    return classifier.eval(), blueprint


def network_of(blueprint: Mapping[str, Any]) -> dict[str, Any]:
    """The node that builds a blueprint's network, all that would open another file or fetch one taken out.

    Raises:
        CheckpointError: It asks for a network by an address, or in words that training never writes.
    """
    node = _alone(blueprint["backbone"])
    if not isinstance(node, dict):
        raise CheckpointError(
            f"a checkpoint describes its network as {type(node).__name__}", "give another, or train again"
        )
    key = _FETCHERS.get(str(node.get("_target_")))
    return {**node, key: _FETCHING[key]} if key else node


def _alone(node: Any) -> Any:
    """A node without arguments that load something, on every level."""
    if isinstance(node, str) and "${" in node:
        raise _refused(node)  # which could read this machine's environment
    if isinstance(node, list | tuple):
        return [_alone(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "_args_" in node:
        raise _refused("_args_")  # arguments without a name could not be told from each other
    for value in (node.get("model_name"), node.get("name")):
        if re.search("[:/]", str(value)):
            raise _refused(str(value))  # of timm: an address at Hugging Face, or a folder
    return {
        key: _FETCHING[key] if key in _FETCHING else _alone(value) for key, value in node.items() if key not in _LOADING
    }


def _refused(words: str) -> CheckpointError:
    return CheckpointError(
        f"a checkpoint asks for {words[:100]!r}, and a file may not make us read others", "give another, or train again"
    )


class CheckpointBackend:
    """Runs a `.ckpt` with torch, where its weights lie: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D]."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self.logits_and_embeddings(pixels)[0]

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits, embeddings = self.classifier.answer(torch.from_numpy(pixels).to(self.classifier.scale.device))
        return logits.cpu().numpy(), embeddings.cpu().numpy()
