"""The model that a worker process holds: its predictor, its metadata and the image with a known answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.cpu import usable_cores
from image_classifier.inference.backends import BACKENDS
from image_classifier.inference.golden import Golden
from image_classifier.inference.load import load_predictor
from image_classifier.inference.predictor import Predictor
from image_classifier.predictions import softmax
from image_classifier.serving.worker.spec import ModelSpec, version_of

_TOLERANCE = 1e-4  # of probabilities, for a backend that names none


@dataclass(frozen=True)
class LoadedModel:
    """A predictor and what is known about its model."""

    spec: ModelSpec
    predictor: Predictor
    version: str
    bundle: Bundle | None = None
    golden: Golden | None = None

    @classmethod
    def load(cls, spec: ModelSpec) -> LoadedModel:
        """Load the model of a spec; raises what `load_predictor` raises."""
        path = Path(spec.path)
        version = version_of(path)
        predictor = load_predictor(
            path,
            spec.backend,
            1,
            spec.trusted,
            spec.limits,
            spec.decision,
            spec.server,
            min(spec.batch.at_once, usable_cores()),
        )
        bundle = read_bundle(path) if path.is_dir() else None
        golden = Golden.of(bundle) if bundle is not None and (path / "golden.npz").is_file() else None
        return cls(spec, replace(predictor, threshold=spec.threshold), version, bundle, golden)

    @property
    def image_size(self) -> int:
        """Width and height of the model's input in pixels."""
        return self.predictor.preprocess.size

    def golden_pixels(self) -> np.ndarray:
        """Return one image uint8 [1, 3, S, S] whose answer is known, or a grey one."""
        if self.golden is not None:
            return self.golden.pixels[:1]
        return np.full((1, 3, self.image_size, self.image_size), 128, np.uint8)

    def check_golden(self, logits: np.ndarray) -> str:
        """Return what is wrong with these logits [1, C] for `golden_pixels`, or "" where nothing is."""
        if logits.shape != (1, len(self.predictor.classes)):
            return f"the logits for the golden image have the wrong shape {list(logits.shape)}"
        if not np.isfinite(logits).all():
            return "the logits for the golden image are not finite"
        if self.golden is None:
            return ""
        actual, expected = (softmax(values, self.predictor.temperature) for values in (logits, self.golden.logits[:1]))
        difference = float(np.abs(actual - expected).max())
        if difference <= self._tolerance():
            return ""
        return f"the answer for the golden image differs from the one in the bundle (by {difference:.2g})"

    def _tolerance(self) -> float:
        """Return the largest allowed difference of a probability: that of the export, else that of the backend."""
        name = self.predictor.backend_name
        default = BACKENDS[name].tolerance if name in BACKENDS else _TOLERANCE
        exports = {} if self.bundle is None else self.bundle.info.exports
        return float(exports.get(name, {}).get("tolerance", default))

    def metadata(self) -> dict[str, Any]:
        """Return the model card and what the server must know to send requests."""
        decision = self.predictor.decision
        limits = self.spec.limits
        info = None if self.bundle is None else self.bundle.info
        card: dict[str, Any] = {
            "name": self.spec.name,
            "version": self.version,
            "backend": self.predictor.backend_name,
            "classes": list(self.predictor.classes),
            "image_size": self.image_size,
            "temperature": self.predictor.temperature,
            "threshold": self.predictor.threshold,
            "decision": None,
            "embeddings": hasattr(self.predictor.backend, "logits_and_embeddings"),
            "limits": {
                "max_bytes": limits.max_bytes,
                "max_pixels": limits.max_pixels,
                "formats": list(limits.formats),
            },
            "reference": {},
        }
        if decision is not None:
            card["decision"] = {key: getattr(decision, key) for key in ("threshold", "ood_limit", "set_level", "note")}
        if info is not None:
            card |= {
                "reference": info.decision,
                "metrics": info.metrics,
                "intervals": info.intervals,
                "provenance": info.provenance,
            }
        return card
