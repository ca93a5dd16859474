"""Networks of other libraries without their classifier layer, and the normalisation that their weights expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from image_classifier.errors import CheckpointError, ConfigError


def torchvision_backbone(
    name: str, weights: str | None = None, small_images: bool = False, **arguments: Any
) -> nn.Module:
    """Return a classification network of torchvision that gives embeddings [N, D] instead of logits.

    Args:
        name: Its name in torchvision.
        weights: None, `DEFAULT` or one of torchvision's names of weights.
        small_images: Start a ResNet with a new 3x3 convolution of stride 1 and no pooling, as for the 32 px of CIFAR-10
            (He et al., 2016, section 4.2).
        arguments: Further arguments of the network.

    Raises:
        ConfigError: torchvision has no such network or weights, or it is not made for `small_images`.
        CheckpointError: The weights cannot be downloaded.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no network {name!r}", f"use one of {', '.join(known)}")
    sets = models.get_model_weights(name).__members__
    if weights is not None and weights not in sets:
        raise ConfigError(
            f"torchvision has no weights {weights!r} for {name}",
            f"use one of {', '.join(sets)}, or a file: model.weights=PATH",
        )
    try:
        network: nn.Module = models.get_model(name, weights=weights, **arguments)
    except OSError as error:
        raise no_pretrained(name, error) from error
    _remove_head(network, name)
    if small_images:
        _remove_downsampling(network, name)
    # Without a name of weights those of a file are meant: most have torchvision's first recipe.
    chosen = sets[weights] if weights else next(iter(sets.values()))
    transforms = chosen.transforms()
    config = {
        "architecture": name,
        "tag": chosen.name,
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "input_size": (3, *(2 * transforms.crop_size)),
        "crop_pct": transforms.crop_size[0] / transforms.resize_size[0],
        "interpolation": transforms.interpolation.value,
        "url": chosen.url,
        "origin_url": chosen.meta.get("recipe"),
        "license": chosen.meta.get("license"),
    }
    network.pretrained_cfg = config  # type: ignore[assignment]  # as timm keeps it
    return network


def _remove_downsampling(network: nn.Module, name: str) -> None:
    """Replace a ResNet's first convolution and pooling, which quarter the image, in place."""
    first = getattr(network, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(network, "maxpool"):
        raise ConfigError(
            f"model.backbone.small_images is for ResNets, not for {name}", "use model.backbone.name=resnet18"
        )
    network.conv1 = nn.Conv2d(3, first.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def no_pretrained(name: str, error: Exception) -> CheckpointError:
    """Return the error for pretrained weights that cannot be downloaded."""
    reason = str(error).partition(". ")[0][:120]
    hint = "check the connection, or give a file with model.weights=PATH"
    return CheckpointError(f"cannot download the pretrained weights of {name} ({reason})", hint)


def _remove_head(network: nn.Module, name: str) -> None:
    linears = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linears or getattr(network, "aux_logits", False):
        raise ConfigError(
            f"{name} of torchvision has no single last linear layer to replace",
            "use another network or model=timm",
        )
    network.set_submodule(linears[-1], nn.Identity())


def pretrained_preprocessing(backbone: nn.Module) -> dict[str, Any]:
    """Return the image_size, interpolation and crop_fraction that a backbone's weights were trained with, if known."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    found: dict[str, Any] = {}
    if config.get("input_size"):
        found["image_size"] = int(config["input_size"][-1])
    if config.get("interpolation") in ("bilinear", "bicubic"):
        found["interpolation"] = config["interpolation"]
    if config.get("crop_pct"):
        found["crop_fraction"] = min(1.0, round(float(config["crop_pct"]), 4))
    return found


def pretrained_normalise(backbone: nn.Module, settings: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Return the mean and standard deviation that the backbone's weights were trained with; None from scratch.

    Both are per channel, of pixels in 0..1. `settings` are the backbone's arguments: it has weights where one of
    `pretrained` and `weights` is set.
    """
    if not (settings.get("pretrained") or settings.get("weights")):
        return None
    config = getattr(backbone, "pretrained_cfg", None) or {}
    if "mean" not in config or "std" not in config:
        return None
    return [float(value) for value in config["mean"]], [float(value) for value in config["std"]]
