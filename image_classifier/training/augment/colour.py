"""Colour changes, each image by its own amount: pixels uint8 [N, 3, H, W] and amounts [N] -> uint8 [N, 3, H, W].

They agree with Pillow's ImageEnhance and ImageOps up to one grey level.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def brightness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale the levels: 0 is black, 1 changes nothing.

    >>> image = torch.full((1, 3, 1, 1), 100, dtype=torch.uint8)
    >>> brightness(image, torch.tensor([1.5])).flatten().tolist()
    [150, 150, 150]
    """
    return _levels(pixels * _column(factor))


def contrast(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale the distance to the image's mean grey: 0 is that grey, 1 changes nothing."""
    return _blend(pixels, _grey(pixels).mean(dim=(2, 3), keepdim=True), factor)


def saturation(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale the distance to grey: 0 is a grey picture, 1 changes nothing."""
    return _blend(pixels, _grey(pixels), factor)


def sharpness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale the distance to an image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13 inside the rim: 1 changes nothing."""
    if min(pixels.shape[2:]) < 3:
        return pixels
    smooth = pixels.float()
    inner = smooth[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (9 * functional.avg_pool2d(smooth, 3, stride=1) + 4 * inner) / 13
    return _blend(pixels, smooth, factor)


def posterize(pixels: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Keep only the highest `bits` of each level, 1 to 8."""
    return pixels & _column((256 - 2 ** (8 - bits.round())).to(torch.uint8))


def solarize(pixels: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Invert levels from the threshold up; 256 changes nothing."""
    return torch.where(pixels < _column(threshold), pixels, 255 - pixels)


def autocontrast(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Stretch each channel so that its darkest level is 0 and its lightest 255; a flat channel stays."""
    low = pixels.amin(dim=(2, 3), keepdim=True).float()
    high = pixels.amax(dim=(2, 3), keepdim=True).float()
    flat = low == high
    return _levels((pixels - low.masked_fill(flat, 0)) * (255 / (high - low)).masked_fill(flat, 1))


def equalize(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Spread each channel's levels so that all are about equally frequent, by Pillow's integer rule."""
    # One histogram a channel, int64 [N * 3, 256], by one bincount: each channel has its own range of bins.
    levels = pixels.flatten(2).flatten(0, 1).long()
    channels = 256 * torch.arange(len(levels), device=pixels.device).unsqueeze(1)
    counts = torch.bincount((levels + channels).flatten(), minlength=256 * len(levels)).view(-1, 256)
    # Pixels a new level should hold, not counting those of the lightest level.
    num_lightest = counts.gather(1, levels.amax(dim=1, keepdim=True))
    step = (counts.sum(dim=1, keepdim=True) - num_lightest) // 255
    # A level's new value is how many steps of pixels are below it.
    below = counts.cumsum(dim=1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=pixels.device)).to(torch.uint8)
    return table.gather(1, levels).view(pixels.shape)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """Return the luminance, float [N, 1, H, W] (ITU-R 601-2), in whole levels by the integers of Pillow's mode L.

    A blend beyond grey would double any difference to Pillow.
    """
    red, green, blue = pixels.int().unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).float().unsqueeze(1)


def _blend(pixels: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `other` at factor 0, the pixels at 1, and beyond them above 1."""
    factor = _column(factor)
    return _levels(pixels * factor + other * (1 - factor))


def _column(amount: torch.Tensor) -> torch.Tensor:
    return amount.view(-1, 1, 1, 1)


def _levels(values: torch.Tensor) -> torch.Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
