"""A recipe of conf/augment: geometry, colours and patches of single images, then the mixing of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from image_classifier.errors import ConfigError
from image_classifier.training.augment import colour, geometry
from image_classifier.training.augment.erasing import cut_out, erase
from image_classifier.training.augment.mixup_cutmix import Mix
from image_classifier.training.augment.rand_augment import RandomOperations, check_number


class BatchAugment:
    """Changes batches of pixels uint8 [N, 3, H, W], every image in its own way; shape and type stay.

    Shifts by whole pixels are copies. All other geometry of one image is one bilinear resampling. Then come brightness,
    contrast, saturation, the operations' colours, squares cut out, erasing, mixing.

    Args:
        name: Name of the recipe.
        crop_scale: Smallest and largest area of the crop, as a fraction of the image.
        aspect: Smallest and largest width over height of the crop.
        flip: Mirror half of the images.
        alternate_flip: With `flip`, mirror each image in every other epoch instead of at random, so that two epochs
            show it from both sides (Jordan, 2024, section 3.6).
        shift: Largest shift in pixels along both axes; `border` says what comes in at the edge.
        rotation: Largest rotation in degrees.
        perspective: Largest way that a corner moves inward, as a fraction of half the side, in half of the images.
        brightness: Largest change of the level, as a factor of 1 ± this.
        contrast: Largest change of the contrast, as a factor of 1 ± this.
        saturation: Largest change of the colours' strength, as a factor of 1 ± this.
        operations: Random operations, in addition to the others.
        cutout: Side in pixels of a square in each image that is painted with the image's mean colour (DeVries and
            Taylor, 2017); 0: none.
        erase: Fraction of the images that lose a rectangle.
        mix: Mixing of images and labels.
        border: Content beyond the edge: reflect or background; None: reflect where images may be mirrored, else
            background.
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
        self.name = name
        self.flip = flip
        self.alternate_flip = flip and alternate_flip
        self.shift = _check_pixels(shift, "augment.shift")
        self.cutout = _check_pixels(cutout, "augment.cutout")
        self.rotation = math.radians(check_number(rotation, "augment.rotation", 180))
        self.crop_scale = _check_range(crop_scale, "augment.crop_scale", upper=1.0)
        self.aspect = _check_range(aspect, "augment.aspect", upper=math.inf)
        self.perspective = check_number(perspective, "augment.perspective")
        self.erase = check_number(erase, "augment.erase")
        self.tones = (
            (colour.brightness, check_number(brightness, "augment.brightness")),
            (colour.contrast, check_number(contrast, "augment.contrast")),
            (colour.saturation, check_number(saturation, "augment.saturation")),
        )
        self.operations = operations
        self.mix = mix
        self.border = border or ("reflect" if flip else "background")
        if self.border not in geometry.BORDERS:
            raise ConfigError(f"invalid augment.border={border!r}", f"use {' or '.join(geometry.BORDERS)}, or null")

    def __call__(
        self,
        pixels: torch.Tensor,
        targets: torch.Tensor,
        num_classes: int,
        generator: torch.Generator,
        mirrored: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch.

        Args:
            pixels: uint8 [N, 3, H, W].
            targets: int64 [N].
            num_classes: C.
            generator: On the CPU, makes every choice: equal seeds give equal batches, on another device up to rounding
                by a grey level.
            mirrored: With `alternate_flip`, which images are mirrored, bool [N]: only the caller knows images and
                epoch.

        Returns:
            The pixels, and the targets, which mixing turns into class probabilities float32 [N, C].
        """
        is_channels_last = pixels.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        # Geometry by copies, then all other geometry as one map per image [N, 3, 3] and one resampling.
        flip = self.flip
        if mirrored is not None or self.shift:
            pixels = self._copied(pixels, mirrored, generator)
            flip = False
        maps = self._maps(len(pixels), flip, generator)
        draw = self.operations.draw(len(pixels), generator) if self.operations else None
        if self.operations and draw:
            maps = maps @ self.operations.maps(draw)
        pixels = geometry.resample(pixels, maps, self.border)
        # Colours, then patches.
        pixels = self._tone(pixels, generator)
        if self.operations and draw:
            pixels = self.operations.recolour(pixels, draw)
        if self.cutout:
            pixels = cut_out(pixels, self.cutout, generator)
        if self.erase:
            pixels = erase(pixels, self.erase, generator)
        # Pairs of images.
        if self.mix:
            pixels, targets = self.mix(pixels, targets, num_classes, generator)
        return pixels.contiguous(memory_format=layout), targets

    def _copied(self, pixels: torch.Tensor, mirrored: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        """Return the images mirrored and shifted, without resampling."""
        shift = min(self.shift, pixels.shape[2] - 1, pixels.shape[3] - 1)
        if mirrored is None:
            mirrored = (torch.rand(len(pixels), generator=generator) < 0.5) & self.flip
        down, across = torch.randint(-shift, shift + 1, (2, len(pixels)), generator=generator)
        return geometry.copied(pixels, down, across, mirrored, self.border)

    def _maps(self, count: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
        """Return crop, rotation, flip (of half of the images) and perspective as one map per image [N, 3, 3]."""
        scale, aspect, across, down, side, turn, slant = torch.rand(7, count, generator=generator)
        # The crop's area is uniform, its aspect log-uniform; it is at most the image.
        area = self.crop_scale[0] + scale * (self.crop_scale[1] - self.crop_scale[0])
        ratio = torch.exp(math.log(self.aspect[0]) + aspect * math.log(self.aspect[1] / self.aspect[0]))
        width = (area * ratio).sqrt().clamp(max=1)
        height = (area / ratio).sqrt().clamp(max=1)
        centre_x = (1 - width) * (2 * across - 1)
        centre_y = (1 - height) * (2 * down - 1)
        maps = geometry.crop(width, height, centre_x, centre_y, (2 * turn - 1) * self.rotation)
        if flip:
            maps = maps @ geometry.mirror(side < 0.5)
        if self.perspective:
            inward = self.perspective * torch.rand(count, 4, 2, generator=generator)
            maps = maps @ geometry.perspective(inward * (slant < 0.5).view(-1, 1, 1))
        return maps

    def _tone(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for change, max_change in self.tones:
            if max_change:
                factor = 1 + max_change * (2 * torch.rand(len(pixels), generator=generator) - 1)
                pixels = change(pixels, factor.to(pixels.device))
        return pixels


def _check_pixels(value: Any, key: str) -> int:
    """Return a number of pixels, 0 or more; ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{key} must be a whole number of pixels, 0 or more, not {value!r}")
    return value


def _check_range(values: Any, key: str, upper: float) -> tuple[float, float]:
    """Return two numbers above 0, the smaller one first; ConfigError for anything else."""
    is_pair = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 2
    numbers = [value for value in values if isinstance(value, int | float)] if is_pair else []
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] <= upper:
        raise ConfigError(
            f"{key}={values!r} is not a range", "give the smallest and the largest value, such as [0.5,1.0]"
        )
    return float(numbers[0]), float(numbers[1])
