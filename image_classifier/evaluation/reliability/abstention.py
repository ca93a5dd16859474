"""When a model abstains: below a confidence, or for images unlike the training images; and prediction sets.

All thresholds are chosen from `Evidence`, statistics of the val split. The bundle keeps the evidence, so that other
thresholds can be chosen at inference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.evaluation.reliability.selective_prediction import (
    RiskLevel,
    choose_level,
    lowest_risk,
    risk_levels,
)
from image_classifier.predictions import PredictionTable
from image_classifier.sampling import evenly_spaced

_MAX_KEPT = 1000  # values of the val split that the bundle keeps


@dataclass(frozen=True)
class DecisionSettings:
    """The keys of `decision`; null means the bundle's value, or in training no limit.

    Raises:
        ConfigError: A value is not a share in its range.
    """

    risk: float | None = None
    risk_confidence: float | None = None
    coverage: float | None = None
    ood_rate: float | None = None

    def __post_init__(self) -> None:
        bounds = {
            "risk": (0, 1, "]"),
            "risk_confidence": (0, 1, ")"),
            "coverage": (0, 1, ")"),
            "ood_rate": (-1, 1, ")"),
        }
        for name, (low, high, end) in bounds.items():
            value = getattr(self, name)
            at_end = (value == 1 and end == "]") or (value == 0 and low < 0)
            if value is not None and not (max(low, 0) < value < high) and not at_end:
                raise ConfigError(f"invalid decision.{name} {value}", "expected a share between 0 and 1, such as 0.05")

    def or_else(self, other: DecisionSettings) -> DecisionSettings:
        """Return these settings, with null values taken from `other`.

        >>> DecisionSettings(risk=0.05).or_else(DecisionSettings(risk=0.1, coverage=0.9))
        DecisionSettings(risk=0.05, risk_confidence=None, coverage=0.9, ood_rate=None)
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return DecisionSettings(
            **{name: getattr(other, name) if value is None else value for name, value in values.items()}
        )


DEFAULTS = DecisionSettings(None, 0.95, 0.9, 0.01)


@dataclass(frozen=True)
class Evidence:
    """Statistics of the val split: risk by threshold, true-class probabilities and out-of-distribution scores.

    The last two are in rising order. Of more than 1000 values, 1000 with evenly spaced ranks are kept, the first and
    the last among them.
    """

    num_images: int
    levels: tuple[RiskLevel, ...]
    true_probabilities: tuple[float, ...]
    ood_scores: tuple[float, ...] = ()

    @classmethod
    def of(cls, table: PredictionTable) -> Evidence:
        """Collect the evidence of one split."""
        truth = table.true_probabilities()
        scores = np.zeros(0) if table.ood_scores is None else table.ood_scores
        return cls(len(truth), risk_levels(table), _kept(truth), _kept(scores))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "levels": [[level.threshold, level.answered, level.wrong] for level in self.levels]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evidence:
        """Return the evidence that `as_dict` wrote."""
        levels = tuple(RiskLevel(*level) for level in content["levels"])
        return cls(content["num_images"], levels, tuple(content["true_probabilities"]), tuple(content["ood_scores"]))

    def set_level(self, coverage: float) -> float:
        """Return the smallest probability of a class in a prediction set; 0 for all classes.

        The share `coverage` of true classes reaches it. This is split-conformal prediction with least ambiguous sets
        (Sadinle et al., 2019), exact on average for new images of the same kind.
        """
        # Rank of the threshold among the true-class probabilities, from 1, smallest first.
        rank = self.num_images + 1 - math.ceil((self.num_images + 1) * coverage - 1e-9)
        if rank < 1:
            return 0.0
        # The kept value at this rank or the next lower one, which keeps the coverage.
        kept_ranks = _kept_rows(self.num_images) + 1
        return self.true_probabilities[int(np.searchsorted(kept_ranks, rank, side="right")) - 1]

    def ood_limit(self, rate: float) -> float | None:
        """Return the score above which an image is refused, so that at most the share `rate` of val is refused.

        None without scores, or with a rate of 0.
        """
        if not self.ood_scores or rate == 0:
            return None
        rank = min(self.num_images, math.ceil((self.num_images + 1) * (1 - rate) - 1e-9))
        return self.ood_scores[int(np.searchsorted(_kept_rows(self.num_images) + 1, rank, side="left"))]


