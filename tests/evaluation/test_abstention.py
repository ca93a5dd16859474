"""Limits keep what they promise on images of the same kind, and say so where val cannot promise it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import bdtr

from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.evaluation.reliability.abstention import DEFAULTS, Decision, DecisionSettings, Evidence
from image_classifier.evaluation.reliability.selective_prediction import (
    RiskLevel,
    chance_of_fewer,
    choose_level,
    lowest_risk,
    risk_curve,
    risk_levels,
)
from image_classifier.evaluation.reliability_results import decision_score
from image_classifier.predictions import PredictionTable, softmax


def honest(
    num_images: int, seed: int, num_classes: int = 4, spread: float = 3.0, scores: bool = False
) -> PredictionTable:
    """Truths drawn from the probabilities that are stated."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=spread, size=(num_images, num_classes)).astype(np.float32)
    truth = (softmax(logits).cumsum(axis=1) < generator.random((num_images, 1))).sum(axis=1)
    names = tuple(f"c{code}" for code in range(num_classes))
    unlike = generator.normal(size=num_images).astype(np.float32) if scores else None
    return PredictionTable(("",) * num_images, np.minimum(truth, num_classes - 1), logits, names, ood_scores=unlike)


def levels_of(errors: list[bool]) -> tuple[RiskLevel, ...]:
    """Levels of images in falling order of confidence, wrong or not."""
    logits = np.stack([np.linspace(4, 0.1, len(errors)), np.zeros(len(errors))], axis=1).astype(np.float32)
    return risk_levels(
        PredictionTable(("",) * len(errors), np.array(errors, dtype=np.int64), logits, ("right", "wrong"))
    )


@pytest.mark.parametrize(
    ("wrong", "answered", "risk"), [(0, 1, 0.5), (3, 10, 0.3), (0, 59, 0.05), (200, 1000, 0.2), (10, 10, 0.5)]
)
def test_the_binomial_tail_is_that_of_scipy(wrong: int, answered: int, risk: float) -> None:
    assert chance_of_fewer(wrong, answered, risk) == pytest.approx(bdtr(wrong, answered, risk), rel=1e-9)


@given(
    errors=st.lists(st.booleans(), min_size=1, max_size=300), risks=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1))
)
def test_a_lower_risk_never_answers_more(errors: list[bool], risks: tuple[float, float]) -> None:
    levels = levels_of(errors)
    assert 1 <= len(levels) <= 64 and levels[-1].answered == len(errors) and levels[-1].wrong == sum(errors)
    assert [level.answered for level in levels] == sorted({level.answered for level in levels})
    strict, loose = (choose_level(levels, risk, 0.95) for risk in sorted(risks))
    assert strict is None or (loose is not None and strict.answered <= loose.answered)
    assert strict is None or strict.wrong <= min(risks) * strict.answered


@pytest.mark.slow
def test_the_promised_risk_is_kept_as_often_as_is_said() -> None:
    broken, answered, truth = 0, [], honest(200_000, seed=99)
    confidence, wrong = truth.probabilities.max(axis=1), truth.probabilities.argmax(axis=1) != truth.targets
    for seed in range(200):
        level = choose_level(risk_levels(honest(400, seed)), 0.1, 0.9)
        if level is not None:
            given_label = confidence >= level.threshold
            broken += wrong[given_label].mean() > 0.1
            answered.append(given_label.mean())
    assert broken <= 30  # 20 expected at the worst
    assert len(answered) > 150 and np.mean(answered) > 0.3


def test_where_val_cannot_promise_a_risk_there_is_no_threshold_and_it_is_said() -> None:
    evidence = Evidence.of(honest(30, seed=0))
    decision = Decision.chosen(evidence, DecisionSettings(risk=0.001))
    assert decision.threshold == 0 and decision.answered == 1 and not decision.reason(0.01, None)
    assert "30 val images cannot promise a risk of 0.001 with 95% confidence" in decision.note
    least = lowest_risk(evidence.levels, 0.95)
    assert f"{least:g}" in decision.note and 0.001 < least < 1
    assert not Decision.chosen(evidence, DecisionSettings(risk=least)).note
    assert Decision.chosen(evidence, DecisionSettings(risk=least)).threshold > 0


@pytest.mark.slow
@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("num_val", [40, 500, 3000])
def test_prediction_sets_hold_the_true_class_as_often_as_stated(coverage: float, num_val: int) -> None:
    held = []
    for seed in range(60):
        level = Evidence.of(honest(num_val, 2 * seed)).set_level(coverage)
        test = honest(500, 2 * seed + 1)
        held.append((test.probabilities[np.arange(500), test.targets] >= level).mean())
    error = 4 * np.sqrt(coverage * (1 - coverage) * (1 / num_val + 1 / 500) / 60)
    assert coverage - error <= np.mean(held) <= coverage + 1 / num_val + 1 / 1000 + error


def test_too_few_images_for_a_coverage_put_every_class_into_the_set() -> None:
    assert Evidence.of(honest(5, 0)).set_level(0.9) == 0.0
    decision = Decision.chosen(Evidence.of(honest(5, 0)), DEFAULTS)
    assert decision.prediction_set(np.array([0.1, 0.9, 0.0])) == [1, 0, 2]


