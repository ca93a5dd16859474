"""From the configuration to the weights that a run starts from: none, a library's, a file's (`model.weights`) or a bundle's (`model.from`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from image_classifier.bundle import INFO_NAME, read_bundle
from image_classifier.cli import hydra_app
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.checkpoint import load_classifier, network_of
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.modeling.backbones import no_pretrained
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.weights import fit, inherit, load_weights, read_weights

log = logging.getLogger(__name__)

_FETCHING = ("pretrained", "weights")  # arguments of backbones by which a library fetches weights


def resolve_initial_weights(config: Any) -> None:
    """Refuse a start that cannot be before the data is touched, and let the network of `model.from` take the configured one's place.

    Raises:
        ConfigError: Two starts are asked for, or there is no network.
        CheckpointError: The file or bundle is missing, damaged, or of another network; pretrained weights cannot be downloaded.
    """
    model = config.model
    if model.weights and model["from"]:
        raise ConfigError("model.weights and model.from are two starts of one run", "leave one of them out")
    if model["from"]:
        _adopt(config)
    elif not model.backbone:
        raise ConfigError(
            "there is no model.backbone", "choose one such as model=convnet, or start from a bundle: model.from=NAME"
        )
    elif model.weights:
        fit(build_backbone(config), read_weights(_path(config)), str(model.weights))
    elif _fetches(hydra_app.to_plain(model.backbone)):
        build_backbone(config)


def build_backbone(config: Any) -> Any:
    """The network of `model.backbone`; CheckpointError where it wants pretrained weights that cannot be downloaded."""
    node = hydra_app.without(config.model.backbone, *_FETCHING) if config.model.weights else config.model.backbone
    known = {"known": hydra_app.NETWORKS} if config.model["from"] else {}  # what a file asks for has a shorter list
    if not _fetches(hydra_app.to_plain(node)):
        return hydra_app.instantiate(node, trusted=config.trusted_packages, **known)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which tells of each of its ten tries
    try:
        return hydra_app.instantiate(node, trusted=config.trusted_packages, **known)
    except OSError as error:
        raise no_pretrained(str(node.get("model_name") or node.get("name") or node._target_), error) from error


def initial_weights(config: Any, classifier: Classifier, classes: tuple[str, ...]) -> None:
    """Fill a fresh classifier with the weights that the configuration names; what starts anew is named in the log."""
    if config.model.weights:
        load_weights(classifier, read_weights(_path(config)), str(config.model.weights))
    elif config.model["from"]:
        source, blueprint = load_classifier(_checkpoint(config), config.trusted_packages)
        inherit(classifier, source, classes, blueprint["classes"])


def pretrained_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the plain node `model`'s backbone, saying that it is pretrained where `model.weights` makes it so."""
    return {**plain["backbone"], "pretrained": plain["backbone"].get("pretrained") or plain["weights"]}


def _adopt(config: Any) -> None:
    """Put the network, dropout and normalisation of the bundle into the configuration; the last two unless given (dropout: above 0)."""
    path, model = _checkpoint(config), config.model
    source, blueprint = load_classifier(path, config.trusted_packages)
    size, own = config.data.image_size, blueprint["preprocess"]["size"]
    if size != own:
        build_classifier(
            source.backbone, 2, size, *blueprint["normalise"].values()
        )  # which refuses a size that it cannot take
        log.info(
            "from: %s was trained at %s px and this run is at %s: data.image_size=%s keeps its size",
            model["from"],
            own,
            size,
            own,
        )
    model.backbone = network_of(blueprint)
    model.name = path.stem if path.suffix == ".ckpt" and path.name != "model.ckpt" else path.parent.name
    model.head_dropout = model.head_dropout or blueprint["head_dropout"]
    if model.normalise == "auto":
        model.normalise = blueprint["normalise"]
    log.info("from: network, normalisation and weights of %s (%d classes)", path, len(blueprint["classes"]))


def _checkpoint(config: Any) -> Path:
    """The `.ckpt` that `model.from` means, unharmed."""
    path = pulled_checkpoint(str(config.model["from"]), Path(config.models_dir))
    if (path / INFO_NAME).is_file():
        bundle = read_bundle(path)
        bundle.verify(["model.ckpt"])
        return bundle.path("model.ckpt")
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{str(path)!r} cannot be trained further", "model.from takes a bundle or a .ckpt")
    return path


def _path(config: Any) -> Path:
    return Path(str(config.model.weights)).expanduser()


def _fetches(backbone: dict[str, Any]) -> bool:
    return any(backbone.get(key) for key in _FETCHING)
