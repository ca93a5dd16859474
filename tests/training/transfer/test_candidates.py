"""The delivered model is never worse on val than the probe, and the choice is kept with its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.predictions import PredictionTable
from image_classifier.training.transfer.candidates import (
    PROBE,
    Candidate,
    choose,
    interpolated,
    paired_p,
    start_from_probe,
)
from tests.training.transfer.small_inputs import small_inputs, small_module

TARGETS = np.array([0, 1, 2, 0, 1, 2])


def candidate(name: str, logits: np.ndarray) -> Candidate:
    paths = tuple(f"{row}.png" for row in range(len(TARGETS)))
    return Candidate(name, "", 1.0, PredictionTable(paths, TARGETS, logits.astype(np.float32), ("a", "b", "c")), 0.5)


def sure(right: list[bool], margin: float) -> np.ndarray:
    """Logits that are right at some images, by a margin."""
    classes = np.where(right, TARGETS, (TARGETS + 1) % 3)
    return margin * np.eye(3)[classes]


@given(st.lists(st.lists(st.integers(-3, 3), min_size=18, max_size=18), min_size=1, max_size=5))
def test_the_delivered_one_has_as_many_right_as_any_other(tables: list[list[int]]) -> None:
    everyone = [candidate(str(number), np.reshape(table, (6, 3))) for number, table in enumerate(tables)]
    chosen = choose(everyone).chosen
    assert chosen.right.sum() == max(one.right.sum() for one in everyone)
    rivals = [one for one in everyone if one.right.sum() == chosen.right.sum()]
    assert chosen.log_loss == min(one.log_loss for one in rivals)
    assert next(one for one in rivals if one.log_loss == chosen.log_loss) is chosen  # the probe is the first


def test_of_equals_the_one_with_the_smaller_log_loss_is_delivered() -> None:
    right = [True, True, True, False, True, False]
    doubtful = np.where(np.array(right)[:, None], 3, 1) * sure(right, 1)  # less sure where it is wrong
    probe, trained = candidate(PROBE, sure(right, 1)), candidate("fine-tuned", doubtful)
    assert probe.accuracy == trained.accuracy and choose([probe, trained]).chosen is trained
    assert trained.log_loss == pytest.approx(candidate("more sure", 5 * doubtful).log_loss, abs=1e-3)
    assert choose([probe, candidate("fine-tuned", sure(right, 9))]).chosen is probe


def test_each_row_of_the_choice_says_what_it_reached(caplog: pytest.LogCaptureFixture) -> None:
    everyone = [candidate(PROBE, sure([True] * 3 + [False] * 3, 1)), candidate("fine-tuned", sure([True] * 6, 1))]
    with caplog.at_level("INFO"):
        rows = choose(everyone).as_dict()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["delivered"] for row in rows] == [False, True] and rows[1]["p_value"] is None
    assert rows[0]["p_value"] == 0.25 and rows[0]["val_accuracy"] == 0.5 and rows[1]["val_accuracy"] == 1
    assert [line.message.split()[1] for line in caplog.records] == ["probe", "fine-tuned"]
    assert "not delivered, p 0.25 against it" in caplog.text


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (8, 0, 2 / 2**8),
        (0, 5, 2 / 2**5),
        (1, 9, 22 / 2**10),
        (5, 5, 1.0),
        (3, 4, 1.0),
        (2, 10, 158 / 2**12),
    ],
)
def test_the_p_value_is_twice_the_tail_of_a_fair_coin(only_first: int, only_second: int, p_value: float) -> None:
    first = np.array([True] * only_first + [False] * only_second + [True, False] * 4)
    second = np.array([False] * only_first + [True] * only_second + [True, False] * 4)
    assert paired_p(first, second) == pytest.approx(p_value) == paired_p(second, first)


def test_weights_at_both_ends_of_the_way_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(999, generator=generator), "n": torch.tensor(3)}
    end = {"w": torch.randn(999, generator=generator) * 1e3, "n": torch.tensor(8)}
    for share, expected in ((0.0, start), (1.0, end)):
        assert torch.equal(interpolated(start, end, share)["w"], expected["w"])
    between = interpolated(start, end, 0.25)
    torch.testing.assert_close(between["w"], 0.75 * start["w"] + 0.25 * end["w"])
    assert between["n"] == 8  # a counter has no half


@pytest.mark.parametrize("harmful", [True, False])
def test_the_classifier_ends_with_the_weights_that_were_chosen(harmful: bool, tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path, "finetune.interpolate=[0.5]", num_train=30, num_val=30, hint=60)
    classifier = small_module(inputs).classifier
    start = start_from_probe(inputs, classifier)
    good = {name: value.clone() for name, value in classifier.state_dict().items()}
    assert all(torch.equal(value, start.weights[name]) for name, value in good.items())
    head = classifier.head[1]
    with torch.no_grad():
        if harmful:
            head.weight.mul_(-1)
        else:  # as sure of itself as can be, and right: nothing beats the log loss
            start.fitted.tables["val"].logits[:] *= -1
    trained = {name: value.clone() for name, value in classifier.state_dict().items()}
    choice = start.choose(classifier, inputs, None)
    assert [one.name for one in choice.candidates] == [PROBE, "50% of the way", "fine-tuned"]
    assert choice.chosen.accuracy >= choice.candidates[0].accuracy
    assert (choice.chosen.name == PROBE) is harmful
    if harmful:
        assert all(torch.equal(value, good[name]) for name, value in classifier.state_dict().items())
    elif choice.chosen.name == "fine-tuned":
        assert all(torch.equal(value, trained[name]) for name, value in classifier.state_dict().items())


def test_without_a_training_the_probe_is_alone(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path, "finetune.interpolate=[]", "trainer.max_epochs=0", num_train=30)
    classifier = small_module(inputs).classifier
    choice = start_from_probe(inputs, classifier).choose(classifier, inputs, None)
    assert choice.chosen is choice.candidates[0] and len(choice.candidates) == 1
    table = replace(choice.chosen.val)
    assert choice.as_dict()[0]["val_accuracy"] == float((table.logits.argmax(axis=1) == table.targets).mean())
