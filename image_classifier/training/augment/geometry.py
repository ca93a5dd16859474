"""Geometry of images: every move is a 3 x 3 matrix, so all moves of an image are one matrix and one resampling.

A map [N, 3, 3] takes homogeneous coordinates of the result to those of the source; both run from -1 to 1 over the
square. Moving an image by A and then by B is `A @ B`. Cached pixels are as large as the network's input: a crop only
enlarges, so bilinear sampling is enough.
"""

from __future__ import annotations

import torch
from torch.nn import functional

BORDERS = {"reflect": "reflection", "background": "border"}
_MIN_DEPTH = 1e-3  # of a perspective view: points behind the horizon are read from very far outside, the border
_MAX_INWARD = 0.65  # above 2/3 a corner can cross the line between its neighbours, and the picture folds


def crop(
    width: torch.Tensor, height: torch.Tensor, across: torch.Tensor, down: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """Show a rectangle of the image as the full picture.

    Args:
        width: As a fraction of the image, [N].
        height: The same.
        across: Its centre, from -1 (left) to 1, [N].
        down: Its centre, from -1 (top) to 1, [N].
        angle: Its rotation in radians, [N].

    Returns:
        Maps [N, 3, 3].
    """
    cosine, sine = angle.cos(), angle.sin()
    return _matrices(a=width * cosine, b=-height * sine, c=across, d=width * sine, e=height * cosine, f=down)


def mirror(mirrored: torch.Tensor) -> torch.Tensor:
    """Exchange left and right where `mirrored`, bool [N]; return maps [N, 3, 3].

    >>> mirror(torch.tensor([True]))[0].diag().tolist()
    [-1.0, 1.0, 1.0]
    """
    return _matrices(a=1 - 2 * mirrored.float())


def turn(angle: torch.Tensor) -> torch.Tensor:
    """Rotate around the centre by radians [N]; return maps [N, 3, 3]."""
    return _matrices(a=angle.cos(), b=-angle.sin(), d=angle.sin(), e=angle.cos())


def shear(across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Slide rows by `across` times their height, columns by `down` times their distance from the middle; [N] each."""
    return _matrices(b=across, d=down)


def translate(across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Shift by fractions of the side, [N] each; return maps [N, 3, 3]."""
    return _matrices(c=2 * across, f=2 * down)


def perspective(inward: torch.Tensor) -> torch.Tensor:
    """Show the image from the side: its four corners move inward by `inward` [N, 4, 2], fractions of half the side.

    Returns:
        Maps [N, 3, 3].
    """
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    x, y = (corners * (1 - inward.clamp(max=_MAX_INWARD))).unbind(dim=2)
    u, v = corners.expand(len(inward), -1, -1).unbind(dim=2)
    one = torch.ones_like(x)
    zero = torch.zeros_like(x)
    # The map takes each corner (x, y) of the result to the source's corner (u, v); its ninth entry is 1. With
    # u = (ax + by + c) / (gx + hy + 1) and v alike, that makes two linear equations a corner for a to h.
    rows = [
        torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=2),
        torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=2),
    ]
    entries = torch.linalg.solve(torch.cat(rows, dim=1).double(), torch.cat([u, v], dim=1).double())
    return torch.cat([entries, torch.ones(len(inward), 1)], dim=1).float().view(-1, 3, 3)


