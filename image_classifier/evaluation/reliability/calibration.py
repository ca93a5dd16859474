"""Calibration: one temperature fitted on val, so that of the answers given with 80 % confidence 80 % are right (Guo et al., 2017)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from image_classifier.errors import DataError
from image_classifier.predictions import PredictionTable

NUM_BINS = 15
_EDGES = np.linspace(0.0, 1.0, NUM_BINS + 1)
GOAL = 0.02  # what the expected calibration error is to stay below on the test part
_COLDEST, _HOTTEST = 0.05, 20.0
_BLOCK_NUMBERS = 2**21  # logits at a time, 16 MiB
_TOLERANCE, _MAX_STEPS = 1e-6, 60
_NOTHING = 1e-12  # nats an image, that rounding alone makes
_DRAWS, _MOST_SIMULATED = 200, 20_000


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature with the greatest likelihood on one part, the mean negative log-likelihood in nats at 1 and at it, and what is odd about it."""

    temperature: float
    nll_before: float
    nll_after: float
    num_images: int
    note: str = ""


def fit_temperature(table: PredictionTable) -> TemperatureFit:
    """Fit the temperature between 0.05 and 20; where the part cannot tell it, `note` says why.

    Raises:
        DataError: The part is empty, or a logit is not a number.
    """
    if not len(table.targets):
        raise DataError("there is no image to fit the temperature to", "give a val part")
    if not np.isfinite(table.logits).all():
        raise DataError("the logits are not numbers", "the model has diverged; train again with a lower learning rate")
    if (table.logits.argmax(axis=1) == table.targets).all():
        nll = _moments(table, 1.0)[0]
        return TemperatureFit(
            1.0, nll, nll, len(table.targets), "every val image is right, so none says how sure is too sure: 1 is kept"
        )
    temperature, note = 1 / _sharpness(table), ""
    for bound in (_COLDEST, _HOTTEST):
        if math.isclose(temperature, bound, rel_tol=1e-3):
            temperature = bound
            note = f"the likelihood still grows beyond {bound:g}, the bound: do not trust the probabilities"
    before, after = (_moments(table, sharpness)[0] for sharpness in (1.0, 1 / temperature))
    if before - after <= _NOTHING:
        temperature, after, note = 1.0, before, "no temperature makes val more likely than another: 1 is kept"
    return TemperatureFit(temperature, before, after, len(table.targets), note)


def _sharpness(table: PredictionTable) -> float:
    """1 / temperature: in it the likelihood has one maximum, found by Newton's steps, each kept within the bracket that is left."""
    low, high, sharpness = 1 / _HOTTEST, 1 / _COLDEST, 1.0
    for _ in range(_MAX_STEPS):
        _, slope, bend = _moments(table, sharpness)
        low, high = (low, sharpness) if slope > 0 else (sharpness, high)
        following = sharpness - slope / bend if bend > 0 else math.inf
        if not low <= following <= high:
            following = math.sqrt(low * high)
        if abs(following - sharpness) <= _TOLERANCE * sharpness:
            return following
        sharpness = following
    return sharpness


