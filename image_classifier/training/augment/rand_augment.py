"""Random operations, fourteen of them: TrivialAugment (Müller & Hutter, 2021), RandAugment (Cubuk et al., 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from image_classifier.errors import ConfigError
from image_classifier.training.augment import colour, geometry

Recolour = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_MOVES = ("shear_across", "shear_down", "translate_across", "translate_down", "rotate")
_TONES: dict[str, Recolour] = {
    "brightness": colour.brightness,
    "contrast": colour.contrast,
    "saturation": colour.saturation,
    "sharpness": colour.sharpness,
    "posterize": colour.posterize,
    "solarize": colour.solarize,
    "autocontrast": colour.autocontrast,
    "equalize": colour.equalize,
}
OPERATIONS = ("identity", *_MOVES, *_TONES)


@dataclass(frozen=True)
class Draw:
    """The operations of each image in each of L turns.

    Attributes:
        kinds: Indices into OPERATIONS, int64 [L, N].
        amounts: Signed fractions -1 to 1 of the largest change, float [L, N].
    """

    kinds: torch.Tensor
    amounts: torch.Tensor


class RandomOperations:
    """Applies `count` operations to each image, drawn with equal chances, with a random strength and sign.

    Those that move the image are part of its one resampling, which comes before those that change its colours.

    Args:
        count: Operations an image.
        strength: Smallest and largest fraction of the ranges below.
        shear: Largest shear, as the tangent of its angle.
        translate: Largest shift, as a fraction of the side.
        rotation: Largest rotation in degrees.
        tone: Brightness, contrast, saturation and sharpness change by a factor of 1 ± this.
        posterize: Smallest number of bits of a level that are kept.
    """

    def __init__(
        self,
        count: int = 1,
        strength: Sequence[float] = (0.0, 1.0),
        shear: float = 0.3,
        translate: float = 0.3,
        rotation: float = 30.0,
        tone: float = 0.9,
        posterize: int = 4,
    ) -> None:
        if count < 1:
            raise ConfigError(f"augment.operations.count must be at least 1, not {count}")
        if len(strength) != 2 or not 0 <= strength[0] <= strength[1] <= 1:
            raise ConfigError(
                f"augment.operations.strength={list(strength)} is not a range",
                "give the smallest and the largest value, from 0 to 1",
            )
        if not 1 <= posterize <= 8:
            raise ConfigError(f"augment.operations.posterize must be 1 to 8 bits, not {posterize}")
        self.count = count
        self.strength = (float(strength[0]), float(strength[1]))
        self.shear = check_number(shear, "augment.operations.shear")
        self.translate = check_number(translate, "augment.operations.translate")
        self.rotation = math.radians(check_number(rotation, "augment.operations.rotation", 180))
        self.tone = check_number(tone, "augment.operations.tone")
        self.posterize = posterize

    def draw(self, count: int, generator: torch.Generator) -> Draw:
        """Draw operations and signed strengths for `count` images."""
        kinds = torch.randint(len(OPERATIONS), (self.count, count), generator=generator)
        fraction, side = torch.rand(2, self.count, count, generator=generator)
        strength = self.strength[0] + fraction * (self.strength[1] - self.strength[0])
        return Draw(kinds, torch.where(side < 0.5, -strength, strength))

    def maps(self, draw: Draw) -> torch.Tensor:
        """Return all moves of each image as one map [N, 3, 3]."""
        joined = torch.eye(3).repeat(draw.kinds.shape[1], 1, 1)
        for kinds, amounts in zip(draw.kinds, draw.amounts, strict=True):
            across, down, right, below, angle = (
                torch.where(kinds == OPERATIONS.index(move), amounts, 0.0) for move in _MOVES
            )
            # At most one of the three differs from the identity.
            joined = joined @ geometry.shear(self.shear * across, self.shear * down)
            joined = joined @ geometry.translate(self.translate * right, self.translate * below)
            joined = joined @ geometry.turn(self.rotation * angle)
        return joined

    def recolour(self, pixels: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Apply the operations that change colours, turn by turn, each to the images that drew it."""
        result = pixels.clone()
        for kinds, amounts in zip(draw.kinds, draw.amounts, strict=True):
            for name, recolour in _TONES.items():
                drawn = kinds == OPERATIONS.index(name)
                if drawn.any():
                    rows = drawn.nonzero().squeeze(1).to(pixels.device)
                    result[rows] = recolour(result[rows], self._amount(name, amounts[drawn]).to(pixels.device))
        return result

    def _amount(self, name: str, amounts: torch.Tensor) -> torch.Tensor:
        if name == "posterize":
            return 8 - amounts.abs() * (8 - self.posterize)
        if name == "solarize":
            return 256 * (1 - amounts.abs())
        return 1 + self.tone * amounts


def check_number(value: Any, key: str, upper: float = 1.0) -> float:
    """Return a number from 0 to `upper`; ConfigError for anything else.

    >>> check_number(0.3, "augment.erase")
    0.3
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= upper:
        raise ConfigError(f"{key} must be a number from 0 to {upper:g}, not {value!r}")
    return float(value)
