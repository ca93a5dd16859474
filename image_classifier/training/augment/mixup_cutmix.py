"""Two images in one, and their labels by shares: MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from image_classifier.errors import ConfigError
from image_classifier.training.augment.erasing import box_areas, box_masks, draw_boxes


class Mix:
    """Mixes each image of a batch with another one: blended (MixUp), or with a rectangle of the other pasted in (CutMix).

    Args:
        mixup: The shares of a blend are drawn from Beta(mixup, mixup), the greater one is the image's own; None: no MixUp.
        cutmix: The area that an image keeps is drawn from Beta(cutmix, cutmix); None: no CutMix. With both, each image takes one of them.
        probability: Share of the images that are mixed.
    """

    def __init__(self, mixup: float | None = 0.2, cutmix: float | None = 1.0, probability: float = 1.0) -> None:
        kinds = [alpha for alpha in (mixup, cutmix) if alpha is not None]
        if not kinds or min(kinds) <= 0:
            raise ConfigError("augment.mix needs mixup or cutmix above 0", "write augment.mix=null to mix nothing")
        if not 0 <= probability <= 1:
            raise ConfigError(f"augment.mix.probability must be within 0..1, not {probability}")
        self.mixup, self.cutmix, self.probability = mixup, cutmix, probability

    def __call__(
        self, pixels: torch.Tensor, targets: torch.Tensor, num_classes: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels uint8 [N, 3, H, W] and targets int64 [N] -> the mixed pixels and class probabilities float32 [N, num_classes]."""
        certain = functional.one_hot(targets, num_classes).float()
        if len(pixels) < 2:
            return pixels, certain
        # A batch is shuffled already: the neighbour at a random distance is a random partner, and never the image itself.
        distance = int(torch.randint(1, len(pixels), (1,), generator=generator))
        own, cut, boxes = self._draw(len(pixels), (pixels.shape[2], pixels.shape[3]), generator)
        mixed = _paste(pixels, pixels.roll(distance, 0), boxes)
        blended = (~cut & (own < 1)).nonzero().squeeze(1)
        if len(blended):
            rows = blended.to(pixels.device)
            share = own[blended].to(pixels.device).view(-1, 1, 1, 1)
            mixed[rows] = (
                (pixels[rows] * share + pixels[(rows - distance) % len(pixels)] * (1 - share)).round_().to(torch.uint8)
            )
        share = own.to(pixels.device).unsqueeze(1)
        return mixed, share * certain + (1 - share) * certain.roll(distance, 0)

    def _draw(
        self, count: int, side: tuple[int, int], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The share of itself that each image keeps, float [N]; whether it is cut, bool [N]; and its rectangle, empty where it is not."""
        chance, kind = torch.rand(2, count, generator=generator)
        cut = kind < (0.5 if self.mixup and self.cutmix else 1.0 if self.cutmix else 0.0)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        draws = np.random.default_rng(seed)  # torch draws Beta from the global state only
        blend, area = (
            torch.from_numpy(draws.beta(alpha or 1.0, alpha or 1.0, count)).float()
            for alpha in (self.mixup, self.cutmix)
        )
        blend = torch.maximum(
            blend, 1 - blend
        )  # Beta(a, a) has no sides: so each image stays the greater part of its own place in the batch
        length = (1 - area).sqrt()
        boxes = draw_boxes(length * side[0], length * side[1], side, generator)
        chosen = chance < self.probability
        boxes = boxes * (chosen & cut).unsqueeze(1)
        kept = 1 - box_areas(boxes) / (
            side[0] * side[1]
        )  # of the pixels really pasted: the edge may have cut the rectangle
        return torch.where(chosen & ~cut, blend, kept), cut, boxes


def _paste(pixels: torch.Tensor, others: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    return torch.where(box_masks(boxes, (pixels.shape[2], pixels.shape[3]), pixels.device), others, pixels)
