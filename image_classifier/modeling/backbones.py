"""Networks of other libraries with their classifier layer taken off, and what their weights expect of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from image_classifier.errors import ConfigError


def torchvision_backbone(name: str, weights: str | None = None, **arguments: Any) -> nn.Module:
    """Any classification network of torchvision, returning embeddings [N, D] instead of logits.

    `weights` is null, `DEFAULT` or a name torchvision knows; ConfigError names the networks where `name` is none.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no network {name!r}", f"choose one of {', '.join(known)}")
    network = models.get_model(name, weights=weights, **arguments)
    _take_head_off(network, name)
    if weights is not None:
        transforms = models.get_weight(f"{models.get_model_weights(name).__name__}.{weights}").transforms()
        network.pretrained_cfg = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
    return network


def _take_head_off(network: nn.Module, name: str) -> None:
    linears = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linears or getattr(network, "aux_logits", False):
        raise ConfigError(f"{name} of torchvision has no single last linear layer to replace", "choose another network or use model=timm")
    network.set_submodule(linears[-1], nn.Identity())


def pretrained_normalise(backbone: nn.Module, settings: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation per channel (of pixels in 0..1) that the backbone's weights were trained with; None from scratch."""
    if not (settings.get("pretrained") or settings.get("weights")):
        return None
    card = getattr(backbone, "pretrained_cfg", None) or {}
    if "mean" not in card or "std" not in card:
        return None
    return [float(value) for value in card["mean"]], [float(value) for value in card["std"]]
