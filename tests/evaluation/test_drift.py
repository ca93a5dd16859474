"""Drift: the same kind of images raises no alarm, another kind does, and a few prove nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.evaluation.drift import FEWEST, DriftReference
from image_classifier.evaluation.reliability.abstention import Decision, DecisionSettings, Evidence
from image_classifier.predictions import PredictionTable

RNG = np.random.default_rng(0)


def decision_of(confidences: np.ndarray, scores: np.ndarray | None) -> dict[str, object]:
    """What a bundle keeps of a val part with these confidences of two classes."""
    logits = np.stack([np.log(confidences), np.log1p(-confidences)], axis=1).astype(np.float32)
    names = tuple(map(str, range(len(logits))))
    table = PredictionTable(names, np.zeros(len(logits), np.int64), logits, ("a", "b"), ood_scores=scores)
    return json.loads(json.dumps(Decision.chosen(Evidence.of(table), DecisionSettings()).as_dict()))


def part(count: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 0.5 + 0.4999 * rng.beta(4 - 2 * shift, 1, count), rng.normal(shift, 1, count).astype(np.float32)


@given(st.integers(0, 10**6), st.sampled_from([60, 300, 3000]), st.sampled_from([80, 500, 4000]))
def test_the_same_kind_of_images_is_alike(seed: int, traffic: int, val: int) -> None:
    reference = DriftReference.of(decision_of(*part(val, seed)))
    assert reference is not None and reference.num_images == val
    confidences, scores = part(traffic, seed + 1)
    shifts = reference.shifts({"confidence": confidences, "ood_score": scores})
    assert [shift.figure for shift in shifts] == ["confidence", "ood_score"]
    # Of 200 looks with a chance of a thousandth each one may well be wrong; by this much none is.
    assert all(shift.distance < 1.25 * shift.limit for shift in shifts)


def test_another_kind_of_images_has_drifted() -> None:
    reference = DriftReference.of(decision_of(*part(500, 1)))
    assert reference is not None
    confidences, scores = part(500, 2, shift=1.0)
    confidence, score = reference.shifts({"confidence": confidences, "ood_score": scores})
    assert (
        confidence.drifted
        and score.drifted
        and score.median > score.val_median
        and confidence.median < confidence.val_median
    )
    assert score.distance == pytest.approx(0.38, abs=0.08)  # of two normal distributions a standard deviation apart


def test_a_few_images_prove_nothing_and_the_limit_falls_with_their_number() -> None:
    reference = DriftReference.of(decision_of(*part(500, 1)))
    assert reference is not None
    limits = []
    for count in (1, FEWEST - 1, FEWEST, 1000):
        (shift,) = reference.shifts({"ood_score": np.full(count, 100.0)})
        assert shift.distance == pytest.approx(1) and shift.drifted == (count >= FEWEST)
        assert shift.as_dict()["drifted"] == shift.drifted and json.dumps(shift.as_dict())
        limits.append(shift.limit)
    assert limits == sorted(limits, reverse=True) and limits[-1] >= 0.1


def test_what_val_did_not_tell_is_not_compared() -> None:
    confidences, _ = part(100, 1)
    reference = DriftReference.of(decision_of(confidences, None))
    assert reference is not None
    assert [shift.figure for shift in reference.shifts({"confidence": confidences, "ood_score": [1.0]})] == [
        "confidence"
    ]
    assert reference.shifts({"confidence": []}) == []
    assert DriftReference.of({}) is None and DriftReference.of(None) is None
