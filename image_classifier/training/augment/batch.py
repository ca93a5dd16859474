"""A recipe of conf/augment: one image's geometry, colours and patches, then the mixing of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from image_classifier.errors import ConfigError
from image_classifier.training.augment import colour, geometry
from image_classifier.training.augment.checks import number, range_of, whole_number
from image_classifier.training.augment.erasing import cut_out, erase
from image_classifier.training.augment.mixup_cutmix import Mix
from image_classifier.training.augment.rand_augment import RandomOperations


class BatchAugment:
    """Changes whole batches, pixels uint8 [N, 3, H, W] -> the same shape and type, every image in its own way.

    Shifts by whole pixels are copies; all other geometry of one image is one bilinear resampling; then come brightness, contrast, saturation,
    the operations' colours, squares cut out, erasing, mixing.

    Args:
        name: What the recipe is called.
        crop_scale: Least and greatest area of the crop, as a share of the image.
        aspect: Least and greatest width over height of the crop.
        flip: Mirror half of the images.
        alternate_flip: With `flip`, each image is mirrored in every other epoch instead of at random, so that two epochs show it from both sides
            (Jordan, 2024, section 3.6).
        shift: Greatest move in pixels along both axes; what comes in is the image reflected, or its edge repeated: `border`.
        rotation: Greatest turn in degrees.
        perspective: Greatest way that a corner moves inward, as a share of half the side, in half of the images.
        brightness: Greatest change of the level, as a factor of 1 ± this.
        contrast: Greatest change of the contrast, as a factor of 1 ± this.
        saturation: Greatest change of the colours' strength, as a factor of 1 ± this.
        operations: Random operations besides.
        cutout: Side in pixels of a square in each image that is painted with the image's mean colour (DeVries and Taylor, 2017); 0: none.
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
        alternate_flip: bool = False,
        shift: int = 0,
        rotation: float = 0.0,
        perspective: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        operations: RandomOperations | None = None,
        cutout: int = 0,
        erase: float = 0.0,
        mix: Mix | None = None,
        border: str | None = None,
    ) -> None:
        for key, value in (("flip", flip), ("alternate_flip", alternate_flip)):
            if not isinstance(value, bool):
                raise ConfigError(f"augment.{key} must be true or false, not {value!r}")
        self.alternate_flip = flip and alternate_flip
        self.shift, self.cutout = whole_number(shift, "augment.shift"), whole_number(cutout, "augment.cutout")
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
            raise ConfigError(
                f"augment.border={border!r} is unknown", f"use one of {', '.join(geometry.BORDERS)}, or null"
            )

    def __call__(
        self,
        pixels: torch.Tensor,
        targets: torch.Tensor,
        num_classes: int,
        generator: torch.Generator,
        mirrored: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch: its pixels, and its targets int64 [N], which mixing makes class probabilities float32 [N, num_classes].

        `generator` (on the CPU) decides everything, so equal seeds give equal batches, on another device but for roundings by a grey level;
        with `alternate_flip` the caller, who knows images and epoch, says which are `mirrored`, bool [N].
        """
        layout = (
            torch.channels_last if pixels.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        flip = self.flip
        if mirrored is not None or self.shift:
            pixels, flip = self._copied(pixels, mirrored, generator), False
        maps = self._maps(len(pixels), flip, generator)
        draw = self.operations.draw(len(pixels), generator) if self.operations else None
        if self.operations and draw:
            maps = maps @ self.operations.maps(draw)
        pixels = self._tone(geometry.resample(pixels, maps, self.border), generator)
        if self.operations and draw:
            pixels = self.operations.recolour(pixels, draw)
        if self.cutout:
            pixels = cut_out(pixels, self.cutout, generator)
        if self.erase:
            pixels = erase(pixels, self.erase, generator)
        if self.mix:
            pixels, targets = self.mix(pixels, targets, num_classes, generator)
        return pixels.contiguous(memory_format=layout), targets

    def _copied(self, pixels: torch.Tensor, mirrored: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        """Mirrored and shifted without resampling."""
        shift = min(self.shift, pixels.shape[2] - 1, pixels.shape[3] - 1)
        if mirrored is None:
            mirrored = (torch.rand(len(pixels), generator=generator) < 0.5) & self.flip
        down, across = torch.randint(-shift, shift + 1, (2, len(pixels)), generator=generator)
        return geometry.copied(pixels, down, across, mirrored, self.border)

    def _maps(self, count: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
        """Crop, turn, flip (of half of the images) and perspective as one map an image [N, 3, 3]."""
        scale, aspect, across, down, side, turn, slant = torch.rand(7, count, generator=generator)
        area = self.crop_scale[0] + scale * (self.crop_scale[1] - self.crop_scale[0])
        ratio = torch.exp(math.log(self.aspect[0]) + aspect * math.log(self.aspect[1] / self.aspect[0]))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        centre = ((1 - width) * (2 * across - 1), (1 - height) * (2 * down - 1))
        maps = geometry.crop(width, height, *centre, (2 * turn - 1) * self.rotation)
        if flip:
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
