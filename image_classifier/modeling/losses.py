"""Losses: logits float32 [N, C] and targets int64 [N], or class probabilities [N, C] where images are mixed, to one number.

Whatever the precision of the network, they count in float32. Class weights are kept in a buffer `weight` [C], as torch's losses keep
them: an image counts as much as its class, and the mean is over the images' weights (in cross-entropy of mixed images over their number).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn
from torch.nn import functional

from image_classifier.errors import ConfigError


class CrossEntropy(nn.CrossEntropyLoss):
    """Torch's cross-entropy, its class weights (`weight`, C numbers) given as plain numbers; `label_smoothing` is within 0..1."""

    def __init__(self, weight: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(weight=_weights(weight), label_smoothing=_unit(label_smoothing, "loss.label_smoothing"))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(_in_full(input), target)


class FocalLoss(nn.Module):
    """Cross-entropy that counts well classified images less: -(1 - p)^gamma log p of the right class (Lin et al., 2017, section 3.2).

    Of mixed images it is the sum over the classes by their shares, as MixUp defines the loss of a mixture. With gamma 0, and images that are not
    mixed, it is cross-entropy.
    """

    weight: torch.Tensor | None

    def __init__(self, gamma: float = 2.0, weight: Sequence[float] | None = None) -> None:
        """`gamma` is 0 or more; `weight` holds C class weights (alpha in the paper)."""
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ConfigError(f"loss.gamma must be 0 or more, not {gamma}")
        self.gamma = gamma
        self.register_buffer("weight", _weights(weight))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_p = functional.log_softmax(_in_full(logits), dim=1)
        # 1 - p without cancellation; the bound keeps the slope of its power finite where p is 1 and gamma below 1.
        missing = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps)
        return _mean(_shares(targets, log_p) * (missing**self.gamma * -log_p), _shares(targets, log_p), self.weight)