def _kept(values: np.ndarray) -> tuple[float, ...]:
    # Not rounded: an image exactly at the limit must be within it.
    return tuple(np.sort(values)[_kept_rows(len(values))].tolist())


def _kept_rows(count: int) -> np.ndarray:
    """Return the rows of the sorted values that are kept, int64."""
    return evenly_spaced(count, _MAX_KEPT)


@dataclass(frozen=True)
class Decision:
    """The thresholds in use, and the settings and evidence they were chosen from.

    Args:
        settings: What the user wants.
        evidence: Statistics of the val split.
        threshold: Confidence below which the model abstains.
        set_level: Smallest probability of a class in the prediction set.
        ood_limit: Out-of-distribution score above which the model abstains; None for no limit.
        answered: Share of the val images that get a label with this threshold.
        note: Why there is no threshold, if the wanted risk cannot be kept.
    """

    settings: DecisionSettings
    evidence: Evidence
    threshold: float
    set_level: float
    ood_limit: float | None
    answered: float
    note: str = ""

    @classmethod
    def chosen(cls, evidence: Evidence, settings: DecisionSettings) -> Decision:
        """Choose the thresholds; if val cannot promise the risk, there is no threshold and `note` says why."""
        settings = settings.or_else(DEFAULTS)
        set_level = evidence.set_level(settings.coverage or 0)
        limit = evidence.ood_limit(settings.ood_rate or 0)
        if settings.risk is None or settings.risk >= 1:
            return cls(settings, evidence, 0.0, set_level, limit, 1.0)
        confidence = settings.risk_confidence or 0
        level = choose_level(evidence.levels, settings.risk, confidence)
        if level is None:
            promise = f"a risk of {settings.risk:g} with {confidence:.0%} confidence"
            lowest = f"the lowest possible risk is {lowest_risk(evidence.levels, confidence):g}"
            note = f"{evidence.num_images} val images cannot promise {promise}; {lowest}, so no confidence limit is set"
            return cls(settings, evidence, 0.0, set_level, limit, 1.0, note)
        return cls(settings, evidence, level.threshold, set_level, limit, level.answered / evidence.num_images)

    def again(self, settings: DecisionSettings) -> Decision:
        """Choose thresholds from the same evidence with other settings; null values stay as they are."""
        return Decision.chosen(self.evidence, settings.or_else(self.settings))

    def reason(self, confidence: float, ood_score: float | None) -> str:
        """Return why the model abstains on an image; an empty text if it gives a label."""
        if self.ood_limit is not None and ood_score is not None and not ood_score <= self.ood_limit:
            return f"unlike the training images: score {ood_score:.3f}, the limit is {self.ood_limit:.3f}"
        if confidence < self.threshold:
            return f"not sure enough: confidence {confidence:.3f}, the limit is {self.threshold:.3f}"
        return ""

    def prediction_set(self, probabilities: np.ndarray) -> list[int]:
        """Return the classes that an image with these probabilities [C] may be, most probable first.

        The set is empty if several classes share the probability: a model that is right more often than the coverage
        requires gives its least certain images no class.
        """
        order = np.argsort(-probabilities, kind="stable")
        return [code for code in order.tolist() if probabilities[code] >= self.set_level]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for bundle.json."""
        settings = self.settings
        return {
            "risk": settings.risk,
            "risk_confidence": settings.risk_confidence,
            "answered": self.answered,
            "note": self.note,
            "conformal": {"coverage": settings.coverage, "quantile": 1 - self.set_level},
            "ood": {"rate": settings.ood_rate, "threshold": self.ood_limit},
            "evidence": self.evidence.as_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """Return the decision that `as_dict` wrote, with its thresholds chosen again.

        Raises:
            CheckpointError: The content is damaged.
        """
        try:
            settings = DecisionSettings(
                content["risk"],
                content["risk_confidence"],
                content["conformal"]["coverage"],
                content["ood"]["rate"],
            )
            return cls.chosen(Evidence.from_dict(content["evidence"]), settings)
        except (KeyError, TypeError, ValueError, IndexError, ConfigError) as error:
            fact = f"the decision of the bundle is damaged ({type(error).__name__}: {error})"
            raise CheckpointError(fact, "export it again") from error
