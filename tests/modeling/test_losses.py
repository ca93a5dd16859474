"""Losses against the formulas of their papers in float64 numpy, their gradients, and what must not become a NaN."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.errors import ConfigError
from image_classifier.modeling.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    FocalLoss,
    SupervisedContrastive,
    supervised_contrastive,
)

SIZES = {"count": st.integers(1, 9), "num_classes": st.integers(2, 7), "seed": st.integers(0, 10_000)}
SMOOTHING = st.sampled_from([0.0, 0.1, 0.5])
WEIGHTED, SOFT = st.booleans(), st.booleans()
FEW = settings(max_examples=40, deadline=None)


def drawn(
    count: int, num_classes: int, seed: int, soft: bool, weighted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float] | None]:
    """Logits [N, C], targets as given to a loss, the shares [N, C] they mean, and class weights."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (count, num_classes))
    targets = random.integers(0, num_classes, count)
    shares = random.dirichlet(np.ones(num_classes), count) if soft else np.eye(num_classes)[targets]
    # Weights as float32 holds them, so that the reference may be compared to the last digit.
    weights = random.uniform(0.1, 3, num_classes).astype(np.float32).astype(float).tolist() if weighted else None
    return logits, shares if soft else targets, shares, weights


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def value_of(criterion: torch.nn.Module, logits: np.ndarray, targets: np.ndarray) -> float:
    return float(criterion(torch.from_numpy(logits), torch.from_numpy(targets)))


@FEW
@given(**SIZES, soft=SOFT, weighted=WEIGHTED, smoothing=SMOOTHING)
def test_cross_entropy_is_its_formula(
    count: int, num_classes: int, seed: int, soft: bool, weighted: bool, smoothing: float
) -> None:
    logits, targets, shares, weights = drawn(count, num_classes, seed, soft, weighted)
    factors = np.array(weights or [1.0] * num_classes)
    smooth = shares * (1 - smoothing) + smoothing / num_classes
    losses = -(smooth * factors * log_softmax(logits)).sum(1)
    divisor = count if soft else (shares * factors).sum()  # torch's rule
    assert value_of(_double(CrossEntropy(weights, smoothing)), logits, targets) == pytest.approx(
        losses.sum() / divisor, rel=1e-6
    )


