"""Several classifiers as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from image_classifier.modeling.classifier import Classifier


class EnsembleClassifier(Classifier):
    """K classifiers with the same classes as one: pixels uint8 [N, 3, H, W] -> logits float32 [N, C].

    The logits are the logarithm of the mean of the members' probabilities, so their softmax is that mean. The embedding
    [N, D] is the mean of the members' embeddings. `backbone` holds the members, each with its own normalisation.
    """

    def __init__(self, members: Sequence[Classifier], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(nn.ModuleList(members), nn.Identity(), mean, std, members[0].tta)

    @property
    def members(self) -> list[Classifier]:
        """The classifiers."""
        return list(cast(nn.ModuleList, self.backbone))  # type: ignore[arg-type]

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean of the members' embeddings, [N, D]."""
        return torch.stack([member.embed(pixels) for member in self.members]).mean(0)

    def answer(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of `forward`, and the mean embeddings float32 [N, D]."""
        logits, embeddings = zip(*(member.answer(pixels) for member in self.members), strict=True)
        # log(mean(p)) over the members, in operators that every runtime has.
        of_members = torch.stack(logits).log_softmax(2)
        largest = of_members.amax(0)
        averaged = (of_members - largest).exp().mean(0).log() + largest
        return averaged, torch.stack(embeddings).mean(0)
