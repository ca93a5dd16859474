"""Rectangles, one an image: drawn, turned into masks, erased."""

from __future__ import annotations

import math

import torch

# Zhong et al. (2020), with smaller areas than their 0.4.
_ERASED_AREA = (0.02, 0.2)  # smallest and largest, as a fraction of the image
_MAX_ASPECT = 3.3  # length over width


def draw_boxes(
    height: torch.Tensor, width: torch.Tensor, side: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    """Draw rectangles of these sizes (pixels, [N]) around uniform centres, cut at the edges of the image.

    Returns:
        top, bottom, left, right, int64 [N, 4].
    """
    down, across = torch.rand(2, len(height), generator=generator)
    edges = []
    for centre, size, limit in ((down * side[0], height, side[0]), (across * side[1], width, side[1])):
        start = (centre - size / 2).round()
        edges += [start.clamp(0, limit), (start + size.round()).clamp(0, limit)]
    return torch.stack(edges, dim=1).long()


def box_areas(boxes: torch.Tensor) -> torch.Tensor:
    """Return the number of pixels in each box [N, 4], int64 [N].

    >>> box_areas(torch.tensor([[0, 2, 1, 4]])).tolist()
    [6]
    """
    top, bottom, left, right = boxes.unbind(dim=1)
    return (bottom - top) * (right - left)


def box_masks(boxes: torch.Tensor, side: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return masks that are True in each box [N, 4], bool [N, 1, H, W]."""
    top, bottom, left, right = boxes.to(device).view(-1, 4, 1, 1, 1).unbind(dim=1)
    y = torch.arange(side[0], device=device).view(1, 1, -1, 1)
    x = torch.arange(side[1], device=device).view(1, 1, 1, -1)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def erase(pixels: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Paint a rectangle of one random grey over a fraction of the images, uint8 [N, 3, H, W] (Zhong et al., 2020)."""
    side = (pixels.shape[2], pixels.shape[3])
    chance, area, aspect = torch.rand(3, len(pixels), generator=generator)
    grey = torch.randint(256, (len(pixels), 1, 1, 1), dtype=torch.uint8, generator=generator)
    # The area is uniform, the aspect log-uniform.
    ratio = torch.exp((2 * aspect - 1) * math.log(_MAX_ASPECT))
    fraction = _ERASED_AREA[0] + area * (_ERASED_AREA[1] - _ERASED_AREA[0])
    height = side[0] * (fraction * ratio).sqrt()
    width = side[1] * (fraction / ratio).sqrt()
    # Images that keep everything get an empty box.
    boxes = draw_boxes(height, width, side, generator) * (chance < probability).unsqueeze(1)
    return torch.where(box_masks(boxes, side, pixels.device), grey.to(pixels.device), pixels)


def cut_out(pixels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Paint a square of `size` pixels in each image, uint8 [N, 3, H, W], with that image's mean colour.

    Its centre is anywhere in the image.
    """
    side = (pixels.shape[2], pixels.shape[3])
    lengths = torch.full((len(pixels),), float(size))
    boxes = draw_boxes(lengths, lengths, side, generator)
    mean = pixels.float().mean(dim=(2, 3), keepdim=True).round_().to(torch.uint8)
    return torch.where(box_masks(boxes, side, pixels.device), mean, pixels)
