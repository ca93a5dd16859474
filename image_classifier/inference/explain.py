"""Where in an image the evidence for a class lies: gradients of its logit at the last place of a network that still knows places."""

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

from image_classifier.modeling.classifier import Classifier, in_evaluation

_SMALLEST = 4  # places a side: a coarser map says nothing of where
_MOST_EXTRA = 16  # tokens before those of the image: class, distillation, registers
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)  # the map before one is finer and says the same

# A layer's output [1, ...] -> planes [C, h, w].
Arrange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Explanation:
    """`heat` float32 [H, W] in 0..1, its largest value 1, or all 0 where nothing speaks for the class; `method` is how it was found."""

    heat: np.ndarray
    method: str


def explain(classifier: Classifier, pixels: np.ndarray, target: int) -> Explanation:
    """What of an image, pixels uint8 [3, H, W], speaks for the class `target`; the classifier is left as it was.

    Convolutional networks: Grad-CAM (Selvaraju et al., 2017). Transformers: gradient times activation of each token, at the last layer whose
    patch tokens still reach the answer. Networks without places: gradients of the pixels. Of a classifier with test-time augmentation the
    plain view is explained.
    """
    with in_evaluation(classifier), torch.inference_mode(False), torch.enable_grad():
        images = torch.tensor(pixels[None], dtype=torch.float32, device=classifier.scale.device, requires_grad=True)
        with _watched(classifier.backbone, images) as watch:
            logit = classifier.classify(classifier.embed(images))[0, target]
        gradients = torch.autograd.grad(logit, [images, *(layer.output for layer in watch.layers)], allow_unused=True)
    heat, method = _last_evidence(watch.layers, gradients[1:]) or (_of_pixels(gradients[0]), "input gradient")
    return Explanation(_scaled(heat, pixels.shape[1:]), method)


@dataclass(frozen=True)
class _Layer:
    """One output in which places can be told apart."""

    output: torch.Tensor
    arrange: Arrange
    tokens: bool


class _Watch:
    """A forward hook that keeps the outputs with places, in the order they are computed."""

    def __init__(self, images: torch.Tensor) -> None:
        self.layers: list[_Layer] = []
        self._seen = {id(images): images}  # the tensors too, so that no id is given twice
        self._grids: list[tuple[int, int]] = []
        self._lengths: set[int] = set()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or id(output) in self._seen:
            return  # a container's output is that of its last module
        self._seen[id(output)] = output
        found = self._arranged(output) if output.requires_grad and len(output) == 1 else None
        if found and not isinstance(module, _POOLS):
            self.layers.append(found)

    def _arranged(self, output: torch.Tensor) -> _Layer | None:
        if output.ndim == 4:
            return self._map(output)
        return self._tokens(output) if output.ndim == 3 else None

    def _map(self, output: torch.Tensor) -> _Layer | None:
        """Channels first or last; images are square, so the two equal sides are height and width."""
        first = output.shape[2] == output.shape[3]
        side = output.shape[2] if first else output.shape[1]
        if side < _SMALLEST or side in self._lengths or not (first or side == output.shape[2]):
            return None  # too coarse, or attention's own table of tokens by tokens, or no map
        self._grids.append((side, side))
        return _Layer(output, (lambda tensor: tensor[0]) if first else (lambda tensor: tensor[0].permute(2, 0, 1)), tokens=False)

    def _tokens(self, output: torch.Tensor) -> _Layer | None:
        """Tokens [1, T, D] of which the last are those of an image's grid, known from the maps before them or else square."""
        length = output.shape[1]
        square = (isqrt(length), isqrt(length))
        grids = [grid for grid in (*reversed(self._grids), square) if 0 <= length - grid[0] * grid[1] <= (0 if grid is square else _MOST_EXTRA)]
        if not grids or grids[0][0] < _SMALLEST:
            return None
        self._lengths.add(length)
        grid, extra = grids[0], length - grids[0][0] * grids[0][1]
        return _Layer(output, lambda tensor: tensor[0, extra:].T.unflatten(1, grid), tokens=True)


@contextmanager
def _watched(backbone: nn.Module, images: torch.Tensor) -> Iterator[_Watch]:
    watch = _Watch(images)
    hooks = [module.register_forward_hook(watch) for module in backbone.modules()]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _last_evidence(layers: list[_Layer], gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, str] | None:
    """Evidence [h, w] of the last layer whose places reach the answer: behind a class token's last attention the patches do not."""
    for layer, gradient in zip(reversed(layers), reversed(gradients), strict=True):
        slopes = None if gradient is None else layer.arrange(gradient)
        if slopes is not None and bool(slopes.any()):
            weights = slopes if layer.tokens else slopes.mean(dim=(1, 2), keepdim=True)
            evidence = (weights * layer.arrange(layer.output.detach())).sum(dim=0).relu()
            return evidence, "token gradients" if layer.tokens else "Grad-CAM"
    return None


def _of_pixels(gradient: torch.Tensor | None) -> torch.Tensor:
    """The largest slope of a pixel's channels (Simonyan et al., 2014), evened out a little, [H, W]."""
    assert gradient is not None
    slopes = gradient[0].abs().amax(dim=0, keepdim=True)
    reach = max(1, slopes.shape[1] // 32)
    return functional.avg_pool2d(slopes, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[0]


def _scaled(heat: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Evidence [h, w] as float32 [H, W] with the largest value 1, or all 0."""
    spread = functional.interpolate(heat[None, None].float(), size=shape, mode="bilinear", align_corners=False)[0, 0]
    top = float(spread.max())
    return (spread / top if top > 0 else torch.zeros_like(spread)).clamp(0, 1).cpu().numpy()
