"""Where in an image the evidence for a class lies: gradients of its logit at a layer of the network that knows places."""

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

_SMALLEST = 4  # places a side: a coarser map says nothing of where
_MOST_EXTRA = 16  # tokens before those of the image: class, distillation, registers
_POOLS = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
)  # the map before one is finer and says the same

# A layer's output [1, ...] -> planes [C, h, w].
Arrange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Attribution:
    """`heat` float32 [H, W] in 0..1, its largest value 1, or all 0 where nothing speaks for the class; `method` is how it was found."""

    heat: np.ndarray
    method: str


def explain(classifier: Classifier, pixels: np.ndarray, target: int) -> Attribution:
    """What of an image, pixels uint8 [3, H, W], speaks for the class `target`; the classifier is left as it was.

    Convolutional networks: Grad-CAM (Selvaraju et al., 2017). Transformers: the relevance of each token as it enters (Ali et al., 2022).
    Networks without places: gradients of the pixels. Of a classifier with test-time augmentation the plain view is explained.
    """
    with in_evaluation(classifier), torch.inference_mode(False), torch.enable_grad():
        images = torch.tensor(pixels[None], dtype=torch.float32, device=classifier.scale.device, requires_grad=True)
        places, slopes = _found(classifier, images, target)
        convolves = _convolves(classifier.backbone)
        if not places:
            heat, method = _of_pixels(slopes), "input gradient"
        elif convolves and not places[-1].tokens:
            heat, method = _evidence(places[-1].values, places[-1].slopes.mean(dim=(1, 2), keepdim=True)), "Grad-CAM"
        else:
            with DetachedAttention():
                held, _ = _found(classifier, images, target)
            first = next((one for one in held if one.tokens or not convolves), places[-1])
            heat, method = _evidence(first.values, first.slopes), "token relevance"
    return Attribution(_scaled(heat, pixels.shape[1:]), method)


def _convolves(backbone: nn.Module) -> bool:
    """Whether a convolution reaches beyond its own patch; those of a transformer's patches do not."""
    sizes = [(module.kernel_size, module.stride) for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    return any(size > stride for kernel, strides in sizes for size, stride in zip(kernel, strides, strict=True))


def _evidence(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What speaks for the class at each place, [h, w], of values and their weights [C, h, w]."""
    return (values * weights).sum(dim=0).relu()


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
        return _Layer(
            output, (lambda tensor: tensor[0]) if first else (lambda tensor: tensor[0].permute(2, 0, 1)), tokens=False
        )

    def _tokens(self, output: torch.Tensor) -> _Layer | None:
        """Tokens [1, T, D] of which the last are those of an image's grid, known from the maps before them or else square."""
        length = output.shape[1]
        square = (isqrt(length), isqrt(length))
        grids = [
            grid
            for grid in (*reversed(self._grids), square)
            if 0 <= length - grid[0] * grid[1] <= (0 if grid is square else _MOST_EXTRA)
        ]
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


@dataclass(frozen=True)
class _Places:
    """What a layer holds at each place, and the slopes of the logit there, both [C, h, w]."""

    values: torch.Tensor
    slopes: torch.Tensor
    tokens: bool


def _found(classifier: Classifier, images: torch.Tensor, target: int) -> tuple[list[_Places], torch.Tensor]:
    """Of images [1, 3, H, W] the layers whose places reach the answer, first to last, and the slopes of the pixels.

    Behind a class token's last attention the patches do not reach it.
    """
    with _watched(classifier.backbone, images) as watch:
        logit = classifier.classify(classifier.embed(images))[0, target]
    of_images, *gradients = torch.autograd.grad(
        logit, [images, *(layer.output for layer in watch.layers)], allow_unused=True
    )
    reached = [
        (layer, gradient) for layer, gradient in zip(watch.layers, gradients, strict=True) if gradient is not None
    ]
    places = [
        _Places(layer.arrange(layer.output.detach()), layer.arrange(gradient), layer.tokens)
        for layer, gradient in reached
    ]
    return [one for one in places if one.slopes.any()], of_images


def _of_pixels(gradient: torch.Tensor) -> torch.Tensor:
    """The largest slope of a pixel's channels (Simonyan et al., 2014), evened out a little, [H, W]."""
    slopes = gradient[0].abs().amax(dim=0, keepdim=True)
    reach = max(1, slopes.shape[1] // 32)
    return functional.avg_pool2d(slopes, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[0]


def _scaled(heat: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Evidence [h, w] as float32 [H, W] with the largest value 1, or all 0."""
    spread = functional.interpolate(heat[None, None].float(), size=shape, mode="bilinear", align_corners=False)[0, 0]
    top = float(spread.max())
    return (spread / top if top > 0 else torch.zeros_like(spread)).clamp(0, 1).cpu().numpy()