class BinaryCrossEntropy(nn.Module):
    """Each class a yes or no of its own, summed over the classes (Beyer et al., 2020, section 5; Wightman et al., 2021, section 3).

    The sum, not the mean, so that learning rates of cross-entropy hold for any number of classes.
    """

    weight: torch.Tensor | None

    def __init__(self, weight: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        """`weight` holds C class weights; smoothing e makes shares y into (1 - e) y + e / C."""
        super().__init__()
        self.label_smoothing = _unit(label_smoothing, "loss.label_smoothing")
        self.register_buffer("weight", _weights(weight))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = _in_full(logits)
        shares = _shares(targets, logits)
        smooth = shares * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        losses = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(dim=1)
        if self.weight is None:
            return losses.mean()
        weights = (shares * self.weight).sum(dim=1)
        return (losses * weights).sum() / _above_zero(weights.sum())


class SupervisedContrastive(nn.Module):
    """Supervised contrastive learning (Khosla et al., 2020) of projected embeddings, and cross-entropy for the head.

    Embeddings go through a neck of two layers and are normalised; there images of a class attract and all others repel one another. The
    neck learns with the network and is left behind. Joined (`joint`), the loss is cross-entropy + `contrast` x contrast and the head learns
    with the network; else the network learns by contrast alone, and the head by cross-entropy on embeddings through which nothing flows back.

    Attributes:
        takes_embeddings: `forward` wants the embeddings too.
        head_apart: The logits must come from detached embeddings.
        views: How many augmented views of each image a batch holds.
    """

    weight: torch.Tensor | None
    takes_embeddings = True

    def __init__(
        self,
        temperature: float = 0.1,
        projection: int = 128,
        joint: bool = False,
        contrast: float = 1.0,
        views: int = 2,
        weight: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        """The loss; `attach` must follow before it is given embeddings.

        Args:
            temperature: Divides the cosines; smaller looks at the nearest images only.
            projection: Length of the projected embeddings.
            joint: Whether cross-entropy teaches the network too.
            contrast: Factor of the contrastive part.
            views: 1, or 2 to see each image in two augmentations.
            weight: Class weights [C] of the cross-entropy.
            label_smoothing: Of the cross-entropy.

        Raises:
            ConfigError: A value is impossible.
        """
        super().__init__()
        for key, value in (("temperature", temperature), ("projection", projection), ("contrast", contrast)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"loss.{key} must be above 0, not {value}")
        if views not in (1, 2):
            raise ConfigError(f"loss.views must be 1 or 2, not {views}")
        self.temperature, self.projection, self.contrast, self.views = temperature, projection, contrast, views
        self.head_apart = not joint
        self.label_smoothing = _unit(label_smoothing, "loss.label_smoothing")
        self.register_buffer("weight", _weights(weight))
        self.neck: nn.Module | None = None

    def attach(self, num_features: int) -> None:
        """Build the neck for embeddings [N, num_features]."""
        self.neck = nn.Sequential(
            nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, self.projection)
        )

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss; without embeddings (as in validation) its cross-entropy alone. ValueError for class probabilities, TypeError without neck."""
        if targets.is_floating_point():
            raise ValueError("images of a class attract one another, and a mixed image has no class")
        plain = functional.cross_entropy(_in_full(logits), targets, self.weight, label_smoothing=self.label_smoothing)
        if embeddings is None:
            return plain
        if self.neck is None:
            raise TypeError("attach() must come before embeddings")
        return plain + self.contrast * supervised_contrastive(
            *_of_all_ranks(self.neck(embeddings), targets), self.temperature
        )


def supervised_contrastive(projections: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_out of Khosla et al. (2020, eq. 2) of projections [N, P] and classes int64 [N], as a mean over the images that have a partner.

    Where no image has another of its class the loss is 0, and so is its gradient.
    """
    with torch.autocast(projections.device.type, enabled=False):  # bfloat16 cosines have two digits
        unit_vectors = functional.normalize(_in_full(projections), dim=1, eps=1e-6)
        similarity = unit_vectors @ unit_vectors.T / temperature
        itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
        others = similarity.masked_fill(itself, torch.finfo(similarity.dtype).min)
        log_share = similarity - torch.logsumexp(others, dim=1, keepdim=True)
        partners = (targets.unsqueeze(0) == targets.unsqueeze(1)) & ~itself
        count = partners.sum(dim=1)
        losses = -log_share.masked_fill(~partners, 0.0).sum(dim=1) / count.clamp_min(1)
        return losses.sum() / (count > 0).sum().clamp_min(1)


def _of_all_ranks(projections: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the global batch: each rank counts the whole loss, and the mean of their gradients is that of one process."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return projections, targets
    from torch.distributed.nn.functional import all_gather  # the one whose gradient goes back to each rank

    labels = [torch.empty_like(targets) for _ in range(distributed.get_world_size())]
    distributed.all_gather(labels, targets)
    return torch.cat(tuple(all_gather(projections.contiguous()))), torch.cat(labels)


def _in_full(values: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _shares(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Each class's share of each image, [N, C] in the logits' type."""
    return (targets if targets.is_floating_point() else functional.one_hot(targets, logits.shape[1])).to(logits.dtype)


def _weights(values: Sequence[float] | None) -> torch.Tensor | None:
    """Class weights float32 [C] of plain numbers; ConfigError where one is negative, not finite or no number, or all are 0."""
    if values is None:
        return None
    try:
        weights = torch.tensor([float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"loss.weight={values} is not a list of numbers", "give one number a class, or null"
        ) from error
    if not len(weights) or not torch.isfinite(weights).all() or weights.min() < 0 or weights.max() == 0:
        raise ConfigError(
            f"loss.weight={list(values)} cannot weigh classes", "give one number of 0 or more a class, or null"
        )
    return weights


def _unit(value: float, key: str) -> float:
    """A number within 0..1; ConfigError names the key."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{key} must be within 0..1, not {value}")
    return value


def _mean(losses: torch.Tensor, shares: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The mean over images of losses [N, C], weighed by class."""
    if weight is None:
        return losses.sum() / len(losses)
    return (losses * weight).sum() / _above_zero((shares * weight).sum())


def _above_zero(total: torch.Tensor) -> torch.Tensor:
    """A sum of weights to divide by: classes of weight 0 alone make a loss of 0."""
    return total.clamp_min(torch.finfo(total.dtype).tiny)
