"""Losses: logits float32 [N, C] and targets to one number.

Targets are int64 [N], or class probabilities [N, C] where images are mixed. Losses compute in float32, whatever the
precision of the network. Class weights are in a buffer `weight` [C], as in torch's losses: an image counts as much as
its class, and the mean is over the images' weights (in cross-entropy of mixed images, over their number).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn
from torch.nn import functional

from image_classifier.errors import ConfigError


class CrossEntropy(nn.CrossEntropyLoss):
    """Torch's cross-entropy, with class weights as plain numbers (`weight`, C of them) and `label_smoothing` in 0..1.

    >>> loss = CrossEntropy(label_smoothing=0.1)
    >>> round(float(loss(torch.zeros(1, 2), torch.tensor([0]))), 4)
    0.6931
    """

    def __init__(self, weight: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(weight=_weights(weight), label_smoothing=_unit(label_smoothing, "loss.label_smoothing"))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(_at_least_float32(input), target)


class FocalLoss(nn.Module):
    """Cross-entropy with less weight on well classified images: -(1 - p)^gamma log p of the right class.

    Source: Lin et al. (2017), section 3.2. The loss of a mixed image is the sum over its classes by their shares, as in
    MixUp. With gamma 0, and images that are not mixed, it is cross-entropy.

    >>> loss = FocalLoss(gamma=2.0)
    >>> round(float(loss(torch.zeros(1, 2), torch.tensor([0]))), 4)
    0.1733
    """

    weight: torch.Tensor | None

    def __init__(self, gamma: float = 2.0, weight: Sequence[float] | None = None) -> None:
        """Set `gamma`, 0 or more, and C class weights (`weight`, alpha in the paper)."""
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ConfigError(f"loss.gamma must be 0 or more, not {gamma}")
        self.gamma = gamma
        self.register_buffer("weight", _weights(weight))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_p = functional.log_softmax(_at_least_float32(logits), dim=1)
        # 1 - p without cancellation. The bound keeps the slope of its power finite where p is 1 and gamma is below 1.
        one_minus_p = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps)
        shares = _shares(targets, log_p)
        return _mean(shares * (one_minus_p**self.gamma * -log_p), shares, self.weight)


class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy of each class, summed over the classes.

    Source: Beyer et al. (2020), section 5; Wightman et al. (2021), section 3. The sum, not the mean, so that learning
    rates of cross-entropy fit for any number of classes.
    """

    weight: torch.Tensor | None

    def __init__(self, weight: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        """Set C class weights (`weight`) and the label smoothing e, which changes shares y to (1 - e) y + e / C."""
        super().__init__()
        self.label_smoothing = _unit(label_smoothing, "loss.label_smoothing")
        self.register_buffer("weight", _weights(weight))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = _at_least_float32(logits)
        shares = _shares(targets, logits)
        smooth = shares * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        losses = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(dim=1)
        if self.weight is None:
            return losses.mean()
        weights = (shares * self.weight).sum(dim=1)
        return (losses * weights).sum() / _above_zero(weights.sum())


class SupervisedContrastive(nn.Module):
    """Supervised contrastive loss (Khosla et al., 2020) of projected embeddings, and cross-entropy for the head.

    Embeddings go through a neck of two layers and are normalised; there images of a class attract and all others repel
    each other. The neck is trained with the network and not part of the classifier. With `joint` the loss is
    cross-entropy + `contrast` x contrast, and the head is trained with the network. Else the contrast alone trains the
    network, and the cross-entropy trains the head on detached embeddings.

    Attributes:
        takes_embeddings: `forward` takes the embeddings too.
        head_apart: The logits must come from detached embeddings.
        views: Number of augmented views of each image in a batch.
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
        """Set up the loss; call `attach` before embeddings are passed to it.

        Args:
            temperature: Divides the cosines; a smaller one counts the nearest images only.
            projection: Length of the projected embeddings.
            joint: Whether cross-entropy trains the network too.
            contrast: Factor of the contrastive loss.
            views: 1, or 2 for two augmentations of each image.
            weight: Class weights [C] of the cross-entropy.
            label_smoothing: Label smoothing of the cross-entropy.

        Raises:
            ConfigError: A value is invalid.
        """
        super().__init__()
        for key, value in (("temperature", temperature), ("projection", projection), ("contrast", contrast)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"loss.{key} must be above 0, not {value}")
        if views not in (1, 2):
            raise ConfigError(f"loss.views must be 1 or 2, not {views}")
        self.temperature = temperature
        self.projection = projection
        self.contrast = contrast
        self.views = views
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
        """Return the loss; without embeddings, as in validation, the cross-entropy alone.

        Raises:
            ValueError: The targets are class probabilities.
            TypeError: `attach` was not called.
        """
        if targets.is_floating_point():
            raise ValueError("the contrastive loss needs one class per image, and mixed images have several")
        entropy = functional.cross_entropy(
            _at_least_float32(logits), targets, self.weight, label_smoothing=self.label_smoothing
        )
        if embeddings is None:
            return entropy
        if self.neck is None:
            raise TypeError("call attach() before passing embeddings")
        projections, labels = _of_all_ranks(self.neck(embeddings), targets)
        return entropy + self.contrast * supervised_contrastive(projections, labels, self.temperature)


def supervised_contrastive(projections: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return L_out of Khosla et al. (2020, eq. 2) of projections [N, P] and classes int64 [N].

    It is the mean over the images that have a partner, another image of their class. Without any partner the loss is 0,
    and so is its gradient.

    >>> float(supervised_contrastive(torch.eye(2), torch.tensor([0, 1]), 0.1))
    0.0
    """
    # bfloat16 cosines have only two digits.
    with torch.autocast(projections.device.type, enabled=False):
        # Cosines of all pairs [N, N].
        unit_vectors = functional.normalize(_at_least_float32(projections), dim=1, eps=1e-6)
        similarity = unit_vectors @ unit_vectors.T / temperature
        itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
        # Log of each pair's softmax over all other images.
        others = similarity.masked_fill(itself, torch.finfo(similarity.dtype).min)
        log_share = similarity - torch.logsumexp(others, dim=1, keepdim=True)
        # The mean over each image's partners, then over the images that have one.
        partners = (targets.unsqueeze(0) == targets.unsqueeze(1)) & ~itself
        count = partners.sum(dim=1)
        losses = -log_share.masked_fill(~partners, 0.0).sum(dim=1) / count.clamp_min(1)
        return losses.sum() / (count > 0).sum().clamp_min(1)


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(teacher || student) of the probabilities softened by T, the mean over images; logits are [N, C].

    Source: Hinton et al. (2015), section 2. The factor T^2 keeps the gradients as large as those of the labels.

    >>> float(distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=2.0))
    0.0
    """
    log_p, log_q = (
        functional.log_softmax(_at_least_float32(values) / temperature, dim=1) for values in (logits, teacher_logits)
    )
    return temperature**2 * functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _of_all_ranks(projections: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return projections and targets of the global batch.

    Each rank computes the loss of all images, so the mean of their gradients is that of one process.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return projections, targets
    # The all_gather whose gradient flows back to each rank.
    from torch.distributed.nn.functional import all_gather

    labels = [torch.empty_like(targets) for _ in range(distributed.get_world_size())]
    distributed.all_gather(labels, targets)
    return torch.cat(tuple(all_gather(projections.contiguous()))), torch.cat(labels)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 and float16 as float32, others unchanged."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _shares(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return each class's share of each image, [N, C] in the logits' type."""
    return (targets if targets.is_floating_point() else functional.one_hot(targets, logits.shape[1])).to(logits.dtype)


def _weights(values: Sequence[float] | None) -> torch.Tensor | None:
    """Return class weights float32 [C] of plain numbers.

    Raises:
        ConfigError: One is negative, infinite or not a number, or all are 0.
    """
    if values is None:
        return None
    try:
        weights = torch.tensor([float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"loss.weight={values} is not a list of numbers", "give one number per class, or null"
        ) from error
    if not len(weights) or not torch.isfinite(weights).all() or weights.min() < 0 or weights.max() == 0:
        raise ConfigError(
            f"invalid loss.weight={list(values)}", "give one number of 0 or more a class, not all 0, or null"
        )
    return weights


def _unit(value: float, key: str) -> float:
    """Return a number from 0 to 1; ConfigError names the key."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{key} must be from 0 to 1, not {value}")
    return value


def _mean(losses: torch.Tensor, shares: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over images of losses [N, C], weighted by class."""
    if weight is None:
        return losses.sum() / len(losses)
    return (losses * weight).sum() / _above_zero((shares * weight).sum())


def _above_zero(total: torch.Tensor) -> torch.Tensor:
    """Return a sum of weights to divide by: where all weights are 0 the loss is 0."""
    return total.clamp_min(torch.finfo(total.dtype).tiny)
