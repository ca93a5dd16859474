"""Scores that need only three counts a class, of one part or of many resamples of it at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counts:
    """Images of each class that are predicted right (`hits`), that show it (`support`) and that are predicted to (`named`), float64 [..., C]."""

    hits: np.ndarray
    support: np.ndarray
    named: np.ndarray

    @property
    def precision(self) -> np.ndarray:
        """Share of right ones among the images named so, [..., C]; NaN where there is none."""
        return _ratio(self.hits, self.named)

    @property
    def recall(self) -> np.ndarray:
        """Share of right ones among the images of the class, [..., C]; NaN where there is none."""
        return _ratio(self.hits, self.support)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, [..., C]; NaN where the class is neither seen nor named."""
        return _ratio(2 * self.hits, self.support + self.named)

    def scalars(self) -> dict[str, np.ndarray]:
        """The averages over classes under their stable names, each [...], as scikit-learn's with zero_division=0.

        Macro averages are over the classes seen or named, `balanced_accuracy` over those seen, weighted ones by images seen. `kappa` is NaN
        where chance alone agrees on everything: one class seen, and the same one named.
        """
        each = {name: np.nan_to_num(getattr(self, name)) for name in ("precision", "recall", "f1")}
        seen, met, total = self.support > 0, self.support + self.named > 0, self.support.sum(axis=-1)
        accuracy = self.hits.sum(axis=-1) / total
        chance = (self.support * self.named).sum(axis=-1) / total**2
        return {
            "accuracy": accuracy,
            "balanced_accuracy": _mean(each["recall"], seen),
            **{f"{name}_macro": _mean(values, met) for name, values in each.items()},
            **{f"{name}_weighted": _mean(values, self.support) for name, values in each.items()},
            "kappa": _ratio(accuracy - chance, 1 - chance),
        }


def _ratio(parts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the total is 0."""
    return np.asarray(np.divide(parts, totals, out=np.full(np.shape(totals), np.nan), where=np.asarray(totals > 0)))


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over classes [...], by weights [..., C] that are not all 0."""
    return np.asarray((values * weights).sum(axis=-1) / weights.sum(axis=-1))
