"""The recent answers of each model, compared with the validation split. No image, file name or client is kept."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from image_classifier.errors import ConfigError
from image_classifier.evaluation.drift import DriftReference, Shift
from image_classifier.serving.async_log import AsyncLineWriter
from image_classifier.serving.drift_log import Row, columns


@dataclass(frozen=True)
class DriftSettings:
    """The keys of `drift`.

    Args:
        enabled: Whether answers are compared with those for the validation split.
        window: Number of recent answers that are compared.
        log_dir: Folder of NAME.jsonl, a line for each answer, which the verb `drift` reads; null writes no log.
        max_log_bytes: A longer log is renamed to NAME.jsonl.1, which replaces the previous one.
    """

    enabled: bool = False
    window: int = 2000
    log_dir: str | None = "runs/serve"
    max_log_bytes: int = 100 * 2**20

    def __post_init__(self) -> None:
        if self.window < 1 or self.max_log_bytes < 1:
            raise ConfigError("drift.window and drift.max_log_bytes must be at least 1")


class DriftWindow:
    """The recent answers of the current version of each model."""

    def __init__(self, settings: DriftSettings) -> None:
        self._settings = settings
        self._recent: dict[str, deque[Row]] = {}
        self._references: dict[str, tuple[str, DriftReference | None]] = {}
        self._writers: dict[str, AsyncLineWriter] = {}

    def close(self) -> None:
        """Write the lines that wait."""
        for writer in self._writers.values():
            writer.close()

    def record(self, metadata: Mapping[str, Any], answer: Mapping[str, Any], ood_score: float | None) -> None:
        """Add the answer for one image."""
        if not self._settings.enabled or "error" in answer:
            return
        name = metadata["name"]
        version = metadata["version"]
        # A new version starts with an empty window: its answers follow another distribution.
        if self._references.get(name, ("", None))[0] != version:
            self._references[name] = version, DriftReference.of(metadata["reference"])
            self._recent[name] = deque(maxlen=self._settings.window)
        self._recent[name].append((answer["confidence"], ood_score))
        if self._settings.log_dir is not None:
            self._append_log(Path(self._settings.log_dir, f"{name}.jsonl"), version, answer, ood_score)

    def shifts(self, name: str) -> list[Shift]:
        """Return the shift of each figure of a model; an empty list where it has no reference or no answers."""
        _, reference = self._references.get(name, ("", None))
        return [] if reference is None else reference.shifts(columns(self._recent[name]))

    def _append_log(self, path: Path, version: str, answer: Mapping[str, Any], ood_score: float | None) -> None:
        line = {
            "time": round(time.time(), 3),
            "version": version,
            "label": answer["predicted_class"],
            "decision": answer["decision"],
            "confidence": round(answer["confidence"], 6),
            "ood_score": None if ood_score is None else round(ood_score, 4),
        }
        if path.name not in self._writers:
            self._writers[path.name] = AsyncLineWriter(f"drift: {path}", partial(self._write, path))
        self._writers[path.name].put(json.dumps(line, ensure_ascii=False))

    def _write(self, path: Path, line: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            size = file.tell()
        if size > self._settings.max_log_bytes:
            os.replace(path, path.with_name(f"{path.name}.1"))
