"""The network of the CIFAR-10 speed records: a whitened first layer, few wide blocks, fast on small images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from image_classifier.errors import ConfigError

_MIN_VARIANCE = 5e-4  # of a whitened direction: below it is noise, which must not be amplified


class WhitenedNet(nn.Module):
    """Whitening convolution, blocks that halve the image, global max pool: images [N, 3, H, W] -> embeddings [N, D].

    Source: airbench (Jordan, 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", sections 3.1 and 3.2). The
    whitening filters are computed from the training images (`fit_to`) and not trained; of the norms only the biases are
    trained.

    Args:
        widths: Channels of the blocks, one entry a block; the last is D.
        convolutions: 3x3 convolutions a block.
        residual: Add the output of a block's second convolution to that of its last.
        whitening_size: Height and width of the whitening filters in pixels.
        norm_momentum: Weight of the old value of a running statistic at each step.

    Raises:
        ConfigError: A value is invalid.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 256, 256),
        convolutions: int = 2,
        residual: bool = False,
        whitening_size: int = 2,
        norm_momentum: float = 0.6,
    ) -> None:
        super().__init__()
        _check(widths, convolutions, residual, whitening_size, norm_momentum)
        filters = 3 * whitening_size**2
        self.whiten = nn.Conv2d(3, 2 * filters, whitening_size)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.blocks = nn.Sequential(
            *(
                _Block(inputs, outputs, convolutions, residual, norm_momentum)
                for inputs, outputs in pairwise((2 * filters, *widths))
            )
        )
        # A head with torch's initial weights then gives logits of standard deviation 1 / sqrt(D).
        self.scale = math.sqrt(3 / widths[-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.blocks(functional.gelu(self.whiten(images)))
        # Not amax: its gradient looks for positions that equal the maximum. Where a compiled GELU rounds differently it
        # finds none, and divides by 0.
        height, width = map(int, features.shape[2:])  # plain numbers, which the exporter wants
        return functional.max_pool2d(features, (height, width)).flatten(1) * self.scale

    @torch.no_grad()
    def fit_to(self, images: torch.Tensor) -> None:
        """Set the whitening filters from normalised training images [N, 3, H, W].

        They are the eigenvectors of the images' patches, scaled to equal variance, and the same negated.
        """
        size = self.whiten.kernel_size[0]
        # Patches [P, 3 * size * size], at most a million.
        patches = functional.unfold(images.float(), size).transpose(1, 2).reshape(-1, 3 * size**2)
        patches = patches[:: max(1, len(patches) // 1_000_000)].double()
        # Eigenvectors of their covariance, those of the largest variance first.
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + _MIN_VARIANCE).sqrt()).T.flip(0).reshape(-1, 3, size, size)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def _check(widths: Sequence[int], convolutions: int, residual: bool, whitening_size: int, norm_momentum: float) -> None:
    if not widths or min(widths) < 1:
        raise ConfigError(
            f"invalid model.backbone.widths={list(widths)}",
            "use one number of at least 1 per block, such as [64,256,256]",
        )
    min_convolutions = 3 if residual else 1
    if convolutions < min_convolutions:
        raise ConfigError(
            f"invalid model.backbone.convolutions={convolutions}",
            f"use {min_convolutions} or more (residual={residual})",
        )
    if whitening_size < 1:
        raise ConfigError(f"invalid model.backbone.whitening_size={whitening_size}", "use 1 or more")
    if not 0 <= norm_momentum < 1:
        raise ConfigError(f"invalid model.backbone.norm_momentum={norm_momentum}", "use a number from 0 to below 1")


class _Block(nn.Module):
    """Convolution, max pool, norm, GELU; then the same without the pool."""

    def __init__(self, inputs: int, outputs: int, convolutions: int, residual: bool, momentum: float) -> None:
        super().__init__()
        widths = (inputs, *[outputs] * (convolutions - 1))
        self.convolutions = nn.ModuleList(_convolution(width, outputs) for width in widths)
        self.norms = nn.ModuleList(_norm(outputs, momentum) for _ in widths)
        self.residual = residual

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shortcut = None
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            features = convolution(features)
            if number == 0:
                features = functional.max_pool2d(features, 2)
            features = norm(features)
            if number == len(self.norms) - 1 and shortcut is not None:
                features = features + shortcut
            features = functional.gelu(features)
            if number == 0 and self.residual:
                shortcut = features
        return features


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution that starts as the identity (section 3.2)."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight.data[: min(inputs, outputs)])
    return convolution


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=1 - momentum)
    norm.weight.requires_grad_(False)
    return norm