def resample(pixels: torch.Tensor, maps: torch.Tensor, border: str) -> torch.Tensor:
    """Move a batch by its maps; images whose map is the identity are returned unchanged.

    Args:
        pixels: uint8 [N, 3, H, W], on any device.
        maps: From coordinates of the result to those of the source, float [N, 3, 3] on the CPU.
        border: Content beyond the edge: `reflect`, the mirrored image; `background`, the median colour of the image's
            rim.
    """
    # Resampling with the identity would cost time; only the rows that move are gathered.
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
    """Mirror and shift a batch by whole pixels: exact, and about ten times cheaper than a resampling.

    Args:
        pixels: uint8 [N, 3, H, W], on any device.
        down: Pixels by which each image moves down, int64 [N].
        across: The same, to the right.
        mirrored: Whether left and right are exchanged before, bool [N].
        border: Content that comes in at the edge: `reflect`, a reflection without the edge itself; `background`, the
            edge repeated.

    >>> pixels = torch.arange(3, dtype=torch.uint8).view(1, 1, 1, 3)
    >>> still, right = torch.tensor([0]), torch.tensor([1])
    >>> copied(pixels, still, right, torch.tensor([False]), "background").flatten().tolist()
    [0, 0, 1]
    """
    count, channels, height, width = pixels.shape
    # Source row of each row [N, H] and source column of each column [N, W].
    rows = torch.arange(height) - down.view(-1, 1)
    columns = torch.arange(width) - across.view(-1, 1)
    if border == "reflect":
        rows = _reflected(rows, height)
        columns = _reflected(columns, width)
    else:
        rows = rows.clamp(0, height - 1)
        columns = columns.clamp(0, width - 1)
    columns = torch.where(mirrored.view(-1, 1), width - 1 - columns, columns)
    if pixels.is_contiguous(memory_format=torch.channels_last):
        # The colours of a pixel move together, along rows of W x 3 numbers.
        columns = (channels * columns.unsqueeze(2) + torch.arange(channels)).flatten(1)
        lines = pixels.permute(0, 2, 3, 1).reshape(count, 1, height, width * channels)
    else:
        lines = pixels
    lines = lines.gather(2, rows.to(pixels.device).view(count, 1, height, 1).expand_as(lines))
    lines = lines.gather(3, columns.to(pixels.device).view(count, 1, 1, -1).expand_as(lines))
    if lines.shape == pixels.shape:
        return lines
    return lines.view(count, height, width, channels).permute(0, 3, 1, 2)


def downsized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Return a batch, uint8 [N, 3, H, W], as squares of `side` pixels, antialiased and rounded to grey levels."""
    if pixels.shape[2] == pixels.shape[3] == side:
        return pixels
    images = pixels if pixels.device.type == "cpu" else pixels.float()  # only CPUs resize integers
    images = functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return images if images.dtype == torch.uint8 else images.round_().clamp_(0, 255).to(torch.uint8)


def _reflected(indices: torch.Tensor, side: int) -> torch.Tensor:
    """Return indices beyond an axis of `side` pixels, by less than its length, folded back into it."""
    return (side - 1) - ((side - 1) - indices.abs()).abs()


def _sample(pixels: torch.Tensor, maps: torch.Tensor, border: str) -> torch.Tensor:
    grid = _grid(maps, pixels.shape[2], pixels.shape[3], pixels.device)
    images = functional.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode=BORDERS[border], align_corners=False
    )
    images = images.round_().to(torch.uint8)  # means of pixels, so within 0..255
    if border == "background":
        outside = (grid.abs() > 1).any(dim=3).unsqueeze(1)
        images = torch.where(outside, _rim_colours(pixels), images)
    return images


def _rim_colours(pixels: torch.Tensor) -> torch.Tensor:
    """Return the median of each channel along the four sides, uint8 [N, 3, 1, 1], such as the white around drawings."""
    sides = [pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]]
    # A sort, as torch's median is not deterministic on a GPU.
    ordered = torch.cat(sides, dim=2).sort(dim=2).values
    return ordered[:, :, ordered.shape[2] // 2, None, None]


def _grid(maps: torch.Tensor, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the source coordinates [N, H, W, 2] of each pixel's centre.

    torch's affine_grid is far slower on a CPU, and has no perspective.
    """
    # Centres of pixels, from -1 to 1 over the square.
    x = ((2 * torch.arange(width, device=device) + 1) / width - 1).view(1, 1, -1)
    y = ((2 * torch.arange(height, device=device) + 1) / height - 1).view(1, -1, 1)
    a, b, c, d, e, f, g, h, i = maps.to(device).flatten(1).unsqueeze(2).unsqueeze(3).unbind(dim=1)
    across = a * x + (b * y + c)
    down = d * x + (e * y + f)
    # A third row that differs from 0 0 1 is a perspective.
    if not torch.equal(maps[:, 2], torch.eye(3)[2].expand(len(maps), 3)):
        depth = (g * x + (h * y + i)).clamp_(min=_MIN_DEPTH)
        across = across.div_(depth)
        down = down.div_(depth)
    return torch.stack([across, down], dim=3)


def _matrices(**entries: torch.Tensor) -> torch.Tensor:
    """Return identity maps [N, 3, 3] with these entries [N] replaced, named a to i row by row."""
    count = len(next(iter(entries.values())))
    maps = torch.eye(3).flatten().repeat(count, 1)
    for name, values in entries.items():
        maps[:, "abcdefghi".index(name)] = values
    return maps.view(count, 3, 3)
