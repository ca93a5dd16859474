"""Attribution maps by gradients: where in an image the evidence for a class lies. Needs torch.

The gradients of the class's logit are taken at a layer whose output still has positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from image_classifier.modeling.attribution_rules import DetachedAttention
from image_classifier.modeling.classifier import Classifier, in_evaluation
from image_classifier.modeling.ensemble import EnsembleClassifier

_MIN_SIDE = 4  # positions a side: a coarser map does not locate anything
_MAX_EXTRA_TOKENS = 16  # tokens before those of the image: class, distillation, registers
# The map before a pooling layer is finer and contains the same.
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)

# A layer's output [1, ...] -> planes [C, h, w].
Arrange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Attribution:
    """A heat map of the evidence for a class.

    Args:
        heat: float32 [H, W] in 0..1 with the maximum 1, or all 0 where nothing speaks for the class.
        method: The name of the method.
    """

    heat: np.ndarray
    method: str


def attribution_map(classifier: Classifier, pixels: np.ndarray, target: int) -> Attribution:
    """Return where in an image, pixels uint8 [3, H, W], the evidence for the class `target` lies.

    Convolutional networks: Grad-CAM (Selvaraju et al., 2017). Transformers: the relevance of each token at the input
    (Ali et al., 2022). Networks without positions: gradients of the pixels (Simonyan et al., 2014). With test-time
    augmentation the plain view is explained. Of an ensemble it is the mean of its members' maps. The classifier is not
    changed.
    """
    if isinstance(classifier, EnsembleClassifier):
        maps = [attribution_map(member, pixels, target) for member in classifier.members]
        mean = np.mean([each.heat for each in maps], axis=0)
        return Attribution(_scaled(torch.from_numpy(mean), pixels.shape[1:]), maps[0].method)
    with in_evaluation(classifier), torch.inference_mode(False), torch.enable_grad():
        images = torch.tensor(pixels[None], dtype=torch.float32, device=classifier.scale.device, requires_grad=True)
        layers, pixel_gradient = _gradients(classifier, images, target)
        convolves = _convolves(classifier.backbone)
        if not layers:
            heat = _of_pixels(pixel_gradient)
            method = "input gradient"
        elif convolves and not layers[-1].is_tokens:
            # Grad-CAM: the last map, its channels weighted by their mean gradient, [C, 1, 1].
            heat = _evidence(layers[-1].values, layers[-1].gradient.mean(dim=(1, 2), keepdim=True))
            method = "Grad-CAM"
        else:
            # Token relevance: gradient times value at the first layer of tokens, with attention weights held fixed.
            with DetachedAttention():
                detached, _ = _gradients(classifier, images, target)
            first = next((layer for layer in detached if layer.is_tokens or not convolves), layers[-1])
            heat = _evidence(first.values, first.gradient)
            method = "token relevance"
    return Attribution(_scaled(heat, pixels.shape[1:]), method)


def _convolves(backbone: nn.Module) -> bool:
    """Return whether a convolution reaches beyond its own patch; those of a transformer's patches do not."""
    sizes = [(module.kernel_size, module.stride) for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    return any(size > stride for kernel, strides in sizes for size, stride in zip(kernel, strides, strict=True))


def _evidence(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the positive evidence at each position, [h, w], of values and their weights [C, h, w]."""
    return (values * weights).sum(dim=0).relu()


@dataclass(frozen=True)
class _Layer:
    """One output whose positions can be arranged as a map."""

    output: torch.Tensor
    arrange: Arrange
    is_tokens: bool


class _Watch:
    """A forward hook that keeps the outputs with positions, in the order they are computed."""

    def __init__(self, images: torch.Tensor) -> None:
        self.layers: list[_Layer] = []
        self._seen = {id(images): images}  # the tensors too, so that no id is used twice
        self._grids: list[tuple[int, int]] = []
        self._lengths: set[int] = set()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or id(output) in self._seen:
            return  # a container's output is that of its last module
        self._seen[id(output)] = output
        layer = self._arranged(output) if output.requires_grad and len(output) == 1 else None
        if layer and not isinstance(module, _POOLS):
            self.layers.append(layer)

    def _arranged(self, output: torch.Tensor) -> _Layer | None:
        if output.ndim == 4:
            return self._map(output)
        return self._tokens(output) if output.ndim == 3 else None

    def _map(self, output: torch.Tensor) -> _Layer | None:
        """Return a map [1, C, h, w] or [1, h, w, C]: images are square, so the two equal sides are height and width."""
        channels_first = output.shape[2] == output.shape[3]
        side = output.shape[2] if channels_first else output.shape[1]
        if side < _MIN_SIDE or side in self._lengths or not (channels_first or side == output.shape[2]):
            return None  # too coarse, or attention's table of tokens by tokens, or not a map
        self._grids.append((side, side))
        arrange: Arrange = (lambda tensor: tensor[0]) if channels_first else (lambda tensor: tensor[0].permute(2, 0, 1))
        return _Layer(output, arrange, is_tokens=False)

    def _tokens(self, output: torch.Tensor) -> _Layer | None:
        """Return tokens [1, T, D] whose last ones form the image's grid: that of a map before them, or a square."""
        length = output.shape[1]
        square = (isqrt(length), isqrt(length))
        # Grids that the tokens can hold, the latest first; a square without extra tokens is the last resort.
        grids = [
            grid
            for grid in (*reversed(self._grids), square)
            if 0 <= length - grid[0] * grid[1] <= (0 if grid is square else _MAX_EXTRA_TOKENS)
        ]
        if not grids or grids[0][0] < _MIN_SIDE:
            return None
        self._lengths.add(length)
        grid = grids[0]
        extra = length - grid[0] * grid[1]
        # [1, T, D] -> [T', D] -> [D, h, w]
        return _Layer(output, lambda tensor: tensor[0, extra:].T.unflatten(1, grid), is_tokens=True)


@contextmanager
def _watched(backbone: nn.Module, images: torch.Tensor) -> Iterator[_Watch]:
    watch = _Watch(images)
    hooks = [module.register_forward_hook(watch) for module in backbone.modules()]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _LayerGradient:
    """A layer's values at each position and the gradient of the logit there, both [C, h, w]."""

    values: torch.Tensor
    gradient: torch.Tensor
    is_tokens: bool


def _gradients(classifier: Classifier, images: torch.Tensor, target: int) -> tuple[list[_LayerGradient], torch.Tensor]:
    """Return the layers on which the logit depends, first to last, and the gradient of the pixels [1, 3, H, W].

    Behind the last attention of a class token the logit does not depend on the patches: such layers are left out.
    """
    with _watched(classifier.backbone, images) as watch:
        logit = classifier.classify(classifier.embed(images))[0, target]
    outputs = [layer.output for layer in watch.layers]
    of_pixels, *gradients = torch.autograd.grad(logit, [images, *outputs], allow_unused=True)
    layers = [
        _LayerGradient(layer.arrange(layer.output.detach()), layer.arrange(gradient), layer.is_tokens)
        for layer, gradient in zip(watch.layers, gradients, strict=True)
        if gradient is not None
    ]
    return [layer for layer in layers if layer.gradient.any()], of_pixels


def _of_pixels(gradient: torch.Tensor) -> torch.Tensor:
    """Return the largest slope among a pixel's channels (Simonyan et al., 2014), smoothed a little, [H, W]."""
    slopes = gradient[0].abs().amax(dim=0, keepdim=True)
    reach = max(1, slopes.shape[1] // 32)
    return functional.avg_pool2d(slopes, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[0]


def _scaled(heat: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Return evidence [h, w] as float32 [H, W] with the maximum 1, or all 0."""
    resized = functional.interpolate(heat[None, None].float(), size=shape, mode="bilinear", align_corners=False)[0, 0]
    maximum = float(resized.max())
    scaled = resized / maximum if maximum > 0 else torch.zeros_like(resized)
    return scaled.clamp(0, 1).cpu().numpy()
