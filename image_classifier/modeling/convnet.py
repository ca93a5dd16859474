"""A configurable convolutional network: blocks of conv, norm, activation and pool, then fully connected layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from image_classifier.errors import ConfigError

_LAYERS = ("conv", "norm", "activation", "pool")
_ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}


class ConvNet(nn.Sequential):
    """Convolutional blocks that halve the image, then fully connected layers: pixels [N, 3, H, W] -> embeddings [N, D].

    Args:
        image_size: Height and width of the images in pixels.
        channels: Output channels of each 3x3 convolution, one entry a block.
        order: Layers of a block in the order they run: conv, norm, activation, pool (each at most once, conv required).
        activation: One of relu, leaky_relu, gelu, silu, elu, tanh.
        dropout: Probability after each block; one number for all blocks or one a block.
        global_pool: Average the last feature map; otherwise it is flattened.
        hidden: Widths of the fully connected layers, each followed by the activation.
        hidden_dropout: Probability after each fully connected layer; one number or one per layer.

    Raises:
        ConfigError: A value is invalid, or the image is too small for so many pools.
    """

    def __init__(
        self,
        image_size: int,
        channels: Sequence[int] = (32, 64, 128),
        order: Sequence[str] = _LAYERS,
        activation: str = "relu",
        dropout: float | Sequence[float] = 0.0,
        global_pool: bool = True,
        hidden: Sequence[int] = (),
        hidden_dropout: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        _check(image_size, channels, order, activation)
        rates = _per_layer(dropout, len(channels), "model.backbone.dropout")
        widths = (3, *channels)
        for number, rate in enumerate(rates):
            self.append(_block(widths[number], widths[number + 1], order, activation, rate))
        self.append(nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity())
        self.append(nn.Flatten())
        side = image_size >> (len(channels) if "pool" in order else 0)
        features = channels[-1] * (1 if global_pool else side * side)
        for width, rate in zip(
            hidden, _per_layer(hidden_dropout, len(hidden), "model.backbone.hidden_dropout"), strict=True
        ):
            self.append(nn.Sequential(nn.Linear(features, width), _ACTIVATIONS[activation](), *_dropout(rate)))
            features = width


def _block(inputs: int, outputs: int, order: Sequence[str], activation: str, dropout: float) -> nn.Sequential:
    names = list(order)
    conv = names.index("conv")
    # A norm right after the convolution would cancel its bias.
    bias = names[(conv + 1) % len(names)] != "norm"
    has_norm_after = "norm" in names and conv < names.index("norm")
    normalised = outputs if has_norm_after else inputs
    layers: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias),
        "norm": lambda: nn.BatchNorm2d(normalised),
        "activation": _ACTIVATIONS[activation],
        "pool": lambda: nn.MaxPool2d(2),
    }
    return nn.Sequential(*(layers[name]() for name in order), *_dropout(dropout))


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []


def _per_layer(value: float | Sequence[float], layers: int, key: str) -> list[float]:
    """Return one dropout rate per layer, from one number or from one per layer."""
    values = [float(value)] * layers if isinstance(value, int | float) else [float(item) for item in value]
    if len(values) != layers:
        raise ConfigError(f"{key} has {len(values)} values for {layers} layers", "give one number, or one per layer")
    if not all(0 <= item < 1 for item in values):
        raise ConfigError(f"{key} must be at least 0 and below 1", f"got {values}")
    return values


def _check(image_size: int, channels: Sequence[int], order: Sequence[str], activation: str) -> None:
    if not channels:
        raise ConfigError("model.backbone.channels is empty", "give one number a block, such as [32,64,128]")
    if "conv" not in order or len(set(order)) != len(order) or not set(order) <= set(_LAYERS):
        raise ConfigError(
            f"model.backbone.order={list(order)} is not an order of {', '.join(_LAYERS)}",
            "name each layer once, and conv always",
        )
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"invalid model.backbone.activation={activation!r}", f"use one of {', '.join(_ACTIVATIONS)}")
    smallest = 2 ** len(channels) if "pool" in order else 1
    if image_size < smallest:
        raise ConfigError(
            f"data.image_size={image_size} is too small for {len(channels)} blocks that each halve it",
            f"use data.image_size={smallest} or more, or fewer model.backbone.channels",
        )


class MLP(nn.Sequential):
    """Fully connected layers on the flattened pixels, a baseline: pixels [N, 3, H, W] -> embeddings [N, D]."""

    def __init__(self, image_size: int, hidden: Sequence[int] = (512, 256), dropout: float = 0.0) -> None:
        widths = (3 * image_size * image_size, *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), *_dropout(dropout)]
        super().__init__(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = super().forward(images.contiguous())
        return embeddings
