"""The classifier: uint8 pixels in, logits out. It normalises in its first line, so no client can forget to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from image_classifier.errors import ConfigError


class Classifier(nn.Module):
    """Normalise, backbone, head: pixels uint8 [N, 3, H, W] -> logits float32 [N, C]."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        mean_, std_ = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", (1 / (255 * std_)).float())
        self.register_buffer("shift", (-mean_ / std_).float())

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """The backbone's pooled features before the head, [N, D]."""
        return torch.flatten(self.backbone(torch.addcmul(self.shift, pixels.float(), self.scale)), 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(pixels)).float()


def build_classifier(
    backbone: nn.Module,
    num_classes: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dropout: float = 0.0,
) -> Classifier:
    """Put a fresh linear head on a backbone, whatever its number of features; ConfigError where it cannot take such images."""
    features = _num_features(backbone, image_size)
    linear = nn.Linear(features, num_classes)
    head = nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear
    return Classifier(backbone, head, mean, std)


def _num_features(backbone: nn.Module, image_size: int) -> int:
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            embedding = backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the backbone cannot take images of {image_size} px ({' '.join(str(error).split())[:160]})",
            "choose the size it was made for with data.image_size=, or +model.backbone.img_size= where it has one",
        ) from error
    finally:
        backbone.train(was_training)
    if not isinstance(embedding, torch.Tensor) or embedding.flatten(1).shape[0] != 1:
        raise ConfigError("the backbone returns no embedding [N, D]", "give it num_classes=0 or choose another network")
    return embedding.flatten(1).shape[1]
