"""Imbalance: the sampler draws classes equally often and wears no image out; weights count rare classes more, in
training only.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import ConfigError
from image_classifier.training.balance import balanced_rows, class_weights, describe
from image_classifier.training.builders import build_criteria

COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
CROSS_ENTROPY = {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.0}


def sized(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows 100, 101, ... and their classes, so many of each."""
    targets = np.repeat(np.arange(len(counts)), counts)
    return np.arange(100, 100 + len(targets)), targets


@given(counts=COUNTS, seed=st.integers(0, 5), epoch=st.integers(0, 30))
def test_an_epoch_has_as_many_rows_and_equal_classes(counts: list[int], seed: int, epoch: int) -> None:
    rows, targets = sized(counts)
    drawn = balanced_rows(rows, targets, seed, epoch)
    assert len(drawn) == len(rows) and set(drawn) <= set(rows)
    shares = np.bincount(targets[drawn - 100], minlength=len(counts))
    assert shares.max() - shares.min() <= 1
    assert np.array_equal(drawn, balanced_rows(rows, targets, seed, epoch))


@given(counts=COUNTS, seed=st.integers(0, 5), epochs=st.integers(1, 12))
def test_no_image_comes_twice_before_all_of_its_class_came_once(counts: list[int], seed: int, epochs: int) -> None:
    rows, targets = sized(counts)
    seen = Counter(row for epoch in range(epochs) for row in balanced_rows(rows, targets, seed, epoch).tolist())
    for code in range(len(counts)):
        times = [seen[row] for row in rows[targets == code].tolist()]
        assert max(times) - min(times) <= 1
    drawn = [sum(seen[row] for row in rows[targets == code].tolist()) for code in range(len(counts))]
    assert max(drawn) - min(drawn) <= 1  # the remainder goes round, over all epochs too


def test_orders_differ_between_seeds_and_epochs_and_mix_the_classes() -> None:
    rows, targets = sized([40, 10])
    orders = {tuple(balanced_rows(rows, targets, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    first = targets[balanced_rows(rows, targets, 0, 0)[:25] - 100]
    assert 5 < first.sum() < 20


def test_a_class_without_training_rows_is_no_class() -> None:
    rows, targets = np.arange(6), np.array([0, 0, 0, 0, 2, 2])
    assert Counter(targets[balanced_rows(rows, targets, 0, 0)].tolist()) == {0: 3, 2: 3}
    assert class_weights(targets, 3).tolist() == [0.75, 0.0, 1.5]


@given(counts=COUNTS)
def test_weights_are_inverse_to_the_counts_and_one_on_average(counts: list[int]) -> None:
    _, targets = sized(counts)
    weights = class_weights(targets, len(counts))
    assert weights.dtype == np.float32 and weights[targets].mean() == pytest.approx(1, rel=1e-5)
    assert np.allclose(weights * counts, weights[0] * counts[0], rtol=1e-5)


def test_the_log_names_the_choice_and_both_extremes() -> None:
    _, targets = sized([3, 9, 5])
    assert (
        describe("sampler", targets, ("ant", "bee", "cow"))
        == "balance: sampler (training images per class: 3 of 'ant' to 9 of 'bee')"
    )


def criteria(loss: dict[str, Any], balance: str = "none", mix: bool = False) -> tuple[torch.nn.Module, torch.nn.Module]:
    return build_criteria(loss, sized([3, 9, 6])[1], 3, balance=balance, is_mixed=mix)


def test_only_the_training_loss_is_weighted() -> None:
    criterion, val_criterion = criteria(CROSS_ENTROPY, "weights")
    assert isinstance(criterion.weight, torch.Tensor) and torch.allclose(
        criterion.weight, torch.tensor([2.0, 2 / 3, 1.0])
    )
    assert "weight" in dict(criterion.named_buffers())  # so that it follows the module to its device
    assert val_criterion.weight is None
    assert criteria(CROSS_ENTROPY, "sampler")[0].weight is None


@pytest.mark.parametrize("loss", ["torch.nn.CrossEntropyLoss", "torch.nn.MultiMarginLoss"])
def test_a_rare_class_costs_more(loss: str) -> None:
    criterion, _ = criteria({"_target_": loss, "reduction": "none"}, "weights")
    losses = criterion(torch.zeros(3, 3), torch.arange(3))
    assert losses[0] > losses[2] > losses[1]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"_target_": "timm.loss.LabelSmoothingCrossEntropy"},
            "takes no class weights, which data.balance=weights needs",
        ),
        ({"_target_": "torch.nn.KLDivLoss"}, "takes no class weights"),
        (CROSS_ENTROPY | {"weight": {"_target_": "torch.nn.Parameter", "data": None}}, "loss.weight is given"),
    ],
)
def test_a_loss_without_room_for_weights_is_refused_in_one_line(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        criteria(loss, "weights")
    assert "\n" not in str(refusal.value)


def test_a_loss_that_takes_no_shares_is_refused_where_images_are_mixed() -> None:
    margin = {"_target_": "torch.nn.MultiMarginLoss"}
    criteria(margin)
    with pytest.raises(
        ConfigError, match=r"takes one class per image, and augment.mix gives shares of several: use loss=cross_entropy"
    ) as refusal:
        criteria(margin, mix=True)
    assert "\n" not in str(refusal.value)
    for balance in ("none", "weights"):
        criterion, _ = criteria(CROSS_ENTROPY, balance, mix=True)
        assert torch.isfinite(criterion(torch.randn(4, 3), torch.full((4, 3), 1 / 3)))
