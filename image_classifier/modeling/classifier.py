"""The classifier: uint8 pixels in, logits out. It normalises in its first line, so no client can forget to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from image_classifier.errors import ConfigError

TTA = {"none": 1, "flip": 2, "shift": 3, "flip_shift": 6}  # views an image


class Classifier(nn.Module):
    """Normalise, backbone, head: pixels uint8 [N, 3, H, W] -> logits float32 [N, C].

    With `tta` (test-time augmentation, one of TTA) an answer in evaluation mode is averaged over views of the image.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Module, mean: Sequence[float], std: Sequence[float], tta: str = "none"
    ) -> None:
        super().__init__()
        if tta not in TTA:
            raise ConfigError(f"model.tta={tta} is unknown", f"use one of {', '.join(TTA)}")
        self.backbone, self.head, self.tta = backbone, head, tta
        mean_, std_ = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", (1 / (255 * std_)).float())
        self.register_buffer("shift", (-mean_ / std_).float())

    @property
    def num_views(self) -> int:
        """How many images the network sees in evaluation mode for each one that is asked about."""
        return TTA[self.tta]

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """The backbone's pooled features before the head, [N, D]."""
        return torch.flatten(self.backbone(torch.addcmul(self.shift, pixels.float(), self.scale)), 1)

    def classify(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits of embeddings [N, D], float32 [N, C]."""
        logits: torch.Tensor = self.head(embeddings).float()
        return logits

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits; in evaluation mode averaged over the views that `tta` names, which go through the network as one batch."""
        return self.answer(pixels)[0]

    def answer(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of `forward`, and the embeddings float32 [N, D] of the images as they are, whatever views `tta` adds."""
        if self.training or self.tta == "none":
            embeddings = self.embed(pixels)
            return self.classify(embeddings), embeddings.float()
        views, weights = zip(
            *tta_views(pixels.float(), self.tta), strict=True
        )  # TensorRT cuts and joins no integers of 8 bits
        embeddings = self.embed(torch.cat(views))
        logits = self.classify(embeddings).unflatten(0, (len(views), -1))
        averaged = (logits * torch.tensor(weights, device=logits.device).view(-1, 1, 1)).sum(dim=0)
        return averaged, embeddings.unflatten(0, (len(views), -1))[0].float()


def tta_views(pixels: torch.Tensor, tta: str) -> list[tuple[torch.Tensor, float]]:
    """What test-time augmentation sees of a batch [N, 3, H, W], with weights of sum 1 (Jordan, 2024, section 3.5).

    flip: the image and its mirror image; shift: the image (1/2), and it a pixel up and left, and down and right (1/4 each); flip_shift: both.
    """
    views = [(pixels, 1.0)]
    if "shift" in tta:
        views = [(pixels, 0.5), *((_shifted(_shifted(pixels, 2, way), 3, way), 0.25) for way in (-1, 1))]
    if "flip" in tta:
        views = [(view, weight / 2) for image, weight in views for view in (image, image.flip(3))]
    return views


def _shifted(pixels: torch.Tensor, axis: int, way: int) -> torch.Tensor:
    """Moved by one pixel to lower (-1) or higher (1) places; the free edge is filled by reflection."""
    side = pixels.shape[axis]
    if way < 0:
        return torch.cat([pixels.narrow(axis, 1, side - 1), pixels.narrow(axis, side - 2, 1)], dim=axis)
    return torch.cat([pixels.narrow(axis, 1, 1), pixels.narrow(axis, 0, side - 1)], dim=axis)


def build_classifier(
    backbone: nn.Module,
    num_classes: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dropout: float = 0.0,
    tta: str = "none",
) -> Classifier:
    """Put a fresh linear head on a backbone, whatever its number of features; ConfigError where it cannot take such images."""
    features = _num_features(backbone, image_size)
    linear = nn.Linear(features, num_classes)
    head = nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear
    return Classifier(backbone, head, mean, std, tta)


def check_sizes(backbone: nn.Module, sizes: Sequence[int]) -> None:
    """Try one image of each size (pixels); ConfigError where the backbone cannot learn from all of them, as one that flattens cannot."""
    found: dict[int, int] = {}
    for size in sizes:
        try:
            found[size] = _num_features(backbone, size)
        except ConfigError as error:
            raise ConfigError(
                f"data.progressive_sizes: {error.fact}", "choose a network that averages over places, or one size"
            ) from error
    if len(set(found.values())) > 1:
        given = ", ".join(f"{features} features at {size} px" for size, features in found.items())
        raise ConfigError(
            f"data.progressive_sizes: the network gives {given}",
            "choose a network that averages over places, or one size",
        )


@contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; each of its parts is put back as it was."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _num_features(backbone: nn.Module, image_size: int) -> int:
    try:
        with in_evaluation(backbone), torch.inference_mode():
            embedding = backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the backbone cannot take images of {image_size} px ({' '.join(str(error).split())[:160]})",
            "choose the size it was made for with data.image_size=, or +model.backbone.img_size= where it has one",
        ) from error
    if not isinstance(embedding, torch.Tensor) or embedding.flatten(1).shape[0] != 1:
        raise ConfigError("the backbone returns no embedding [N, D]", "give it num_classes=0 or choose another network")
    return embedding.flatten(1).shape[1]
