"""The classifier: uint8 pixels to logits. It normalises the pixels itself, so no caller can forget to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from image_classifier.errors import ConfigError

TTA = {"none": 1, "flip": 2, "shift": 3, "flip_shift": 6}  # number of views of an image
_HINT_SIZES = "use a network that averages over positions, or one size"


class Classifier(nn.Module):
    """Normalise, backbone, head: pixels uint8 [N, 3, H, W] -> logits float32 [N, C].

    With `tta` (test-time augmentation, one of TTA) logits in evaluation mode are averaged over views of the image.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Module, mean: Sequence[float], std: Sequence[float], tta: str = "none"
    ) -> None:
        super().__init__()
        if tta not in TTA:
            raise ConfigError(f"invalid model.tta={tta}", f"use one of {', '.join(TTA)}")
        self.backbone = backbone
        self.head = head
        self.tta = tta
        mean_, std_ = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", (1 / (255 * std_)).float())
        self.register_buffer("shift", (-mean_ / std_).float())

    @property
    def num_views(self) -> int:
        """Number of views of each image that go through the network in evaluation mode."""
        return TTA[self.tta]

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the backbone's pooled features before the head, [N, D]."""
        return torch.flatten(self.backbone(torch.addcmul(self.shift, pixels.float(), self.scale)), 1)

    def classify(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the logits of embeddings [N, D], float32 [N, C]."""
        logits: torch.Tensor = self.head(embeddings).float()
        return logits

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits float32 [N, C]; in evaluation mode averaged over the views of `tta`, which are one batch."""
        return self.answer(pixels)[0]

    def answer(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of `forward`, and the embeddings float32 [N, D] of the images themselves, without views."""
        if self.training or self.tta == "none":
            embeddings = self.embed(pixels)
            return self.classify(embeddings), embeddings.float()
        # As floats: TensorRT does not slice or concatenate 8-bit integers.
        views, weights = zip(*tta_views(pixels.float(), self.tta), strict=True)
        embeddings = self.embed(torch.cat(views))
        logits = self.classify(embeddings).unflatten(0, (len(views), -1))
        averaged = (logits * torch.tensor(weights, device=logits.device).view(-1, 1, 1)).sum(dim=0)
        return averaged, embeddings.unflatten(0, (len(views), -1))[0].float()


def tta_views(pixels: torch.Tensor, tta: str) -> list[tuple[torch.Tensor, float]]:
    """Return the views of a batch [N, 3, H, W] with their weights, which sum to 1 (Jordan, 2024, section 3.5).

    flip: the image and its mirror image. shift: the image (1/2), and the image a pixel up and left, and down and right
    (1/4 each). flip_shift: both.

    >>> [weight for _, weight in tta_views(torch.zeros(1, 3, 2, 2), "shift")]
    [0.5, 0.25, 0.25]
    """
    views = [(pixels, 1.0)]
    if "shift" in tta:
        views = [(pixels, 0.5), *((_shifted(_shifted(pixels, 2, by), 3, by), 0.25) for by in (-1, 1))]
    if "flip" in tta:
        views = [(view, weight / 2) for image, weight in views for view in (image, image.flip(3))]
    return views


def _shifted(pixels: torch.Tensor, axis: int, by: int) -> torch.Tensor:
    """Return pixels shifted by -1 or 1 along an axis; the free edge is filled by reflection."""
    side = pixels.shape[axis]
    if by < 0:
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
    """Add a new linear head to a backbone, whatever its number of features.

    Raises:
        ConfigError: The backbone cannot take images of `image_size` px.
    """
    features = _num_features(backbone, image_size)
    linear = nn.Linear(features, num_classes)
    head = nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear
    return Classifier(backbone, head, mean, std, tta)


def check_sizes(backbone: nn.Module, sizes: Sequence[int]) -> None:
    """Try one image of each size in pixels.

    Raises:
        ConfigError: The backbone cannot take all of them, or its number of features changes, as after a flattening.
    """
    num_features: dict[int, int] = {}
    for size in sizes:
        try:
            num_features[size] = _num_features(backbone, size)
        except ConfigError as error:
            raise ConfigError(f"data.progressive_sizes: {error.fact}", _HINT_SIZES) from error
    if len(set(num_features.values())) > 1:
        given = ", ".join(f"{features} features at {size} px" for size, features in num_features.items())
        raise ConfigError(f"data.progressive_sizes: the network has {given}", _HINT_SIZES)


@contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode inside the block; restore the mode of each module afterwards."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _num_features(backbone: nn.Module, image_size: int) -> int:
    """Return the length of the embedding of an image; ConfigError where there is none."""
    try:
        with in_evaluation(backbone), torch.inference_mode():
            embedding = backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the backbone cannot take images of {image_size} px ({' '.join(str(error).split())[:160]})",
            "use the size it was made for: data.image_size=, or +model.backbone.img_size= where it has one",
        ) from error
    if not isinstance(embedding, torch.Tensor) or embedding.flatten(1).shape[0] != 1:
        raise ConfigError("the backbone returns no embedding [N, D]", "give it num_classes=0 or use another network")
    return embedding.flatten(1).shape[1]