@FEW
@given(**SIZES, soft=SOFT, weighted=WEIGHTED, gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
def test_focal_loss_is_its_formula(
    count: int, num_classes: int, seed: int, soft: bool, weighted: bool, gamma: float
) -> None:
    logits, targets, shares, weights = drawn(count, num_classes, seed, soft, weighted)
    factors = np.array(weights or [1.0] * num_classes)
    log_p = log_softmax(logits)
    expected = -(shares * factors * (1 - np.exp(log_p)) ** gamma * log_p).sum() / (shares * factors).sum()
    assert value_of(_double(FocalLoss(gamma, weights)), logits, targets) == pytest.approx(expected, rel=1e-6)


@FEW
@given(**SIZES, soft=SOFT, weighted=WEIGHTED, smoothing=SMOOTHING)
def test_binary_cross_entropy_is_its_formula(
    count: int, num_classes: int, seed: int, soft: bool, weighted: bool, smoothing: float
) -> None:
    logits, targets, shares, weights = drawn(count, num_classes, seed, soft, weighted)
    smooth = shares * (1 - smoothing) + smoothing / num_classes
    losses = (smooth * np.log1p(np.exp(-logits)) + (1 - smooth) * np.log1p(np.exp(logits))).sum(1)
    own = (shares * np.array(weights or [1.0] * num_classes)).sum(1)
    assert value_of(_double(BinaryCrossEntropy(weights, smoothing)), logits, targets) == pytest.approx(
        (losses * own).sum() / own.sum(), rel=1e-6
    )


def contrast_by_hand(projections: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    """Equation 2 of Khosla et al. (2020), image by image; the mean over those with a partner."""
    vectors = projections / np.linalg.norm(projections, axis=1, keepdims=True)
    losses = []
    for i in range(len(targets)):
        partners = [p for p in range(len(targets)) if p != i and targets[p] == targets[i]]
        if not partners:
            continue
        total = sum(np.exp(vectors[i] @ vectors[a] / temperature) for a in range(len(targets)) if a != i)
        losses.append(-np.mean([np.log(np.exp(vectors[i] @ vectors[p] / temperature) / total) for p in partners]))
    return float(np.mean(losses)) if losses else 0.0


@FEW
@given(**SIZES, length=st.integers(1, 6), temperature=st.sampled_from([0.05, 0.1, 0.5, 1.0]))
def test_supervised_contrast_is_equation_2(
    count: int, num_classes: int, seed: int, length: int, temperature: float
) -> None:
    random = np.random.default_rng(seed)
    projections, targets = random.normal(0, 2, (count, length)), random.integers(0, num_classes, count)
    found = supervised_contrastive(torch.from_numpy(projections), torch.from_numpy(targets), temperature)
    assert float(found) == pytest.approx(contrast_by_hand(projections, targets, temperature), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "criterion",
    [
        CrossEntropy([1.0, 2.0, 0.5], 0.1),
        FocalLoss(2.0, [1.0, 2.0, 0.5]),
        FocalLoss(0.5),
        BinaryCrossEntropy(None, 0.1),
    ],
)
def test_gradients_are_those_of_the_formulas(criterion: torch.nn.Module, soft: bool, seed: int) -> None:
    logits, targets, _, _ = drawn(4, 3, seed, soft, weighted=False)
    criterion = _double(criterion)
    assert torch.autograd.gradcheck(
        lambda x: criterion(x, torch.from_numpy(targets)), torch.from_numpy(logits).requires_grad_()
    )


@pytest.mark.parametrize("targets", [[0, 0, 1, 1, 2], [0, 0, 0], [0, 1, 2, 0]])
def test_the_gradient_of_the_contrast(targets: list[int]) -> None:
    projections = torch.randn(
        len(targets), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, torch.tensor(targets), 0.2), projections)


@FEW
@given(**SIZES, weighted=WEIGHTED)
def test_classes_and_their_one_hot_shares_mean_the_same(
    count: int, num_classes: int, seed: int, weighted: bool
) -> None:
    logits, targets, shares, weights = drawn(count, num_classes, seed, False, weighted)
    for criterion in (FocalLoss(2.0, weights), BinaryCrossEntropy(weights, 0.1)):
        assert value_of(criterion, logits, targets) == pytest.approx(value_of(criterion, logits, shares), rel=1e-5)
    assert value_of(FocalLoss(0.0, weights), logits, targets) == pytest.approx(
        value_of(_double(CrossEntropy(weights)), logits, targets), rel=1e-5
    )


@FEW
@given(seed=st.integers(0, 100), copies=st.integers(2, 4))
def test_the_contrast_does_not_depend_on_order_or_scale(seed: int, copies: int) -> None:
    random = np.random.default_rng(seed)
    projections, targets = torch.from_numpy(random.normal(size=(6, 3))), torch.from_numpy(random.integers(0, 3, 6))
    order = torch.from_numpy(random.permutation(6))
    value = supervised_contrastive(projections, targets, 0.1)
    torch.testing.assert_close(supervised_contrastive(projections[order], targets[order], 0.1), value)
    torch.testing.assert_close(supervised_contrastive(copies * projections, targets, 0.1), value)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_batch_without_partners_costs_nothing_and_moves_nothing(count: int) -> None:
    projections = torch.randn(count, 4, requires_grad=True)
    loss = supervised_contrastive(projections, torch.arange(count), 0.1)
    loss.backward()
    assert loss.item() == 0 and projections.grad is not None and not projections.grad.any()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_extreme_logits_give_finite_losses_and_gradients(gamma: float) -> None:
    for criterion in (
        FocalLoss(gamma),
        FocalLoss(gamma, [0.0, 1.0]),
        BinaryCrossEntropy(),
        BinaryCrossEntropy([0.0, 1.0]),
    ):
        logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], requires_grad=True)
        for targets in (torch.tensor([0, 0, 0]), torch.tensor([1, 1, 0]), torch.full((3, 2), 0.5)):
            loss = criterion(logits, targets)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_equal_and_zero_projections_give_finite_gradients() -> None:
    for projections in (torch.ones(4, 3), torch.zeros(4, 3)):
        projections.requires_grad_()
        supervised_contrastive(projections, torch.tensor([0, 0, 1, 1]), 0.01).backward()
        assert projections.grad is not None and torch.isfinite(projections.grad).all()


