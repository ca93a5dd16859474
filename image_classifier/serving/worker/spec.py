"""What a model process is told to load, and the model that it then holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.bundle import INFO_NAME, Bundle, read_bundle, sha256_of
from image_classifier.cpu import usable_cores
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import BACKENDS, ServerAddress
from image_classifier.inference.golden import Golden
from image_classifier.inference.load import load_predictor
from image_classifier.inference.predictor import Predictor
from image_classifier.predictions import softmax
from image_classifier.serving.worker.batching import BatchSettings

_TOLERANCE = 1e-4
_DIGITS = 12  # of a version


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint to load and how; goes over the wire as plain values."""

    name: str
    path: str
    backend: str | None = None
    server: ServerAddress = field(default_factory=ServerAddress)
    threshold: float = 0.0
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    batch: BatchSettings = field(default_factory=BatchSettings)
    trusted: tuple[str, ...] = ()
    decode_s: float = 30.0
    hang_s: float = 60.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ModelSpec:
        """What `as_dict` described."""
        kinds = {
            "server": ServerAddress,
            "decision": DecisionSettings,
            "limits": DecodeLimits,
            "batch": BatchSettings,
            "trusted": tuple,
        }
        return cls(**{key: _made(kinds[key], value) if key in kinds else value for key, value in plain.items()})


def _made(kind: type, value: Any) -> Any:
    return kind(**value) if isinstance(value, Mapping) else kind(value)


def version_of(path: Path) -> str:
    """The first digits of what bundle.json, which names the hash of every file, or a lone file hashes to."""
    return sha256_of(path / INFO_NAME if path.is_dir() else path)[:_DIGITS]


@dataclass(frozen=True)
class LoadedModel:
    """A predictor, and what is known of the model that it asks."""

    order: ModelSpec
    predictor: Predictor
    version: str
    bundle: Bundle | None = None
    golden: Golden | None = None

    @classmethod
    def loaded(cls, order: ModelSpec) -> LoadedModel:
        """The model of an order; errors as `load_predictor`."""
        path = Path(order.path)
        version = version_of(path)
        found = load_predictor(
            path,
            order.backend,
            1,
            order.trusted,
            order.limits,
            order.decision,
            order.server,
            min(order.batch.at_once, usable_cores()),
        )
        bundle = read_bundle(path) if path.is_dir() else None
        golden = Golden.of(bundle) if bundle is not None and (path / "golden.npz").is_file() else None
        return cls(order, replace(found, threshold=order.threshold), version, bundle, golden)

    @property
    def side(self) -> int:
        """Pixels."""
        return self.predictor.preprocess.size

    def golden_pixels(self) -> np.ndarray:
        """One image uint8 [1, 3, S, S] whose answer is known, or a grey one."""
        return (
            self.golden.pixels[:1] if self.golden is not None else np.full((1, 3, self.side, self.side), 128, np.uint8)
        )

    def wrong(self, logits: np.ndarray) -> str:
        """Why these logits [1, C] cannot be the model's for `golden_pixels`; "" where they can."""
        if logits.shape != (1, len(self.predictor.classes)) or not np.isfinite(logits).all():
            return f"the model answers a known image with logits of the shape {list(logits.shape)}, or with numbers that are not finite"
        if self.golden is None:
            return ""
        found, due = (softmax(values, self.predictor.temperature) for values in (logits, self.golden.logits[:1]))
        difference = float(np.abs(found - due).max())
        return (
            ""
            if difference <= self._tolerance()
            else f"the model answers a known image otherwise than its bundle (difference {difference:.2g})"
        )

    def _tolerance(self) -> float:
        name = self.predictor.backend_name
        own = BACKENDS[name].tolerance if name in BACKENDS else _TOLERANCE
        exports = {} if self.bundle is None else self.bundle.info.exports
        return float(exports.get(name, {}).get("tolerance", own))

    def facts(self) -> dict[str, Any]:
        """The model's card, and what the server must know to ask it."""
        decision = self.predictor.decision
        limits = {
            "max_bytes": self.order.limits.max_bytes,
            "max_pixels": self.order.limits.max_pixels,
            "formats": list(self.order.limits.formats),
        }
        info = None if self.bundle is None else self.bundle.info
        return {
            "name": self.order.name,
            "version": self.version,
            "backend": self.predictor.backend_name,
            "classes": list(self.predictor.classes),
            "image_size": self.side,
            "temperature": self.predictor.temperature,
            "threshold": self.predictor.threshold,
            "decision": None
            if decision is None
            else {key: getattr(decision, key) for key in ("threshold", "ood_limit", "set_level", "note")},
            "embeddings": hasattr(self.predictor.backend, "logits_and_embeddings"),
            "limits": limits,
            "reference": {} if info is None else info.decision,
            **(
                {}
                if info is None
                else {"metrics": info.metrics, "intervals": info.intervals, "provenance": info.provenance}
            ),
        }


def served_name(name: str) -> str:
    """A model's name as a URL, a label of Prometheus and Triton's clients take it."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "model"
