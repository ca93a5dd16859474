"""A recipe of conf/augment: one image's geometry, colours and patches, then the mixing of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from image_classifier.errors import ConfigError
from image_classifier.training.augment import colour, geometry
from image_classifier.training.augment.checks import number, range_of
from image_classifier.training.augment.mix import Mix
from image_classifier.training.augment.operations import RandomOperations
from image_classifier.training.augment.patches import erase


class BatchAugment:
    """Changes whole batches, pixels uint8 [N, 3, H, W] -> the same shape and type, every image in its own way.

    All geometry of one image is one bilinear resampling; then come brightness, contrast, saturation, the operations' colours, erasing, mixing.

    Args:
        name: What the recipe is called.
        crop_scale: Least and greatest area of the crop, as a share of the image.
        aspect: Least and greatest width over height of the crop.
        flip: Mirror half of the images.
        rotation: Greatest turn in degrees.
        perspective: Greatest way that a corner moves inward, as a share of half the side, in half of the images.
        brightness: Greatest change of the level, as a factor of 1 ± this.
        contrast: Greatest change of the contrast, as a factor of 1 ± this.
        saturation: Greatest change of the colours' strength, as a factor of 1 ± this.
        operations: Random operations besides.
        erase: Share of the images that lose a rectangle.
        mix: Mixing of images and labels.
        border: What is seen beyond the edge: reflect or background; None: reflect where images may be mirrored, else background.
    """

    def __init__(
        self,
        name: str = "augment",
        crop_scale: Sequence[float] = (0.5, 1.0),
        aspect: Sequence[float] = (0.75, 4 / 3),
        flip: bool = True,
        rotation: float = 0.0,
        perspective: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        operations: RandomOperations | None = None,
        erase: float = 0.0,
        mix: Mix | None = None,
        border: str | None = None,
    ) -> None:
        if not isinstance(flip, bool):
            raise ConfigError(f"augment.flip must be true or false, not {flip!r}")
        self.name, self.flip, self.rotation = name, flip, math.radians(number(rotation, "augment.rotation", 180))
        self.crop_scale = range_of(crop_scale, "augment.crop_scale", upper=1.0)
        self.aspect = range_of(aspect, "augment.aspect", upper=math.inf)
        self.perspective, self.erase = number(perspective, "augment.perspective"), number(erase, "augment.erase")
        self.tones = (
            (colour.brightness, number(brightness, "augment.brightness")),
            (colour.contrast, number(contrast, "augment.contrast")),
            (colour.saturation, number(saturation, "augment.saturation")),
        )
        self.operations, self.mix = operations, mix
        self.border = border or ("reflect" if flip else "background")
        if self.border not in geometry.BORDERS:
            raise ConfigError(f"augment.border={border!r} is unknown", f"use one of {', '.join(geometry.BORDERS)}, or null")

    def __call__(
        self, pixels: torch.Tensor, targets: torch.Tensor, num_classes: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch: its pixels, and its targets int64 [N], which mixing makes class probabilities float32 [N, num_classes].

        `generator` (on the CPU) decides everything, so equal seeds give equal batches, on another device but for roundings by a grey level.
        """
        layout = torch.channels_last if pixels.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        maps = self._maps(len(pixels), generator)
        draw = self.operations.draw(len(pixels), generator) if self.operations else None
        if self.operations and draw:
            maps = maps @ self.operations.maps(draw)
        pixels = self._tone(geometry.resample(pixels, maps, self.border), generator)
        if self.operations and draw:
            pixels = self.operations.recolour(pixels, draw)
        if self.erase:
            pixels = erase(pixels, self.erase, generator)
        if self.mix:
            pixels, targets = self.mix(pixels, targets, num_classes, generator)
        return pixels.contiguous(memory_format=layout), targets

    def _maps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Crop, turn, flip and perspective as one map an image [N, 3, 3]."""
        scale, aspect, across, down, side, turn, slant = torch.rand(7, count, generator=generator)
        area = self.crop_scale[0] + scale * (self.crop_scale[1] - self.crop_scale[0])
        ratio = torch.exp(math.log(self.aspect[0]) + aspect * math.log(self.aspect[1] / self.aspect[0]))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        centre = ((1 - width) * (2 * across - 1), (1 - height) * (2 * down - 1))
        maps = geometry.crop(width, height, *centre, (2 * turn - 1) * self.rotation)
        if self.flip:
            maps = maps @ geometry.mirror(side < 0.5)
        if self.perspective:
            inward = self.perspective * torch.rand(count, 4, 2, generator=generator)
            maps = maps @ geometry.perspective(inward * (slant < 0.5).view(-1, 1, 1))
        return maps

    def _tone(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for change, greatest in self.tones:
            if greatest:
                factor = 1 + greatest * (2 * torch.rand(len(pixels), generator=generator) - 1)
                pixels = change(pixels, factor.to(pixels.device))
        return pixels
