"""Calibration by one temperature, so that 80 % of the predictions with 80 % confidence are right (Guo et al., 2017)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from image_classifier.errors import DataError
from image_classifier.predictions import PredictionTable

NUM_BINS = 15
_EDGES = np.linspace(0.0, 1.0, NUM_BINS + 1)
GOAL = 0.02  # limit for the expected calibration error on the test split
_MIN_TEMPERATURE = 0.05
_MAX_TEMPERATURE = 20.0
_BLOCK_NUMBERS = 2**21  # logits at a time, 16 MiB
_TOLERANCE = 1e-6
_MAX_STEPS = 60
_ROUNDING = 1e-12  # nats per image that are within rounding errors
_NUM_DRAWS = 200
_MAX_SIMULATED = 20_000


@dataclass(frozen=True)
class TemperatureFit:
    """The most likely temperature of one split, the mean negative log-likelihood (nats) before and after, a note."""

    temperature: float
    nll_before: float
    nll_after: float
    num_images: int
    note: str = ""


def fit_temperature(table: PredictionTable) -> TemperatureFit:
    """Fit the temperature between 0.05 and 20; if the split does not determine it, `note` says why.

    Raises:
        DataError: The split is empty, or a logit is not a finite number.
    """
    if not len(table.targets):
        raise DataError("no image to fit the temperature to", "give a val split")
    if not np.isfinite(table.logits).all():
        raise DataError(
            "the logits are not finite numbers", "the model has diverged; train again with a lower learning rate"
        )
    if (table.logits.argmax(axis=1) == table.targets).all():
        nll = _moments(table, 1.0)[0]
        note = "all val images are classified correctly, so the temperature is not determined and stays 1"
        return TemperatureFit(1.0, nll, nll, len(table.targets), note)
    temperature = 1 / _sharpness(table)
    note = ""
    # At a bound, the likelihood would still grow beyond it.
    for bound in (_MIN_TEMPERATURE, _MAX_TEMPERATURE):
        if math.isclose(temperature, bound, rel_tol=1e-3):
            temperature = bound
            note = f"the best temperature is beyond the limit of {bound:g}: do not trust the probabilities"
    before, after = (_moments(table, sharpness)[0] for sharpness in (1.0, 1 / temperature))
    if before - after <= _ROUNDING:
        temperature = 1.0
        after = before
        note = "no temperature improves the likelihood of val, so it stays 1"
    return TemperatureFit(temperature, before, after, len(table.targets), note)


def _sharpness(table: PredictionTable) -> float:
    """Return 1 / temperature: the likelihood has one maximum in it, found by Newton's method within a bracket."""
    low = 1 / _MAX_TEMPERATURE
    high = 1 / _MIN_TEMPERATURE
    sharpness = 1.0
    for _ in range(_MAX_STEPS):
        _, slope, bend = _moments(table, sharpness)
        # Shrink the bracket by the sign of the slope.
        low, high = (low, sharpness) if slope > 0 else (sharpness, high)
        # Newton's step; bisect (by the geometric mean) if it leaves the bracket.
        following = sharpness - slope / bend if bend > 0 else math.inf
        if not low <= following <= high:
            following = math.sqrt(low * high)
        if abs(following - sharpness) <= _TOLERANCE * sharpness:
            return following
        sharpness = following
    return sharpness


