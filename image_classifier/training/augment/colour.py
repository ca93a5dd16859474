"""Changes of colour, each image its own amount: pixels uint8 [N, 3, H, W] and amounts [N] -> uint8 [N, 3, H, W].

They mean what Pillow's ImageEnhance and ImageOps mean, to one grey level.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def brightness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is black, 1 changes nothing."""
    return _levels(pixels * _column(factor))


def contrast(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is the mean grey of the image, 1 changes nothing."""
    return _blend(pixels, _grey(pixels).mean(dim=(2, 3), keepdim=True), factor)


def saturation(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is a grey picture, 1 changes nothing."""
    return _blend(pixels, _grey(pixels), factor)


def sharpness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """0 is smoothed by the kernel (1 1 1, 1 5 1, 1 1 1) / 13 but for the rim, 1 changes nothing."""
    if min(pixels.shape[2:]) < 3:
        return pixels
    smooth = pixels.float()
    inner = smooth[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (9 * functional.avg_pool2d(smooth, 3, stride=1) + 4 * inner) / 13
    return _blend(pixels, smooth, factor)


def posterize(pixels: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Only the highest `bits` of each level stay, 1 to 8."""
    return pixels & _column((256 - 2 ** (8 - bits.round())).to(torch.uint8))


def solarize(pixels: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Levels from the threshold up are inverted; 256 changes nothing."""
    return torch.where(pixels < _column(threshold), pixels, 255 - pixels)


def autocontrast(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The darkest level of each channel becomes 0 and the lightest 255; a flat channel stays."""
    low, high = pixels.amin(dim=(2, 3), keepdim=True).float(), pixels.amax(dim=(2, 3), keepdim=True).float()
    flat = low == high
    return _levels((pixels - low.masked_fill(flat, 0)) * (255 / (high - low)).masked_fill(flat, 1))


def equalize(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel's levels spread so that all are about equally frequent (Pillow's whole-number rule)."""
    levels = pixels.flatten(2).flatten(0, 1).long()
    channels = 256 * torch.arange(len(levels), device=pixels.device).unsqueeze(1)
    counts = torch.bincount((levels + channels).flatten(), minlength=256 * len(levels)).view(-1, 256)
    last = counts.gather(1, levels.amax(dim=1, keepdim=True))  # how many pixels hold the lightest level
    step = (counts.sum(dim=1, keepdim=True) - last) // 255
    below = counts.cumsum(dim=1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=pixels.device)).to(torch.uint8)
    return table.gather(1, levels).view(pixels.shape)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """Luminance, float [N, 1, H, W] (ITU-R 601-2): whole levels by the integers of Pillow's mode L, for a blend beyond grey doubles a difference."""
    red, green, blue = pixels.int().unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).float().unsqueeze(1)


def _blend(pixels: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """From `other` at 0 to the pixels at 1, and beyond."""
    factor = _column(factor)
    return _levels(pixels * factor + other * (1 - factor))


def _column(amount: torch.Tensor) -> torch.Tensor:
    return amount.view(-1, 1, 1, 1)


def _levels(values: torch.Tensor) -> torch.Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
