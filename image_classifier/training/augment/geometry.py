"""Where each pixel comes from: every move of an image is a 3 x 3 matrix, so all of them are one matrix and one resampling.

A map [N, 3, 3] takes homogeneous coordinates of the result to those of the source; both run from -1 to 1 over the square. To move an image
by A and then by B is `A @ B`. Cached pixels are as large as the network's input: a crop only enlarges, and bilinear sampling suffices.
"""

from __future__ import annotations

import torch
from torch.nn import functional

BORDERS = {"reflect": "reflection", "background": "border"}
_HORIZON = 1e-3  # what lies behind the horizon of a perspective view is taken from very far outside: border
_FARTHEST = 0.65  # above 2/3 a corner can pass the line between its neighbours, and the picture folds


def crop(
    width: torch.Tensor, height: torch.Tensor, across: torch.Tensor, down: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """The rectangle of this size (shares of the image, [N]) about the point (across, down), turned by `angle` (radians), as the whole picture."""
    cosine, sine = angle.cos(), angle.sin()
    return _matrices(a=width * cosine, b=-height * sine, c=across, d=width * sine, e=height * cosine, f=down)


def mirror(mirrored: torch.Tensor) -> torch.Tensor:
    """Left and right change places where `mirrored`, bool [N]."""
    return _matrices(a=1 - 2 * mirrored.float())


def turn(angle: torch.Tensor) -> torch.Tensor:
    """A turn about the centre, radians [N]."""
    return _matrices(a=angle.cos(), b=-angle.sin(), d=angle.sin(), e=angle.cos())


def shear(across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Rows slide by `across` times their height, columns by `down` times their distance from the middle; [N] each."""
    return _matrices(b=across, d=down)


def translate(across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A shift by shares of the side, [N] each."""
    return _matrices(c=2 * across, f=2 * down)


def perspective(inward: torch.Tensor) -> torch.Tensor:
    """The image seen aslant: its four corners move inward by `inward` [N, 4, 2], shares of half the side."""
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    x, y = (corners * (1 - inward.clamp(max=_FARTHEST))).unbind(dim=2)
    u, v = corners.expand(len(inward), -1, -1).unbind(dim=2)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    # Two equations a corner say that the map takes (x, y) to (u, v); its ninth entry is 1.
    rows = [
        torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=2),
        torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=2),
    ]
    entries = torch.linalg.solve(torch.cat(rows, dim=1).double(), torch.cat([u, v], dim=1).double())
    return torch.cat([entries, torch.ones(len(inward), 1)], dim=1).float().view(-1, 3, 3)


def resample(pixels: torch.Tensor, maps: torch.Tensor, border: str) -> torch.Tensor:
    """Move a batch, uint8 [N, 3, H, W], by its maps [N, 3, 3] (on the CPU); what stays where it is, is not touched.

    Args:
        pixels: The batch, on any device.
        maps: From coordinates of the result to those of the source.
        border: What is seen beyond the edge: `reflect`, the mirrored image; `background`, the median colour of the image's rim.
    """
    moved = (maps != torch.eye(3)).flatten(1).any(dim=1)
    if not moved.any():
        return pixels
    if moved.all():
        return _sample(pixels, maps, border)
    rows = moved.nonzero().squeeze(1).to(pixels.device)
    result = pixels.clone()
    result[rows] = _sample(pixels[rows], maps[moved], border)
    return result