def _moments(table: PredictionTable, sharpness: float) -> tuple[float, float, float]:
    """Return the mean negative log-likelihood of softmax(sharpness * logits), and its first and second derivative."""
    totals = np.zeros(3)
    step = max(1, _BLOCK_NUMBERS // len(table.classes))
    for start in range(0, len(table.targets), step):
        logits = table.logits[start : start + step].astype(np.float64)
        # Subtract the largest logit, so that nothing overflows.
        logits -= logits.max(axis=1, keepdims=True)
        truth = logits[np.arange(len(logits)), table.targets[start : start + step]]
        weights = np.exp(sharpness * logits)
        total = weights.sum(axis=1)
        # Mean and mean square of the logits under the softmax.
        mean = np.einsum("nc,nc->n", weights, logits) / total
        square = np.einsum("nc,nc,nc->n", weights, logits, logits) / total
        totals += (np.log(total) - sharpness * truth).sum(), (mean - truth).sum(), np.maximum(square - mean**2, 0).sum()
    nll, slope, bend = (totals / len(table.targets)).tolist()
    return nll, slope, bend


@dataclass(frozen=True)
class Reliability:
    """Images in 15 confidence bins of equal width, each open on the left: number, mean confidence, accuracy."""

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, table: PredictionTable) -> Reliability:
        """Return the bins of one split."""
        predicted, confidence = table.answers()
        return cls.counted(confidence, predicted == table.targets)

    @classmethod
    def counted(cls, confidence: np.ndarray, correct: np.ndarray) -> Reliability:
        """Return the bins of confidences, float64 [N], and correct predictions, bool [N]."""
        bins = bins_of(confidence)
        counts, sums, hits = (
            np.bincount(bins, weights=weights, minlength=NUM_BINS) for weights in (None, confidence, correct)
        )
        return cls(_EDGES, counts, sums / np.maximum(counts, 1), hits / np.maximum(counts, 1))

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap of accuracy and confidence, weighted by the images of each bin."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(1, self.counts.sum()))

    def as_dict(self) -> dict[str, list[float]]:
        """Return plain values for JSON."""
        columns = {"edges": self.edges, "counts": self.counts, "confidence": self.confidence, "accuracy": self.accuracy}
        return {name: column.tolist() for name, column in columns.items()}


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """Return the bin of each confidence, int64 [N]: 15 of equal width, open on the left (Guo et al., 2017).

    >>> bins_of(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 7, 14]
    """
    return np.asarray(np.clip(np.searchsorted(_EDGES, confidence, side="left") - 1, 0, NUM_BINS - 1))


def noise_floor(confidence: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the ECE that a perfectly calibrated model shows by chance, mean and 95th percentile, by simulation.

    Its confidences are float64 [N]. Above 20 000 images, 20 000 of them are simulated and the result is scaled to N:
    the ECE falls with the square root of N.
    """
    generator = np.random.default_rng(seed)
    chosen = confidence
    if len(confidence) > _MAX_SIMULATED:
        chosen = generator.choice(confidence, _MAX_SIMULATED, replace=False)
    bins = bins_of(chosen)
    # Each prediction is right with the probability of its confidence.
    gaps = ((generator.random(len(chosen)) < chosen) - chosen for _ in range(_NUM_DRAWS))
    draws = [np.abs(np.bincount(bins, weights=gap)).sum() / len(chosen) for gap in gaps]
    scale = math.sqrt(len(chosen) / len(confidence))
    return float(np.mean(draws)) * scale, float(np.quantile(draws, 0.95)) * scale


@dataclass(frozen=True)
class CalibrationScore:
    """The calibration of one split before and after: ECE, mean negative log-likelihood (nats), ECE by chance."""

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
        """Return plain values for JSON."""
        return {**asdict(self), "goal": GOAL, "reached": self.is_reached}

    def line(self, split: str) -> str:
        """Return the result in words, for a terminal."""
        reached = "" if self.is_reached else f", above the goal of {GOAL:g}"
        chance = f"by chance alone {self.ece_by_chance:.4f} on {self.num_images} images"
        return (
            f"{split} calibration: ece {self.ece_after:.4f}, before {self.ece_before:.4f} "
            f"(temperature {self.temperature:.3f}){reached}; {chance} (95 % below {self.ece_by_chance_95:.4f})"
        )


def calibration_score(table: PredictionTable) -> CalibrationScore:
    """Return the calibration of one split with its table's temperature and without."""
    before = Reliability.of(replace(table, temperature=1.0))
    after = Reliability.of(table)
    chance = noise_floor(table.answers()[1])
    nll_before, nll_after = (_moments(table, sharpness)[0] for sharpness in (1.0, 1 / table.temperature))
    return CalibrationScore(
        table.temperature, len(table.targets), before.ece, after.ece, nll_before, nll_after, *chance
    )
