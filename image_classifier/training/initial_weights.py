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
from image_classifier.inference.checkpoint import ENSEMBLE, load_classifier, network_of
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.instantiate import NETWORKS, TRUSTED, instantiate
from image_classifier.modeling.backbones import no_pretrained, pretrained_preprocessing
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.weight_origin import (
    SCRATCH,
    WeightOrigin,
    bundle_origin,
    file_origin,
    library_origin,
    licence_warning,
)
from image_classifier.modeling.weights import fit, inherit, load_weights, read_weights
from image_classifier.training.config import AUTO, ModelConfig

log = logging.getLogger(__name__)

_DOWNLOADING = ("pretrained", "weights")  # arguments of backbones by which a library downloads weights


def resolve_initial_weights(model: ModelConfig, image_size: Any) -> ModelConfig:
    """Check what a run starts from, before the data is read; return the settings with the network of `model.from`.

    A licence that restricts the weights is logged as a warning.

    Raises:
        ConfigError: Both `model.weights` and `model.from` are given, or there is no network.
        CheckpointError: The file or bundle is missing, damaged, or of another network; a download failed.
    """
    if model.weights and model.bundle:
        raise ConfigError("model.weights and model.from both give the initial weights", "leave one of them out")
    if not model.bundle and not model.backbone:
        raise ConfigError(
            "there is no model.backbone", "choose one such as model=convnet, or start from a bundle: model.from=NAME"
        )
    model, origin = _with_network_of_bundle(model, image_size) if model.bundle else (model, _checked_origin(model))
    if warning := licence_warning(origin):
        log.warning(warning)
    return model


def _checked_origin(model: ModelConfig) -> WeightOrigin:
    """Try the file or the download that the backbone starts from, and return its origin."""
    if model.weights:
        path = Path(model.weights).expanduser()
        fit(build_backbone(model), read_weights(path), model.weights)
        return file_origin(path)
    return _library_origin(model, build_backbone(model)) if _downloads(model.backbone or {}) else WeightOrigin(SCRATCH)


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


def initial_weights(model: ModelConfig, classifier: Classifier, classes: tuple[str, ...]) -> WeightOrigin:
    """Load the configured weights into a fresh classifier, and return their origin; the log names what is new."""
    if model.weights:
        path = Path(model.weights).expanduser()
        load_weights(classifier, read_weights(path), model.weights)
        return file_origin(path)
    if model.bundle:
        path = _checkpoint(model)
        source, blueprint = load_classifier(path, model.trusted_packages)
        inherit(classifier, source, classes, blueprint["classes"])
        return _bundle_origin(path, blueprint)
    return _library_origin(model, classifier.backbone)


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


def _library_origin(model: ModelConfig, backbone: nn.Module) -> WeightOrigin:
    node = model.backbone or {}
    config = getattr(backbone, "pretrained_cfg", None)
    known = config if isinstance(config, Mapping) else {}
    return library_origin(str(node.get("_target_")), known) if _downloads(node) else WeightOrigin(SCRATCH)


def _bundle_origin(path: Path, blueprint: Mapping[str, Any]) -> WeightOrigin:
    return bundle_origin(_name(path), blueprint.get("initial_weights"))


def _name(path: Path) -> str:
    """Return the name of the bundle of a `model.ckpt`, or that of a checkpoint of a run."""
    return path.parent.name if path.name == "model.ckpt" else path.stem


def _with_network_of_bundle(model: ModelConfig, image_size: Any) -> tuple[ModelConfig, WeightOrigin]:
    """Return the settings with network, dropout and normalisation of the bundle, unless the last two are given.

    The second value is the origin of its weights.
    """
    path = _checkpoint(model)
    source, blueprint = load_classifier(path, model.trusted_packages)
    if ENSEMBLE in blueprint:
        raise CheckpointError(
            f"{str(path)!r} holds {blueprint[ENSEMBLE]} networks, and a training starts from one",
            "start from that of one fold: model.from=runs/NAME/folds/models/NAME-fold-0",
        )
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
    resolved = replace(
        model,
        backbone=network_of(blueprint),
        name=_name(path),
        head_dropout=model.head_dropout or blueprint["head_dropout"],
        normalise=blueprint["normalise"] if model.normalise == AUTO else model.normalise,
    )
    return resolved, _bundle_origin(path, blueprint)


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