@given(count=st.integers(1, 4000), rate=st.sampled_from([0.001, 0.01, 0.05, 0.5]))
def test_no_more_of_val_is_refused_as_unknown_than_meant(count: int, rate: float) -> None:
    table = honest(count, count, scores=True)
    assert table.ood_scores is not None
    limit = Evidence.of(table).ood_limit(rate)
    assert limit is not None
    refused = (table.ood_scores.astype(np.float64) > limit + 1e-6).mean()
    assert refused <= rate and (count < 1 / rate or refused >= rate - 2 / count - 0.002)
    assert Evidence.of(table).ood_limit(0) is None and Evidence.of(honest(count, 1)).ood_limit(rate) is None


@pytest.mark.slow
@given(seed=st.integers(0, 100), risk=st.one_of(st.none(), st.floats(0.01, 1)), rate=st.sampled_from([0.0, 0.02]))
def test_a_decision_is_the_same_after_json(seed: int, risk: float | None, rate: float) -> None:
    decision = Decision.chosen(Evidence.of(honest(120, seed, scores=True)), DecisionSettings(risk=risk, ood_rate=rate))
    again = Decision.from_dict(json.loads(json.dumps(decision.as_dict(), allow_nan=False)))
    assert again == decision
    assert again.again(DecisionSettings(coverage=0.5)).set_level >= decision.set_level
    assert again.again(DecisionSettings()) == decision


def test_a_damaged_decision_is_one_line() -> None:
    content = Decision.chosen(Evidence.of(honest(20, 0)), DEFAULTS).as_dict()
    for key in ("risk", "evidence", "conformal", "ood"):
        with pytest.raises(CheckpointError, match="damaged"):
            Decision.from_dict({name: value for name, value in content.items() if name != key})


def test_why_there_is_no_label() -> None:
    evidence = Evidence.of(honest(2000, 1, scores=True))
    decision = Decision.chosen(evidence, DecisionSettings(risk=0.05))
    assert 0.25 < decision.threshold < 1 and decision.ood_limit is not None
    assert decision.reason(1.0, 0.0) == "" and decision.reason(1.0, None) == ""
    assert decision.reason(decision.threshold, decision.ood_limit) == ""
    assert decision.reason(0.2, 0.0).startswith("not sure enough: confidence 0.200")
    assert decision.reason(1.0, 99.0).startswith("unlike the training images")
    assert decision.reason(1.0, float("nan")).startswith("unlike the training images")
    assert decision.again(DecisionSettings(risk=1.0, ood_rate=0.0)).reason(0.0, 99.0) == ""


def test_what_is_measured_adds_up() -> None:
    decision = Decision.chosen(Evidence.of(honest(1000, 1, scores=True)), DecisionSettings(risk=0.1, ood_rate=0.05))
    test = honest(1000, 2, scores=True)
    score = decision_score(test, decision)
    assert score.answered + score.unknown + score.unsure == pytest.approx(1)
    assert score.risk is not None and score.risk < 0.1 and 0.02 < score.unknown < 0.09
    assert abs(score.set_coverage - 0.9) <= 2 * score.set_spread and score.set_size > 0.9


@pytest.mark.parametrize(
    "setting",
    [{"risk": 0.0}, {"risk": 1.5}, {"risk_confidence": 1.0}, {"coverage": 0.0}, {"coverage": 1.0}, {"ood_rate": -0.1}],
)
def test_a_share_that_is_none_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"decision\.{next(iter(setting))}"):
        DecisionSettings(**setting)


def test_the_area_under_the_curve_is_the_mean_risk_and_order_makes_it_best() -> None:
    table = honest(400, 3)
    curve = risk_curve(table, num_points=1000)
    wrong = (table.probabilities.argmax(axis=1) != table.targets)[
        np.argsort(-table.probabilities.max(axis=1), kind="stable")
    ]
    np.testing.assert_allclose(curve.risk, wrong.cumsum() / np.arange(1, 401), atol=1e-12)
    assert curve.best_area <= curve.area <= wrong.mean() + 0.05 and curve.risk[-1] == pytest.approx(wrong.mean())
    flat = PredictionTable(("",) * 4, np.array([0, 1, 1, 1]), np.zeros((4, 2), np.float32), ("a", "b"))
    np.testing.assert_allclose(risk_curve(flat).risk, 0.75)  # equal confidences: no order is better than another


def test_an_image_at_its_own_limit_is_within_it() -> None:
    """Limits are kept to the last bit, however sure the model is."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1, (1000, 4)).astype(np.float32)
    targets = generator.integers(0, 4, 1000)
    logits[np.arange(1000), targets] += 25
    scores = generator.random(1000).astype(np.float32)
    table = PredictionTable(("",) * 1000, targets, logits, tuple("abcd"), ood_scores=scores)
    evidence = Evidence.of(table)
    assert 0.9 <= (table.true_probabilities() >= evidence.set_level(0.9)).mean() < 0.905
    assert (scores > evidence.ood_limit(0.01)).mean() <= 0.01
    again = Evidence.from_dict(json.loads(json.dumps(evidence.as_dict())))
    assert again == evidence
