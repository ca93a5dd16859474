"""When to answer "I don't know": below a confidence, for images unlike those of the training; and the set of classes it may be.

All thresholds come from `Evidence`, what the val part told; it stays in the bundle, so that other ones can be chosen when answering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.evaluation.reliability.selective import RiskLevel, choose_level, lowest_risk, risk_levels
from image_classifier.predictions import PredictionTable
from image_classifier.sampling import evenly_spaced

_KEPT = 1000  # values that stand for all of val's


@dataclass(frozen=True)
class DecisionSettings:
    """The keys of `decision`; null leaves it to the bundle, and in training sets no limit.

    Raises:
        ConfigError: A share that is none.
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
            inside = (
                value is None or (max(low, 0) < value < high) or (value == 1 and end == "]") or (value == 0 and low < 0)
            )
            if not inside:
                raise ConfigError(f"invalid decision.{name} {value}", "expected a share between 0 and 1, such as 0.05")

    def or_else(self, other: DecisionSettings) -> DecisionSettings:
        """These settings, each that is null taken from the other."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return DecisionSettings(
            **{name: getattr(other, name) if value is None else value for name, value in own.items()}
        )


DEFAULTS = DecisionSettings(None, 0.95, 0.9, 0.01)


@dataclass(frozen=True)
class Evidence:
    """What val told: the risk at each threshold, and in rising order the probabilities of the true classes and the out-of-distribution scores.

    Of more than 1000 values, 1000 at equal steps of their rank are kept, the first and the last among them.
    """

    num_images: int
    levels: tuple[RiskLevel, ...]
    true_probabilities: tuple[float, ...]
    ood_scores: tuple[float, ...] = ()

    @classmethod
    def of(cls, table: PredictionTable) -> Evidence:
        """What one part tells."""
        truth = table.true_probabilities()
        scores = np.zeros(0) if table.ood_scores is None else table.ood_scores
        return cls(len(truth), risk_levels(table), _kept(truth), _kept(scores))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "levels": [[level.threshold, level.answered, level.wrong] for level in self.levels]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evidence:
        """What `as_dict` described."""
        levels = tuple(RiskLevel(*level) for level in content["levels"])
        return cls(content["num_images"], levels, tuple(content["true_probabilities"]), tuple(content["ood_scores"]))

    def set_level(self, coverage: float) -> float:
        """The probability from which a class is in the prediction set, 0 where all are: that which the share `coverage` of true classes reaches.

        Split-conformal (Sadinle et al., 2019: least ambiguous sets): exact on average for new images of the same kind.
        """
        rank = self.num_images + 1 - math.ceil((self.num_images + 1) * coverage - 1e-9)
        places = _places(self.num_images) + 1
        return self.true_probabilities[int(np.searchsorted(places, rank, side="right")) - 1] if rank >= 1 else 0.0

    def ood_limit(self, rate: float) -> float | None:
        """The score above which an image is refused, so that no more than the share `rate` of val is; None without scores or with a rate of 0."""
        if not self.ood_scores or rate == 0:
            return None
        rank = min(self.num_images, math.ceil((self.num_images + 1) * (1 - rate) - 1e-9))
        return self.ood_scores[int(np.searchsorted(_places(self.num_images) + 1, rank, side="left"))]


def _kept(values: np.ndarray) -> tuple[float, ...]:
    return tuple(
        np.sort(values)[_places(len(values))].tolist()
    )  # to the last bit: an image at its own limit is within it


def _places(count: int) -> np.ndarray:
    """Which of so many sorted values are kept, int64."""
    return evenly_spaced(count, _KEPT)


@dataclass(frozen=True)
class Decision:
    """The thresholds in use, how they were chosen and from what.

    `threshold`: the confidence below which the answer is abstain; `set_level`: the probability from which a class is in the prediction set;
    `ood_limit`: the out-of-distribution score above which the answer is abstain; `answered`: the share of val that the threshold answers.
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
        """The thresholds that keep what is asked for; where val cannot promise it there is none, and `note` says so."""
        settings = settings.or_else(DEFAULTS)
        set_level, limit = evidence.set_level(settings.coverage or 0), evidence.ood_limit(settings.ood_rate or 0)
        if settings.risk is None or settings.risk >= 1:
            return cls(settings, evidence, 0.0, set_level, limit, 1.0)
        confidence = settings.risk_confidence or 0
        level = choose_level(evidence.levels, settings.risk, confidence)
        if level is None:
            least = lowest_risk(evidence.levels, confidence)
            fact = f"{evidence.num_images} val images cannot promise a risk of {settings.risk:g} with {confidence:.0%} confidence"
            note = f"{fact}, the lowest they can is {least:g}: there is no threshold, no label is held back for it"
            return cls(settings, evidence, 0.0, set_level, limit, 1.0, note)
        return cls(settings, evidence, level.threshold, set_level, limit, level.answered / evidence.num_images)

    def again(self, asked: DecisionSettings) -> Decision:
        """The same evidence under other settings; null ones stay as they are."""
        return Decision.chosen(self.evidence, asked.or_else(self.settings))

    def reason(self, confidence: float, ood_score: float | None) -> str:
        """Why there is no label for an image; nothing where there is one."""
        if self.ood_limit is not None and ood_score is not None and not ood_score <= self.ood_limit:
            return f"unlike the training images: score {ood_score:.3f}, the limit is {self.ood_limit:.3f}"
        if confidence < self.threshold:
            return f"not sure enough: confidence {confidence:.3f}, the limit is {self.threshold:.3f}"
        return ""

    def prediction_set(self, probabilities: np.ndarray) -> list[int]:
        """The classes [C] that an image with these probabilities may be, the most probable first.

        None where the classes that are at all likely share the probability: a model that is more often right than the coverage asks for leaves
        its least sure answers out.
        """
        order = np.argsort(-probabilities, kind="stable")
        return [code for code in order.tolist() if probabilities[code] >= self.set_level]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `bundle.json`, ready for JSON."""
        asked = self.settings
        return {
            "risk": asked.risk,
            "risk_confidence": asked.risk_confidence,
            "answered": self.answered,
            "note": self.note,
            "conformal": {"coverage": asked.coverage, "quantile": 1 - self.set_level},
            "ood": {"rate": asked.ood_rate, "threshold": self.ood_limit},
            "evidence": self.evidence.as_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """What `as_dict` described, its thresholds chosen again; CheckpointError where it is none."""
        try:
            asked = (
                content["risk"],
                content["risk_confidence"],
                content["conformal"]["coverage"],
                content["ood"]["rate"],
            )
            return cls.chosen(Evidence.from_dict(content["evidence"]), DecisionSettings(*asked))
        except (KeyError, TypeError, ValueError, IndexError, ConfigError) as error:
            raise CheckpointError(
                f"the decision of the bundle is damaged ({type(error).__name__}: {error})", "export it again"
            ) from error
