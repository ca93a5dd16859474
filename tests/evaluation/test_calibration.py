"""Calibration: the temperature has the greatest likelihood, changes no prediction, and has a note if undetermined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import DataError
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.evaluation.reliability.calibration import (
    Reliability,
    calibration_score,
    fit_temperature,
    noise_floor,
)
from image_classifier.predictions import PredictionTable, softmax


def table(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> PredictionTable:
    names = tuple(f"c{code}" for code in range(logits.shape[1]))
    return PredictionTable(("",) * len(targets), targets, logits.astype(np.float32), names, temperature)


def honest(
    num_images: int, num_classes: int, temperature: float, seed: int = 0, spread: float = 2.0
) -> PredictionTable:
    """Truths drawn from the softmax of logits that are then multiplied by a temperature."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=spread, size=(num_images, num_classes))
    truth = (softmax(logits).cumsum(axis=1) < generator.random((num_images, 1))).sum(axis=1)
    return table(logits * temperature, np.minimum(truth, num_classes - 1))


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_a_planted_temperature_is_found(temperature: float, num_classes: int) -> None:
    fit = fit_temperature(honest(6000, num_classes, temperature))
    assert fit.temperature == pytest.approx(temperature, rel=0.08) and not fit.note


LOGITS = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), min_size=count, max_size=count),
        st.lists(st.integers(0, 2), min_size=count, max_size=count),
    )
)


@given(LOGITS)
def test_the_likelihood_never_falls_and_no_answer_changes(content: tuple[list[list[float]], list[int]]) -> None:
    before = table(np.array(content[0], dtype=np.float32), np.array(content[1]))
    fit = fit_temperature(before)
    after = replace(before, temperature=fit.temperature)
    assert 0.05 <= fit.temperature <= 20
    assert fit.nll_after <= fit.nll_before + 1e-9
    assert compute_metrics(after, resamples=0).log_loss == pytest.approx(fit.nll_after, abs=1e-6)
    rows = np.arange(
        len(before.targets)
    )  # the answer stays one of the greatest logits, though equal ones may become more
    assert (after.probabilities[rows, before.logits.argmax(axis=1)] == after.probabilities.max(axis=1)).all()


@pytest.mark.slow
@given(LOGITS)
def test_no_other_temperature_is_likelier(content: tuple[list[list[float]], list[int]]) -> None:
    part = table(np.array(content[0], dtype=np.float32), np.array(content[1]))
    fit = fit_temperature(part)
    if (part.logits.argmax(axis=1) == part.targets).all():
        assert fit.temperature == 1.0 and "all val images are classified correctly" in fit.note
        return
    for other in np.geomspace(0.05, 20, 12):
        assert fit.nll_after <= compute_metrics(replace(part, temperature=float(other)), resamples=0).log_loss + 1e-6


def test_parts_that_cannot_tell_a_temperature_get_a_bounded_one_and_say_so() -> None:
    targets = np.arange(20) % 4
    right = 40.0 * np.eye(4)[targets]
    assert fit_temperature(table(right, targets)).temperature == 1.0
    wrong = fit_temperature(table(1000 * right, (targets + 1) % 4))
    assert wrong.temperature == pytest.approx(20) and "beyond the limit of 20" in wrong.note
    one = fit_temperature(table(right[:1], targets[:1]))
    assert one.temperature == 1.0 and one.num_images == 1 and one.note
    flat = fit_temperature(table(np.zeros((5, 4)), targets[:5]))
    assert flat.nll_after == flat.nll_before == pytest.approx(np.log(4))
    with pytest.raises(DataError, match="no image"):
        fit_temperature(table(right[:0], targets[:0]))
    with pytest.raises(DataError, match="not finite numbers"):
        fit_temperature(table(np.full((2, 4), np.nan), targets[:2]))


def test_blocks_of_rows_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    part = honest(500, 7, 1.7)
    whole = fit_temperature(part)
    monkeypatch.setattr("image_classifier.evaluation.reliability.calibration._BLOCK_NUMBERS", 64)
    assert fit_temperature(part).temperature == pytest.approx(whole.temperature, rel=1e-9)


def test_calibration_lowers_the_error_of_a_model_that_is_too_sure_or_not_sure_enough() -> None:
    for temperature in (0.4, 3.0):
        val, test = honest(4000, 5, temperature, seed=1), honest(4000, 5, temperature, seed=2)
        score = calibration_score(replace(test, temperature=fit_temperature(val).temperature))
        assert score.ece_before > 0.05 and score.ece_after < 0.03
        assert score.nll_after < score.nll_before
        assert score.ece_after < 2 * score.ece_by_chance_95


def test_the_error_is_that_of_the_metrics_and_chance_alone_makes_some() -> None:
    part = honest(300, 4, 1.0)
    score = calibration_score(part)
    assert score.ece_after == pytest.approx(compute_metrics(part).ece, abs=1e-12)
    confidence = part.probabilities.max(axis=1)
    many, few = noise_floor(np.tile(confidence, 20))[0], noise_floor(confidence)[0]
    assert 0 < many < few < noise_floor(confidence)[1]
    beyond = np.tile(confidence, 100)  # more than are simulated: scaled
    assert noise_floor(beyond)[0] == pytest.approx(few / 10, rel=0.3)


def test_what_is_not_reached_is_said() -> None:
    part = honest(300, 4, 6.0)
    assert "above the goal of 0.02" in calibration_score(part).line("test")
    sure = table(np.array([[9.0, 0.0]] * 4), np.zeros(4, np.int64))
    score = calibration_score(sure)
    assert score.is_reached and "not reached" not in score.line("test")


def test_every_answer_is_in_one_bin() -> None:
    part = honest(500, 4, 1.0)
    bins = Reliability.of(part)
    assert bins.counts.sum() == 500
    assert (bins.counts * bins.accuracy).sum() == (part.probabilities.argmax(axis=1) == part.targets).sum()


@pytest.mark.parametrize("level", [0.0, 3.5])
def test_a_network_that_answers_everything_alike_keeps_its_temperature(level: float) -> None:
    part = PredictionTable(("",) * 6, np.array([0, 1, 2, 0, 1, 2]), np.full((6, 3), level, np.float32), ("a", "b", "c"))
    fit = fit_temperature(part)
    assert fit.temperature == 1.0 and fit.nll_after == fit.nll_before and "no temperature" in fit.note