@pytest.mark.parametrize(
    "criterion", [CrossEntropy(), FocalLoss(), BinaryCrossEntropy(), SupervisedContrastive(joint=True)]
)
def test_bfloat16_networks_are_judged_in_float32(criterion: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(64, 10, generator=generator).bfloat16(),
        torch.randint(0, 10, (64,), generator=generator),
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(logits, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, criterion(logits.float(), targets), rtol=1e-6, atol=0)
        projections = torch.randn(64, 16, generator=generator)
        found = supervised_contrastive(projections, targets, 0.05)
    torch.testing.assert_close(
        found, supervised_contrastive(projections.double(), targets, 0.05).float(), rtol=1e-5, atol=0
    )


def test_alone_the_contrast_teaches_the_network_and_cross_entropy_only_the_head() -> None:
    torch.manual_seed(0)
    backbone, head = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)
    criterion = SupervisedContrastive(projection=4)
    criterion.attach(8)
    images, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    embeddings = backbone(images)
    criterion(head(embeddings.detach() if criterion.head_apart else embeddings), targets, embeddings).backward()
    found = backbone.weight.grad.clone()
    backbone.zero_grad()
    (criterion.contrast * supervised_contrastive(criterion.neck(backbone(images)), targets, 0.1)).backward()
    torch.testing.assert_close(found, backbone.weight.grad)
    assert head.weight.grad is not None and head.weight.grad.any()


@FEW
@given(contrast=st.floats(0.1, 2), smoothing=SMOOTHING, weighted=WEIGHTED)
def test_joined_the_loss_is_the_sum(contrast: float, smoothing: float, weighted: bool) -> None:
    weights = [1.0, 2.0, 0.5] if weighted else None
    criterion = SupervisedContrastive(0.2, 4, joint=True, contrast=contrast, label_smoothing=smoothing, weight=weights)
    criterion.attach(8)
    logits, embeddings, targets = torch.randn(6, 3), torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    plain = CrossEntropy(weights, smoothing)(logits, targets)
    torch.testing.assert_close(criterion(logits, targets), plain)
    torch.testing.assert_close(
        criterion(logits, targets, embeddings),
        plain + contrast * supervised_contrastive(criterion.neck(embeddings), targets, 0.2),
    )
    assert not criterion.head_apart


def gradient_of_a_rank(rank: int, place: str, count: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    criterion, images, targets = contrast_of_a_batch(count)
    own = slice(rank * count // 2, (rank + 1) * count // 2)
    criterion(torch.zeros(count // 2, 3), targets[own], images[own]).backward()
    torch.save([parameter.grad for parameter in criterion.parameters()], f"{place}/{rank}.pt")
    torch.distributed.destroy_process_group()


def contrast_of_a_batch(count: int) -> tuple[SupervisedContrastive, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    criterion = SupervisedContrastive(projection=4, joint=True)
    criterion.attach(6)
    return criterion, torch.randn(count, 6), torch.arange(count) % 3


@pytest.mark.slow
def test_two_ranks_contrast_the_whole_batch(tmp_path: Path) -> None:
    """The mean of the ranks' gradients, which is what DDP takes, is the gradient of one process."""
    torch.multiprocessing.spawn(gradient_of_a_rank, (str(tmp_path), 12), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    criterion, images, targets = contrast_of_a_batch(12)
    criterion(torch.zeros(12, 3), targets, images).backward()
    for parameter, first, second in zip(criterion.parameters(), *ranks, strict=True):
        torch.testing.assert_close((first + second) / 2, parameter.grad)


def test_mixed_images_have_no_class_to_attract_one_another() -> None:
    with pytest.raises(ValueError, match="mixed image"):
        SupervisedContrastive()(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: FocalLoss(-1), r"loss\.gamma"),
        (lambda: FocalLoss(float("nan")), r"loss\.gamma"),
        (lambda: CrossEntropy(label_smoothing=1.5), r"loss\.label_smoothing"),
        (lambda: BinaryCrossEntropy(label_smoothing=-0.1), r"loss\.label_smoothing"),
        (lambda: CrossEntropy([1.0, -1.0]), r"loss\.weight"),
        (lambda: CrossEntropy(["a"]), r"loss\.weight"),  # type: ignore[list-item]
        (lambda: CrossEntropy(3.0), r"loss\.weight"),  # type: ignore[arg-type]
        (lambda: BinaryCrossEntropy([0.0, 0.0]), r"loss\.weight"),
        (lambda: FocalLoss(2.0, [float("inf")]), r"loss\.weight"),
        (lambda: SupervisedContrastive(temperature=0), r"loss\.temperature"),
        (lambda: SupervisedContrastive(views=3), r"loss\.views"),
        (lambda: SupervisedContrastive(projection=0), r"loss\.projection"),
    ],
)
def test_an_impossible_loss_says_why(build: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        build()
    assert "\n" not in str(refusal.value)


def _double(criterion: torch.nn.Module) -> torch.nn.Module:
    return criterion.double()
