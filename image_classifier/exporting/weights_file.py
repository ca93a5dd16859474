"""`model.safetensors`: the weights without pickle; for a network of timm also the `config.json` with which it opens."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from image_classifier.atomic_io import write_bytes, write_text
from image_classifier.errors import StorageError
from image_classifier.exporting.parity import check_parity
from image_classifier.inference.checkpoint import ENSEMBLE, network_of
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.weights import last_linear

log = logging.getLogger(__name__)

WEIGHTS, TIMM_CONFIG = "model.safetensors", "config.json"
_IN_HEADER = ("classes", "preprocess", "normalise", "temperature", "initial_weights")
_CROP_MODES = {"crop": "center", "squash": "squash", "pad": "border"}
_KEPT = ("architecture", "first_conv", "fixed_input_size", "min_input_size")  # of timm's description of the network
# Arguments of timm.create_model that say nothing about the network, or that the description has in another place.
_NO_ARGUMENTS = ("_target_", "model_name", "pretrained", "num_classes", "scriptable", "exportable", "no_jit")


def write_weights_file(classifier: Classifier, blueprint: Mapping[str, Any], pixels: np.ndarray, folder: Path) -> None:
    """Write `model.safetensors`, and `config.json` if timm then gives the logits of `pixels`, uint8 [N, 3, S, S].

    With `config.json` the tensors have timm's names and the normalisation is in it; else they are those of the
    classifier: `backbone.*`, `head.*`, `scale` and `shift`. Test-time augmentation and temperature are in neither.
    """
    if blueprint["backbone"].get("_target_") == "timm.create_model" and ENSEMBLE not in blueprint:
        try:
            with _undisturbed():
                _write_for_timm(classifier, blueprint, pixels, folder)
                return
        except StorageError:
            raise
        except Exception as error:  # timm raises anything for a network that it cannot build from a description
            (folder / TIMM_CONFIG).unlink(missing_ok=True)
            reason = " ".join(str(error).split())[:160]
            log.info("timm cannot open the bundle, so %s has names of image_classifier (%s)", WEIGHTS, reason)
    _write(classifier.state_dict(), blueprint, folder)


def _write_for_timm(classifier: Classifier, blueprint: Mapping[str, Any], pixels: np.ndarray, folder: Path) -> None:
    """Write both files, open them with timm, and compare the logits.

    Raises:
        ParityError: They differ.
        ValueError: The network has no single last layer in timm.
    """
    network = copy.deepcopy(classifier.backbone)
    name = _add_last_layer(network, last_linear(classifier.head))
    _write(network.state_dict(), blueprint, folder)
    write_text(folder / TIMM_CONFIG, json.dumps(_timm_config(network, name, blueprint), indent=2) + "\n")

    import timm

    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.from_numpy(pixels)
    mean, std = (torch.tensor(blueprint["normalise"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = classifier.eval().classify(classifier.embed(images)).numpy()
        actual = opened((images.float() / 255 - mean) / std).float().numpy()
    check_parity(expected, actual, [str(row) for row in range(len(pixels))], "timm")


def _add_last_layer(network: Any, linear: nn.Linear) -> str:
    """Give a network of timm its own last layer with the weights of `linear`; return the name of that layer.

    Raises:
        ValueError: It has none, or several.
    """
    before = set(network.state_dict())
    network.reset_classifier(linear.out_features)
    added = sorted(set(network.state_dict()) - before)
    name = added[0].removesuffix(".bias") if added else ""
    if added != [f"{name}.bias", f"{name}.weight"]:
        raise ValueError(f"timm gives it {len(added)} tensors for its last layer instead of weight and bias")
    layer = network.get_submodule(name)
    with torch.no_grad():
        layer.weight.copy_(linear.weight.view_as(layer.weight))  # a 1x1 convolution in some networks
        layer.bias.copy_(linear.bias)
    return name


def _timm_config(network: Any, last_layer: str, blueprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config.json` as timm reads it from a folder and from the Hugging Face hub."""
    known, preprocess = network.pretrained_cfg, blueprint["preprocess"]
    described = {key: known[key] for key in _KEPT if key in known}
    node = network_of(blueprint)
    arguments = {key: value for key, value in node.items() if key not in _NO_ARGUMENTS}
    if known.get("fixed_input_size"):
        arguments.setdefault("img_size", list(known["input_size"][1:]))
    licence = blueprint.get("initial_weights", {}).get("licence")
    return {
        "architecture": described.pop("architecture"),
        "num_classes": len(blueprint["classes"]),
        "num_features": network.num_features,
        "label_names": list(blueprint["classes"]),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **described,
            "num_classes": len(blueprint["classes"]),
            "classifier": last_layer,
            "input_size": [3, preprocess["size"], preprocess["size"]],
            "interpolation": preprocess["interpolation"],
            "crop_pct": preprocess["crop_fraction"] if preprocess["mode"] == "crop" else 1.0,
            "crop_mode": _CROP_MODES[preprocess["mode"]],
            **blueprint["normalise"],
            **({"license": licence} if licence else {}),
        },
    }


def _write(tensors: Mapping[str, torch.Tensor], blueprint: Mapping[str, Any], folder: Path) -> None:
    from safetensors.torch import save

    header = {key: json.dumps(blueprint[key], ensure_ascii=False) for key in _IN_HEADER if key in blueprint}
    licence = blueprint.get("initial_weights", {}).get("licence")
    # Tensors that share memory are refused by safetensors.
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_bytes(folder / WEIGHTS, save(own, {"format": "pt", **header, **({"license": licence} if licence else {})}))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep timm's lines out of the log, and its random numbers out of torch's generator."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.setLevel(level)
