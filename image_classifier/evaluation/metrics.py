"""Metrics of a prediction table: everything is counted over the whole part, then divided once."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from image_classifier.errors import DataError
from image_classifier.records import PredictionTable

_NUM_BINS = 15
_SCALARS = ("accuracy", "balanced_accuracy", "f1_macro", "precision_macro", "recall_macro", "log_loss", "ece")


@dataclass(frozen=True)
class ClassScore:
    """One class against all others, each score in 0..1; `support` counts its images. What cannot be divided is 0."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Metrics:
    """How good the predictions of one part are.

    `log_loss` is in nats; `confusion` counts images, int64 [C, C], rows truth, columns predicted; `absent` names the
    classes with no image in the part. Macro averages are over the classes seen or predicted, `balanced_accuracy` over
    the classes seen (both as in scikit-learn).
    """

    accuracy: float
    balanced_accuracy: float
    f1_macro: float
    precision_macro: float
    recall_macro: float
    log_loss: float
    ece: float
    num_images: int
    per_class: tuple[ClassScore, ...]
    confusion: np.ndarray
    absent: tuple[str, ...]

    def scalars(self) -> dict[str, float]:
        """The single numbers under their stable names."""
        return {name: getattr(self, name) for name in _SCALARS}

    def as_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        return {
            **self.scalars(),
            "num_images": self.num_images,
            "absent": list(self.absent),
            "per_class": [asdict(score) for score in self.per_class],
            "confusion": self.confusion.tolist(),
        }


def compute_metrics(table: PredictionTable) -> Metrics:
    """All metrics of one part; DataError where there is nothing to count or a logit is not a number."""
    _check(table)
    probabilities = table.probabilities
    predicted = probabilities.argmax(axis=1)
    confusion = _confusion(table.targets, predicted, len(table.classes))
    hits, support, named = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall, f1 = _ratio(hits, named), _ratio(hits, support), _ratio(2 * hits, support + named)
    met = (support + named) > 0
    scores = zip(table.classes, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return Metrics(
        accuracy=float(hits.sum() / support.sum()),
        balanced_accuracy=float(recall[support > 0].mean()),
        f1_macro=float(f1[met].mean()),
        precision_macro=float(precision[met].mean()),
        recall_macro=float(recall[met].mean()),
        log_loss=_log_loss(table),
        ece=_ece(probabilities.max(axis=1), predicted == table.targets),
        num_images=len(table.targets),
        per_class=tuple(ClassScore(*score) for score in scores),
        confusion=confusion,
        absent=tuple(label for label, count in zip(table.classes, support, strict=True) if count == 0),
    )


def _check(table: PredictionTable) -> None:
    if len(table.targets) == 0:
        raise DataError("there is no prediction to evaluate", "give a part that holds at least one image")
    bad = np.flatnonzero(~np.isfinite(table.logits).all(axis=1))
    if len(bad):
        fact = f"the logits of {len(bad)} of {len(table.targets)} images are not numbers, first {table.paths[bad[0]]!r}"
        raise DataError(fact, "the model has diverged; train again with a lower learning rate")


def _confusion(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Images per (truth, predicted) pair, int64 [C, C], of class indices [N] and [N]."""
    pairs = targets.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def _ratio(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Quotient of counts [C] and totals [C], 0 where the total is 0."""
    return np.asarray(counts / np.maximum(totals, 1))


def _log_loss(table: PredictionTable) -> float:
    """Mean negative log-likelihood in nats, from logits so that a probability that underflows still counts in full."""
    logits = table.logits.astype(np.float64) / table.temperature
    top = logits.max(axis=1)
    log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float((log_total - logits[np.arange(len(logits)), table.targets]).mean())


def _ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error over 15 equal-width bins, each open on the left (Guo et al., 2017); inputs [N]."""
    edges = np.linspace(0.0, 1.0, _NUM_BINS + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, _NUM_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=_NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
