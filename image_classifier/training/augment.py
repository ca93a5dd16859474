"""Random changes to whole batches of training pixels, on the training device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from image_classifier.errors import ConfigError


class BatchAugment:
    """Random crop, turn, flip, brightness and contrast of a batch: pixels uint8 [N, 3, H, W] -> the same shape and type.

    Crop, turn and flip are one affine map and one bilinear sampling an image, so the batch is read once.

    Args:
        crop_scale: Least and greatest area of the crop, as a share of the image.
        aspect: Least and greatest width over height of the crop.
        flip: Mirror half of the images.
        rotation: Greatest turn in degrees.
        brightness: Greatest change of the level, as a share of white.
        contrast: Greatest change of the contrast, as a share.
    """

    def __init__(
        self,
        crop_scale: Sequence[float] = (0.5, 1.0),
        aspect: Sequence[float] = (0.75, 4 / 3),
        flip: bool = True,
        rotation: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
    ) -> None:
        self.crop_scale = _pair(crop_scale, "augment.crop_scale", upper=1.0)
        self.aspect = _pair(aspect, "augment.aspect", upper=math.inf)
        self.flip, self.rotation = flip, math.radians(rotation)
        self.brightness, self.contrast = brightness, contrast

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment one batch; `generator` (on the CPU) decides everything, so equal seeds give equal batches."""
        grid = functional.affine_grid(self._maps(len(pixels), generator).to(pixels.device), list(pixels.shape), align_corners=False)
        images = functional.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        if self.brightness or self.contrast:
            images = self._relight(images, generator)
        return images.round_().clamp_(0, 255).to(torch.uint8)

    def _maps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Affine maps [N, 2, 3] from output to input coordinates, both in -1..1."""
        scale, aspect, across, down, mirror, turn = torch.rand(6, count, generator=generator)
        area = self.crop_scale[0] + scale * (self.crop_scale[1] - self.crop_scale[0])
        ratio = torch.exp(math.log(self.aspect[0]) + aspect * math.log(self.aspect[1] / self.aspect[0]))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        sign = torch.where(mirror < 0.5, -1.0, 1.0) if self.flip else torch.ones(count)
        angle = (2 * turn - 1) * self.rotation
        cosine, sine = angle.cos(), angle.sin()
        across, down = (1 - width) * (2 * across - 1), (1 - height) * (2 * down - 1)
        rows = [width * cosine * sign, -height * sine, across, width * sine * sign, height * cosine, down]
        return torch.stack(rows, dim=1).view(count, 2, 3)

    def _relight(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        level, range_ = (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 1).to(images.device)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return (images - mean) * (1 + self.contrast * range_) + mean + 255 * self.brightness * level


def _pair(values: Sequence[float], key: str, upper: float) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= upper:
        raise ConfigError(f"{key}={list(values)} is not a range", "give the least and the greatest value, such as [0.5,1.0]")
    return float(values[0]), float(values[1])
