"""The answers of a model: `Prediction` for one image, `PredictionTable` for a split; CSV, never half-written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import atomic_file, write_text
from image_classifier.errors import DataError
from image_classifier.manifest import ENCODING, csv_writer
from image_classifier.program import program

_COLUMNS = ("path", "label", "predicted_class", "confidence")
_BLOCK = 4096  # rows of a table written at a time
_BLOCK_VALUES = 2**17  # 1 MB of float64, which stays in a core's cache


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image: probabilities of all classes, or an `error`.

    `reason` is why the model abstains ("" where it does not). `prediction_set` holds the classes that the image may
    show, None where that is not known.
    """

    path: str
    label: str = ""
    confidence: float = 0.0
    probabilities: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    reason: str = ""
    prediction_set: tuple[str, ...] | None = None

    @property
    def decision(self) -> str:
        """`label` or `abstain`."""
        return "abstain" if self.reason else "label"

    def answer(self, top_k: int | None = None) -> dict[str, object]:
        """Return the JSON object that the command line and the servers give, the most probable class first."""
        if self.error:
            return {"path": self.path, "error": self.error}
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])[:top_k]
        answer = {
            "path": self.path,
            "predicted_class": self.label,
            "confidence": self.confidence,
            "all_predictions": dict(ranked),
        }
        prediction_set = None if self.prediction_set is None else list(self.prediction_set)
        return {**answer, "decision": self.decision, "reason": self.reason, "prediction_set": prediction_set}


@dataclass(frozen=True)
class PredictionTable:
    """The answers for one split: paths, true labels, raw `logits` float32 [N, C], and the calibrated `temperature`.

    `ood_scores` float32 [N] are high for images unlike the training images; None where they are not known.
    """

    paths: tuple[str, ...]
    targets: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]
    temperature: float = 1.0
    ood_scores: np.ndarray | None = None

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The softmax of logits / temperature, float64 [N, C]."""
        return softmax(self.logits, self.temperature)

    def block(self, rows: slice, columns: slice = slice(None)) -> np.ndarray:
        """Return logits / temperature for a block of rows and classes, float64: a copy of this block only."""
        return np.array(self.logits[rows, columns], dtype=np.float64) / self.temperature

    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each image's top class, int64 [N] (the first of equals), and its probability, float64 [N]."""
        predicted = np.zeros(len(self.targets), dtype=np.int64)
        confidence = np.zeros(len(self.targets))
        for rows, probabilities in self.blocks():
            predicted[rows] = probabilities.argmax(axis=1)
            confidence[rows] = probabilities.max(axis=1)
        return predicted, confidence

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield some rows at a time with their probabilities, float64 [n, C], so that no large table is copied."""
        step = max(1, _BLOCK_VALUES // len(self.classes))
        for start in range(0, len(self.targets), step):
            rows = slice(start, min(start + step, len(self.targets)))
            yield rows, softmax(self.block(rows))

    def true_probabilities(self) -> np.ndarray:
        """Return the probability of each image's true class, float64 [N]."""
        columns = [block[np.arange(len(block)), self.targets[rows]] for rows, block in self.blocks()]
        return np.concatenate(columns) if columns else np.zeros(0)

    def surest_mistakes(self, limit: int) -> np.ndarray:
        """Return the rows, int64, of at most `limit` wrong answers, the most confident first."""
        predicted, confidence = self.answers()
        wrong = np.flatnonzero(predicted != self.targets)
        return wrong[np.argsort(-confidence[wrong], kind="stable")][:limit]

    def write(self, directory: Path) -> None:
        """Write `predictions.csv` (a row per image), `logits.npy` and `predictions.json` (classes, temperature)."""
        with atomic_file(directory / "predictions.csv") as file:
            for text in self._csv():
                file.write(text.encode(*ENCODING))
        with atomic_file(directory / "logits.npy") as file:
            np.save(file, self.logits.astype(np.float32, copy=False))
        facts = {"classes": self.classes, "temperature": self.temperature}
        write_text(directory / "predictions.json", json.dumps(facts, indent=2) + "\n")

    def _csv(self) -> Iterator[str]:
        text = io.StringIO()
        write_row = csv_writer(text)
        scores = self.ood_scores
        write_row((*_COLUMNS, *(() if scores is None else ("ood_score",))))
        rows = zip(self.paths, self.targets.tolist(), *(column.tolist() for column in self.answers()), strict=True)
        for number, (path, target, predicted, confidence) in enumerate(rows, start=1):
            score = () if scores is None else (f"{scores[number - 1]:.9g}",)
            write_row((path, self.classes[target], self.classes[predicted], f"{confidence:.6f}", *score))
            if number % _BLOCK == 0:
                yield text.getvalue()
                text.seek(0)
                text.truncate()
        yield text.getvalue()

    @classmethod
    def read(cls, directory: Path) -> PredictionTable:
        """Read what `write` wrote; raise DataError where a file is missing or they disagree."""
        try:
            facts = json.loads((directory / "predictions.json").read_text(encoding="utf-8"))
            logits: np.ndarray = np.load(directory / "logits.npy", allow_pickle=False)
            with (directory / "predictions.csv").open(encoding=ENCODING[0], errors=ENCODING[1], newline="") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
            scores = (
                np.array([row["ood_score"] for row in rows], np.float32)
                if "ood_score" in (reader.fieldnames or ())
                else None
            )
            codes = {label: code for code, label in enumerate(facts["classes"])}
            targets, named = (
                np.array([codes[row[column]] for row in rows], dtype=np.int64)
                for column in ("label", "predicted_class")
            )
            table = cls(
                tuple(row["path"] for row in rows), targets, logits, tuple(codes), float(facts["temperature"]), scores
            )
            if logits.shape != (len(rows), len(codes)):
                raise ValueError(f"{len(rows)} rows of {len(codes)} classes, logits of the shape {list(logits.shape)}")
            if (table.answers()[0] != named).any():
                raise ValueError("the answers in logits.npy and predictions.csv differ")
            return table
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            files = "predictions.csv, logits.npy or predictions.json"
            fact = f"{files} of {str(directory)!r} is missing or damaged ({reason})"
            raise DataError(fact, f"write them again with `{program()} test`") from error


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities of logits [N, C] divided by a temperature, float64 [N, C].

    >>> softmax(np.array([[0.0, 0.0], [0.0, 100.0]])).round(2).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponents = np.exp(shifted / temperature if temperature != 1 else shifted)
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
