"""The weights that a run starts from: none, a library's, a file's (`model.weights`) or a bundle's (`model.from`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from image_classifier.bundle import INFO_NAME, read_bundle
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.checkpoint import load_classifier, network_of
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.instantiate import NETWORKS, TRUSTED, instantiate
from image_classifier.modeling.backbones import no_pretrained, pretrained_preprocessing
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.weights import fit, inherit, load_weights, read_weights
from image_classifier.training.config import AUTO, ModelConfig

log = logging.getLogger(__name__)

_DOWNLOADING = ("pretrained", "weights")  # arguments of backbones by which a library downloads weights


def resolve_initial_weights(model: ModelConfig, image_size: Any) -> ModelConfig:
    """Check what a run starts from, before the data is read; return the settings with the network of `model.from`.

    Raises:
        ConfigError: Both `model.weights` and `model.from` are given, or there is no network.
        CheckpointError: The file or bundle is missing, damaged, or of another network; a download failed.
    """
    if model.weights and model.bundle:
        raise ConfigError("model.weights and model.from both give the initial weights", "leave one of them out")
    if model.bundle:
        return _with_network_of_bundle(model, image_size)
    if not model.backbone:
        raise ConfigError(
            "there is no model.backbone", "choose one such as model=convnet, or start from a bundle: model.from=NAME"
        )
    if model.weights:
        fit(build_backbone(model), read_weights(Path(model.weights).expanduser()), model.weights)
    elif _downloads(model.backbone):
        build_backbone(model)
    return model


def build_backbone(model: ModelConfig) -> nn.Module:
    """Return the network of `model.backbone`.

    Raises:
        CheckpointError: It wants pretrained weights that cannot be downloaded.
    """
    node = dict(model.backbone or {})
    if model.weights:
        node = {key: value for key, value in node.items() if key not in _DOWNLOADING}
    # What a file asks for has a shorter allow-list.
    known = NETWORKS if model.bundle else TRUSTED
    if _downloads(node):
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each of ten attempts
    try:
        backbone: nn.Module = instantiate(node, key="model.backbone", trusted=model.trusted_packages, known=known)
    except OSError as error:
        if not _downloads(node):
            raise
        raise no_pretrained(str(node.get("model_name") or node.get("name") or node["_target_"]), error) from error
    return backbone


def initial_weights(model: ModelConfig, classifier: Classifier, classes: tuple[str, ...]) -> None:
    """Load the configured weights into a fresh classifier; the log names what is trained from scratch."""
    if model.weights:
        load_weights(classifier, read_weights(Path(model.weights).expanduser()), model.weights)
    elif model.bundle:
        source, blueprint = load_classifier(_checkpoint(model), model.trusted_packages)
        inherit(classifier, source, classes, blueprint["classes"])


def own_preprocessing(model: ModelConfig) -> dict[str, Any]:
    """Return image_size, interpolation and crop_fraction with which the weights that a run starts from were trained.

    Those that are not known are left out.
    """
    if model.bundle:
        wanted = load_classifier(_checkpoint(model), model.trusted_packages)[1]["preprocess"]
        return {
            "image_size": wanted["size"],
            "interpolation": wanted["interpolation"],
            "crop_fraction": wanted["crop_fraction"],
        }
    settings = pretrained_settings(model)
    if not (settings["pretrained"] or settings.get("weights")):
        return {}
    return pretrained_preprocessing(build_backbone(model))


def pretrained_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of the backbone, with `pretrained` true where `model.weights` makes it so."""
    backbone = dict(model.backbone or {})
    return {**backbone, "pretrained": backbone.get("pretrained") or model.weights}


def _with_network_of_bundle(model: ModelConfig, image_size: Any) -> ModelConfig:
    """Return the settings with network, dropout and normalisation of the bundle, unless the last two are given."""
    path = _checkpoint(model)
    source, blueprint = load_classifier(path, model.trusted_packages)
    trained_size = blueprint["preprocess"]["size"]
    if image_size not in (trained_size, AUTO):
        # This refuses a size that the network cannot take.
        build_classifier(source.backbone, 2, image_size, *blueprint["normalise"].values())
        log.info(
            "from: %s was trained at %s px and this run is at %s: data.image_size=%s keeps its size",
            model.bundle,
            trained_size,
            image_size,
            trained_size,
        )
    log.info("from: network, normalisation and weights of %s (%d classes)", path, len(blueprint["classes"]))
    is_plain_checkpoint = path.suffix == ".ckpt" and path.name != "model.ckpt"
    return replace(
        model,
        backbone=network_of(blueprint),
        name=path.stem if is_plain_checkpoint else path.parent.name,
        head_dropout=model.head_dropout or blueprint["head_dropout"],
        normalise=blueprint["normalise"] if model.normalise == AUTO else model.normalise,
    )


def _checkpoint(model: ModelConfig) -> Path:
    """Return the `.ckpt` that `model.from` means, its hash verified where it has one."""
    path = pulled_checkpoint(str(model.bundle), Path(model.models_dir))
    if (path / INFO_NAME).is_file():
        bundle = read_bundle(path)
        bundle.verify(["model.ckpt"])
        return bundle.path("model.ckpt")
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{str(path)!r} cannot be trained further", "model.from takes a bundle or a .ckpt")
    return path


def _downloads(backbone: Mapping[str, Any]) -> bool:
    return any(backbone.get(key) for key in _DOWNLOADING)