def _moments(table: PredictionTable, sharpness: float) -> tuple[float, float, float]:
    """The mean negative log-likelihood of softmax(sharpness * logits), and its first and second derivative in the sharpness."""
    totals = np.zeros(3)
    step = max(1, _BLOCK_NUMBERS // len(table.classes))
    for start in range(0, len(table.targets), step):
        logits = table.logits[start : start + step].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        truth = logits[np.arange(len(logits)), table.targets[start : start + step]]
        weights = np.exp(sharpness * logits)
        total = weights.sum(axis=1)
        mean = np.einsum("nc,nc->n", weights, logits) / total
        square = np.einsum("nc,nc,nc->n", weights, logits, logits) / total
        totals += (np.log(total) - sharpness * truth).sum(), (mean - truth).sum(), np.maximum(square - mean**2, 0).sum()
    nll, slope, bend = (totals / len(table.targets)).tolist()
    return nll, slope, bend


@dataclass(frozen=True)
class Reliability:
    """Answers in 15 bins of equal width of the confidence, each open on the left: how many, how sure they are, what share is right."""

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, table: PredictionTable) -> Reliability:
        """The bins of one part."""
        predicted, confidence = table.answers()
        return cls.counted(confidence, predicted == table.targets)

    @classmethod
    def counted(cls, confidence: np.ndarray, correct: np.ndarray) -> Reliability:
        """The bins of confidences float64 [N] and right answers bool [N]."""
        edges, bins = _EDGES, bins_of(confidence)
        counts, sums, hits = (
            np.bincount(bins, weights=weights, minlength=NUM_BINS) for weights in (None, confidence, correct)
        )
        return cls(edges, counts, sums / np.maximum(counts, 1), hits / np.maximum(counts, 1))

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean over all answers of the gap of their bin."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(1, self.counts.sum()))

    def as_dict(self) -> dict[str, list[float]]:
        """Plain values, ready for JSON."""
        columns = {"edges": self.edges, "counts": self.counts, "confidence": self.confidence, "accuracy": self.accuracy}
        return {name: column.tolist() for name, column in columns.items()}


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, int64 [N]: 15 of equal width, each open on the left (Guo et al., 2017)."""
    return np.asarray(np.clip(np.searchsorted(_EDGES, confidence, side="left") - 1, 0, NUM_BINS - 1))


def noise_floor(confidence: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The ECE, mean and 95th percentile, that a model whose confidences float64 [N] are true shows on so few images, by simulation.

    Above 20 000 images as many of them are simulated, and the result is scaled to N: it falls with its square root.
    """
    generator = np.random.default_rng(seed)
    chosen = (
        confidence
        if len(confidence) <= _MOST_SIMULATED
        else generator.choice(confidence, _MOST_SIMULATED, replace=False)
    )
    bins = bins_of(chosen)
    gaps = ((generator.random(len(chosen)) < chosen) - chosen for _ in range(_DRAWS))
    draws = [np.abs(np.bincount(bins, weights=gap)).sum() / len(chosen) for gap in gaps]
    scale = math.sqrt(len(chosen) / len(confidence))
    return float(np.mean(draws)) * scale, float(np.quantile(draws, 0.95)) * scale


@dataclass(frozen=True)
class CalibrationScore:
    """How well calibrated one part is before and after: ECE and mean negative log-likelihood (nats), and the ECE by chance alone."""

    temperature: float
    num_images: int
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    ece_by_chance: float
    ece_by_chance_95: float

    @property
    def is_reached(self) -> bool:
        """Whether the error after calibration is within the goal."""
        return self.ece_after <= GOAL

    def as_dict(self) -> dict[str, float | int | str | bool]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "goal": GOAL, "reached": self.is_reached}

    def line(self, split: str) -> str:
        """The figures in words, for a terminal."""
        reached = "" if self.is_reached else f"; the goal of {GOAL:.0%} is not reached"
        chance = f"a perfectly calibrated model shows {self.ece_by_chance:.4f} on {self.num_images} images, in 95 of 100 cases"
        return (
            f"{split} calibration: ece {self.ece_after:.4f}, before {self.ece_before:.4f} (temperature {self.temperature:.3f}){reached}; "
            f"{chance} below {self.ece_by_chance_95:.4f}"
        )


def calibration_score(table: PredictionTable) -> CalibrationScore:
    """Judge one part with its table's temperature and without."""
    before, after = Reliability.of(replace(table, temperature=1.0)), Reliability.of(table)
    chance = noise_floor(table.answers()[1])
    nll_before, nll_after = (_moments(table, sharpness)[0] for sharpness in (1.0, 1 / table.temperature))
    return CalibrationScore(
        table.temperature, len(table.targets), before.ece, after.ece, nll_before, nll_after, *chance
    )
