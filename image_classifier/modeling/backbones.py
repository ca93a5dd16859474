"""Networks of other libraries with their classifier layer taken off, and what their weights expect of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from image_classifier.errors import CheckpointError, ConfigError


def torchvision_backbone(
    name: str, weights: str | None = None, small_images: bool = False, **arguments: Any
) -> nn.Module:
    """Any classification network of torchvision, returning embeddings [N, D] instead of logits.

    `weights` is null, `DEFAULT` or a name torchvision knows; ConfigError names the networks where `name` is none. With `small_images` a
    ResNet begins with a fresh 3x3 convolution of stride 1 and no pooling, as for the 32 px of CIFAR-10 (He et al., 2016, section 4.2).
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no network {name!r}", f"choose one of {', '.join(known)}")
    sets = models.get_model_weights(name).__members__
    if weights is not None and weights not in sets:
        raise ConfigError(
            f"torchvision has no weights {weights!r} for {name}",
            f"choose one of {', '.join(sets)}, or a file: model.weights=PATH",
        )
    try:
        network = models.get_model(name, weights=weights, **arguments)
    except OSError as error:
        raise no_pretrained(name, error) from error
    _take_head_off(network, name)
    if small_images:
        _keep_size(network, name)
    transforms = sets[weights or "DEFAULT"].transforms()
    network.pretrained_cfg = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
    return network


def _keep_size(network: nn.Module, name: str) -> None:
    first = getattr(network, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(network, "maxpool"):
        raise ConfigError(
            f"model.backbone.small_images is for ResNets, and {name} is none", "choose model.backbone.name=resnet18"
        )
    network.conv1 = nn.Conv2d(3, first.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def no_pretrained(name: str, error: Exception) -> CheckpointError:
    """What to say where pretrained weights cannot be had."""
    reason = str(error).partition(". ")[0][:120]
    hint = "check the connection, or give a file with model.weights=PATH"
    return CheckpointError(f"the pretrained weights of {name} cannot be downloaded ({reason})", hint)


def _take_head_off(network: nn.Module, name: str) -> None:
    linears = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linears or getattr(network, "aux_logits", False):
        raise ConfigError(
            f"{name} of torchvision has no single last linear layer to replace",
            "choose another network or use model=timm",
        )
    network.set_submodule(linears[-1], nn.Identity())


def pretrained_normalise(backbone: nn.Module, settings: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation per channel (of pixels in 0..1) that the backbone's weights were trained with; None from scratch.

    `settings` are the backbone's arguments; one of `pretrained` and `weights` says that it has weights.
    """
    if not (settings.get("pretrained") or settings.get("weights")):
        return None
    card = getattr(backbone, "pretrained_cfg", None) or {}
    if "mean" not in card or "std" not in card:
        return None
    return [float(value) for value in card["mean"]], [float(value) for value in card["std"]]
