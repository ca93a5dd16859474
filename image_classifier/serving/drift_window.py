"""What the drift check keeps of each answer: confidence, distance from the training's embeddings, class. No image, no name, no client."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from image_classifier.errors import ConfigError
from image_classifier.evaluation.drift import DriftReference
from image_classifier.serving.async_log import AsyncLineWriter


@dataclass(frozen=True)
class DriftSettings:
    """The keys of `drift`.

    Args:
        enabled: Whether answers are compared with those that val got.
        window: How many of the last answers are.
        log_dir: Where they are kept for the verb `drift`, a line each in NAME.jsonl; null: nowhere.
        max_log_bytes: A longer file becomes NAME.jsonl.1, in place of the one before.
    """

    enabled: bool = False
    window: int = 2000
    log_dir: str | None = "runs/serve"
    max_log_bytes: int = 100 * 2**20

    def __post_init__(self) -> None:
        if self.window < 1 or self.max_log_bytes < 1:
            raise ConfigError("drift.window and drift.max_log_bytes must be at least 1")


class DriftWindow:
    """The last answers of each model's version, compared with val when they are asked for."""

    def __init__(self, asked: DriftSettings) -> None:
        self.asked = asked
        self._last: dict[str, deque[tuple[float, float | None]]] = {}
        self._references: dict[str, tuple[str, DriftReference | None]] = {}
        self._lines: dict[str, AsyncLineWriter] = {}

    def close(self) -> None:
        """Write what waits."""
        for lines in self._lines.values():
            lines.close()

    def seen(self, facts: Mapping[str, Any], answer: Mapping[str, Any], ood_score: float | None) -> None:
        """One image has its answer."""
        if not self.asked.enabled or "error" in answer:
            return
        name, version = facts["name"], facts["version"]
        if self._references.get(name, ("", None))[0] != version:  # another model: its answers are another traffic
            self._references[name] = version, DriftReference.of(facts["reference"])
            self._last[name] = deque(maxlen=self.asked.window)
        self._last[name].append((answer["confidence"], ood_score))
        if self.asked.log_dir is not None:
            self._keep(Path(self.asked.log_dir, f"{name}.jsonl"), version, answer, ood_score)

    def figures(self, name: str) -> Iterator[tuple[str, float, float, int]]:
        """For each figure of a model its distance from val, the limit, and of how many images."""
        _, reference = self._references.get(name, ("", None))
        if reference is None:
            return
        for shift in reference.shifts(columns(self._last[name])):
            yield shift.figure, shift.distance, shift.limit, shift.images

    def _keep(self, path: Path, version: str, answer: Mapping[str, Any], ood_score: float | None) -> None:
        line = {
            "time": round(time.time(), 3),
            "version": version,
            "label": answer["predicted_class"],
            "decision": answer["decision"],
        }
        line |= {
            "confidence": round(answer["confidence"], 6),
            "ood_score": None if ood_score is None else round(ood_score, 4),
        }
        if path.name not in self._lines:
            self._lines[path.name] = AsyncLineWriter(f"drift: {path}", partial(self._write, path))
        self._lines[path.name].put(json.dumps(line, ensure_ascii=False))

    def _write(self, path: Path, line: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            size = file.tell()
        if size > self.asked.max_log_bytes:
            os.replace(path, path.with_name(f"{path.name}.1"))


def columns(rows: deque[tuple[float, float | None]]) -> dict[str, list[float]]:
    """The figures of answers, each a list; scores only where all have one."""
    found = {"confidence": [confidence for confidence, _ in rows]}
    scores = [score for _, score in rows if score is not None]
    return {**found, "ood_score": scores} if len(scores) == len(rows) else found
