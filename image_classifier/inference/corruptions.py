"""Six corruptions of images at three severities, after Hendrycks and Dietterich (2019); numpy and Pillow.

They act on the network's square, as theirs do: a file is decoded once, and a severity means the same for any size.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

SEVERITIES = (1, 2, 3)

# Pixels uint8 [S, S, 3], severity 1..3, the random numbers of this image -> pixels uint8 [S, S, 3].
Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def blur(pixels: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Apply Gaussian blur with a standard deviation of 0.75, 1.5 and 3 % of the side."""
    radius = (0.0075, 0.015, 0.03)[severity - 1] * pixels.shape[0]
    return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def noise(pixels: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to each channel of each pixel, with a standard deviation of 4, 8 and 16 % of full scale."""
    spread = (0.04, 0.08, 0.16)[severity - 1] * 255
    return _clipped(pixels + random.normal(0.0, spread, pixels.shape))


def brightness(pixels: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Make the image lighter or darker by 10, 20 and 40 % of the full scale."""
    return _clipped(pixels + _sign(random) * (0.1, 0.2, 0.4)[severity - 1] * 255)


def contrast(pixels: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Reduce the distance from the image's mean colour to 60, 40 and 20 %.

    >>> contrast(np.full((2, 2, 3), 90, np.uint8), 3, np.random.default_rng(0)).max().item()
    90
    """
    mean = pixels.mean(axis=(0, 1))
    return _clipped((pixels - mean) * (0.6, 0.4, 0.2)[severity - 1] + mean)


def jpeg(pixels: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Compress as JPEG of quality 40, 20 and 10."""
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=(40, 20, 10)[severity - 1])
    return np.array(Image.open(stored))


def rotation(pixels: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    """Rotate left or right by 10, 20 and 40 degrees; the corners get the image's mean colour."""
    fill = tuple(int(channel) for channel in pixels.mean(axis=(0, 1)))
    angle = float(_sign(random) * (10, 20, 40)[severity - 1])
    return np.array(Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill))


def _sign(random: np.random.Generator) -> int:
    return 1 if random.random() < 0.5 else -1


def _clipped(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.rint(values).clip(0, 255).astype(np.uint8))


CORRUPTIONS: dict[str, Corruption] = {
    "blur": blur,
    "noise": noise,
    "brightness": brightness,
    "contrast": contrast,
    "jpeg": jpeg,
    "rotation": rotation,
}
