"""Two images in one, with labels in proportion: MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from image_classifier.errors import ConfigError
from image_classifier.training.augment.erasing import box_areas, box_masks, draw_boxes


class Mix:
    """Mixes each image of a batch with another one: blended (MixUp), or with a rectangle of it pasted in (CutMix).

    Args:
        mixup: The weights of a blend are drawn from Beta(mixup, mixup); the larger one is the image's own. None: no
            MixUp.
        cutmix: The area that an image keeps is drawn from Beta(cutmix, cutmix). None: no CutMix. With both, each image
            takes one of them.
        probability: Fraction of the images that are mixed.
    """

    def __init__(self, mixup: float | None = 0.2, cutmix: float | None = 1.0, probability: float = 1.0) -> None:
        alphas = [alpha for alpha in (mixup, cutmix) if alpha is not None]
        if not alphas or min(alphas) <= 0:
            raise ConfigError("augment.mix needs mixup or cutmix above 0", "write augment.mix=null to mix nothing")
        if not 0 <= probability <= 1:
            raise ConfigError(f"augment.mix.probability must be from 0 to 1, not {probability}")
        self.mixup = mixup
        self.cutmix = cutmix
        self.probability = probability

    def __call__(
        self, pixels: torch.Tensor, targets: torch.Tensor, num_classes: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix pixels uint8 [N, 3, H, W] with targets int64 [N]; return them and class probabilities float32 [N, C]."""
        one_hot = functional.one_hot(targets, num_classes).float()
        if len(pixels) < 2:
            return pixels, one_hot
        # A batch is shuffled already: the neighbour at a random distance is a random partner, never the image itself.
        distance = int(torch.randint(1, len(pixels), (1,), generator=generator))
        kept, is_cut, boxes = self._draw(len(pixels), (pixels.shape[2], pixels.shape[3]), generator)
        # CutMix: boxes of the other images are empty.
        mixed = _paste(pixels, pixels.roll(distance, 0), boxes)
        # MixUp: only the rows that need it.
        blended = (~is_cut & (kept < 1)).nonzero().squeeze(1)
        if len(blended):
            rows = blended.to(pixels.device)
            weight = kept[blended].to(pixels.device).view(-1, 1, 1, 1)
            partners = pixels[(rows - distance) % len(pixels)]
            mixed[rows] = (pixels[rows] * weight + partners * (1 - weight)).round_().to(torch.uint8)
        weight = kept.to(pixels.device).unsqueeze(1)
        return mixed, weight * one_hot + (1 - weight) * one_hot.roll(distance, 0)

    def _draw(
        self, count: int, side: tuple[int, int], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw how each image is mixed.

        Returns:
            The fraction of itself that each image keeps, float [N]; whether it is cut, bool [N]; its rectangle, int64
            [N, 4], empty where it is not cut.
        """
        chance, kind = torch.rand(2, count, generator=generator)
        is_cut = kind < (0.5 if self.mixup and self.cutmix else 1.0 if self.cutmix else 0.0)
        # NumPy, as torch draws Beta from the global state only.
        seed = int(torch.randint(2**62, (1,), generator=generator))
        draws = np.random.default_rng(seed)
        blend, area = (
            torch.from_numpy(draws.beta(alpha or 1.0, alpha or 1.0, count)).float()
            for alpha in (self.mixup, self.cutmix)
        )
        # Beta(a, a) is symmetric: so each image stays the larger part of its own row in the batch.
        blend = torch.maximum(blend, 1 - blend)
        length = (1 - area).sqrt()
        boxes = draw_boxes(length * side[0], length * side[1], side, generator)
        is_mixed = chance < self.probability
        boxes = boxes * (is_mixed & is_cut).unsqueeze(1)
        # Of the pixels really pasted: the edge may have cut the rectangle.
        kept = 1 - box_areas(boxes) / (side[0] * side[1])
        return torch.where(is_mixed & ~is_cut, blend, kept), is_cut, boxes


def _paste(pixels: torch.Tensor, others: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    return torch.where(box_masks(boxes, (pixels.shape[2], pixels.shape[3]), pixels.device), others, pixels)
