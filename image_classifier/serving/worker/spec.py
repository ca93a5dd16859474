"""What a worker process must load: a checkpoint, a backend and limits, as plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.bundle import INFO_NAME, sha256_of
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import ServerAddress
from image_classifier.serving.worker.batching import BatchSettings

_VERSION_DIGITS = 12


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint and how to load it. It is sent to the worker process as JSON.

    Args:
        name: The name by which requests ask for the model.
        path: The bundle or the file.
        backend: The inference backend; None chooses by the kind of file.
        server: The address of a Triton server, for the backend triton.
        threshold: Answers with a lower confidence abstain.
        decision: Overrides for the rules by which the model abstains.
        limits: Limits of one image.
        batch: Limits of a batch.
        trusted: Packages whose classes a `_target_` may name.
        decode_s: A decoder that takes longer ends the process.
        hang_s: A model that takes longer for one batch ends the process.
    """

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
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ModelSpec:
        """Build the spec that `as_dict` described."""
        kinds = {
            "server": ServerAddress,
            "decision": DecisionSettings,
            "limits": DecodeLimits,
            "batch": BatchSettings,
            "trusted": tuple,
        }
        return cls(**{key: _build(kinds[key], value) if key in kinds else value for key, value in plain.items()})


def _build(kind: type, value: Any) -> Any:
    return kind(**value) if isinstance(value, Mapping) else kind(value)


def version_of(path: Path) -> str:
    """Return the first digits of the SHA-256 of bundle.json, which holds the hashes of all files, or of one file."""
    return sha256_of(path / INFO_NAME if path.is_dir() else path)[:_VERSION_DIGITS]


def served_name(name: str) -> str:
    """Return a model's name in the form that URLs, Prometheus labels and Triton clients accept.

    >>> served_name("cats & dogs.v2")
    'cats___dogs.v2'
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "model"