def copied(
    pixels: torch.Tensor, down: torch.Tensor, across: torch.Tensor, mirrored: torch.Tensor, border: str = "reflect"
) -> torch.Tensor:
    """Mirror and move a batch, uint8 [N, 3, H, W], by whole pixels: exact, and some ten times cheaper than a resampling.

    Args:
        pixels: The batch, on any device.
        down: Pixels by which each image moves, int64 [N].
        across: The same, to the right.
        mirrored: Whether left and right change places before, bool [N].
        border: What comes in at the edge: `reflect`, a reflection without the edge itself; `background`, the edge repeated.
    """
    count, channels, height, width = pixels.shape
    rows, columns = torch.arange(height) - down.view(-1, 1), torch.arange(width) - across.view(-1, 1)
    if border == "reflect":
        rows, columns = _reflected(rows, height), _reflected(columns, width)
    else:
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    columns = torch.where(mirrored.view(-1, 1), width - 1 - columns, columns)
    if pixels.is_contiguous(
        memory_format=torch.channels_last
    ):  # the colours of a pixel move together, along rows of W x 3 numbers
        columns = (channels * columns.unsqueeze(2) + torch.arange(channels)).flatten(1)
        lines = pixels.permute(0, 2, 3, 1).reshape(count, 1, height, width * channels)
    else:
        lines = pixels
    lines = lines.gather(2, rows.to(pixels.device).view(count, 1, height, 1).expand_as(lines))
    lines = lines.gather(3, columns.to(pixels.device).view(count, 1, 1, -1).expand_as(lines))
    return lines if lines.shape == pixels.shape else lines.view(count, height, width, channels).permute(0, 3, 1, 2)


def downsized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """A batch, uint8 [N, 3, H, W], as squares of `side` pixels, antialiased and rounded to grey levels."""
    if pixels.shape[2] == pixels.shape[3] == side:
        return pixels
    images = pixels if pixels.device.type == "cpu" else pixels.float()  # only a CPU resizes whole numbers
    images = functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return images if images.dtype == torch.uint8 else images.round_().clamp_(0, 255).to(torch.uint8)


def _reflected(places: torch.Tensor, side: int) -> torch.Tensor:
    """Places beyond an axis of `side` pixels, by less than its length, folded back into it."""
    return (side - 1) - ((side - 1) - places.abs()).abs()


def _sample(pixels: torch.Tensor, maps: torch.Tensor, border: str) -> torch.Tensor:
    grid = _grid(maps, pixels.shape[2], pixels.shape[3], pixels.device)
    images = functional.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode=BORDERS[border], align_corners=False
    )
    images = images.round_().to(torch.uint8)  # between pixels, so within 0..255
    if border == "background":
        outside = (grid.abs() > 1).any(dim=3).unsqueeze(1)
        images = torch.where(outside, _rim_colours(pixels), images)
    return images


def _rim_colours(pixels: torch.Tensor) -> torch.Tensor:
    """The median of each channel along the four sides, uint8 [N, 3, 1, 1]: black around digits, white around drawings."""
    sides = [pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]]
    ordered = torch.cat(sides, dim=2).sort(dim=2).values  # torch's median is not deterministic on a GPU
    return ordered[:, :, ordered.shape[2] // 2, None, None]


def _grid(maps: torch.Tensor, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Source coordinates [N, H, W, 2] of each pixel's centre; torch's affine_grid is far slower on a CPU, and knows no perspective."""
    x = ((2 * torch.arange(width, device=device) + 1) / width - 1).view(1, 1, -1)
    y = ((2 * torch.arange(height, device=device) + 1) / height - 1).view(1, -1, 1)
    a, b, c, d, e, f, g, h, i = maps.to(device).flatten(1).unsqueeze(2).unsqueeze(3).unbind(dim=1)
    across, down = a * x + (b * y + c), d * x + (e * y + f)
    if not torch.equal(maps[:, 2], torch.eye(3)[2].expand(len(maps), 3)):
        depth = (g * x + (h * y + i)).clamp_(min=_HORIZON)
        across, down = across.div_(depth), down.div_(depth)
    return torch.stack([across, down], dim=3)


def _matrices(**entries: torch.Tensor) -> torch.Tensor:
    """Identity maps [N, 3, 3] but for these entries [N], named a to i row by row."""
    count = len(next(iter(entries.values())))
    maps = torch.eye(3).flatten().repeat(count, 1)
    for name, values in entries.items():
        maps[:, "abcdefghi".index(name)] = values
    return maps.view(count, 3, 3)
