"""A Lightning checkpoint behind the seam: the only file of this room that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from image_classifier import settings
from image_classifier.errors import CheckpointError
from image_classifier.modeling.classifier import Classifier, build_classifier

# Arguments by which a network fetches weights: the checkpoint's own would replace them at once, and a file must not make us load another.
LOADING = ("pretrained", "weights", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weights_backbone")


def load_classifier(path: Path, trusted: Sequence[str] = ()) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a `.ckpt` in evaluation mode, and its blueprint; nothing in the file is executed.

    `trusted` names packages of the user's own that the network may come from: the file itself cannot say so.

    Raises:
        CheckpointError: The file is damaged, or was not written by this package.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        blueprint = content["hyper_parameters"]["blueprint"]
        weights = {key.removeprefix("classifier."): value for key, value in content["state_dict"].items() if key.startswith("classifier.")}
        network = {key: value for key, value in blueprint["backbone"].items() if key not in LOADING}
        shape = len(blueprint["classes"]), blueprint["preprocess"]["size"], blueprint["normalise"]["mean"], blueprint["normalise"]["std"]
        dropout, tta = blueprint["head_dropout"], blueprint.get("tta", "none")
    except Exception as error:  # a damaged file makes torch raise anything, assertions too
        raise CheckpointError(
            f"{str(path)!r} is damaged, or no checkpoint of this package ({type(error).__name__})", "give another, or train again"
        ) from error
    backbone = settings.instantiate(network, trusted=trusted, known=settings.NETWORKS)
    classifier = build_classifier(backbone, *shape, dropout, tta)
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {str(path)!r} do not fit its own network", "was timm or torchvision changed since?") from error
    return classifier.eval(), blueprint


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
