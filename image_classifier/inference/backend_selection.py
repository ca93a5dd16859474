"""`backend=auto`: the fastest backend here that still answers as the bundle promises."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError, ConfigError, ParityError
from image_classifier.inference.backends import fitting, open_backend, takes_minutes
from image_classifier.inference.golden import Check, Golden, checked
from image_classifier.inference.predictor import Backend

log = logging.getLogger(__name__)

AUTO = "auto"
TOLERANCE = 0.02  # by which a probability may differ, of a golden image and of those it was exported with
_REPEATS = 2  # the machine may be busy
_SLOW_TO_LOAD = ("checkpoint",)  # takes seconds: only where nothing else is there
_UNDER_A_CONTRACT = ("int8",)  # its export must have said how it answers


def fastest_backend(bundle: Bundle, trusted: Sequence[str] = (), callers: int = 1) -> tuple[str, Backend]:
    """The name of the fastest backend that gives every golden image its class and each probability within 0.02, and the backend.

    Raises:
        CheckpointError: None of those that are installed does, or the golden images are damaged.
    """
    bundle.verify(["golden.npz"])
    golden = Golden.of(bundle)
    opened: dict[str, Backend] = {}
    checks: list[Check] = []
    told: list[str] = []
    for name in candidates(bundle):
        try:
            opened[name] = open_backend(bundle, name, trusted)
            repeated = [checked(name, opened[name], golden, bundle.info.temperature) for _ in range(_REPEATS)]
            check = min(repeated, key=lambda check: check.milliseconds)
        except (CheckpointError, ConfigError, ParityError) as error:
            told.append(f"{name} cannot be used ({error.fact})")
            continue
        if check.fails(TOLERANCE):
            told.append(f"{name} differs by up to {check.largest_difference:.2g}")
            continue
        told.append(f"{name} {check.milliseconds:.2f} ms an image")
        checks.append(check)
    if not checks:
        raise CheckpointError(
            f"no backend answers as {bundle.info.name!r} should ({'; '.join(told) or 'none is installed'})",
            "export it again",
        )
    best = min(checks, key=lambda check: check.milliseconds).backend
    log.info("backend %s: %s", best, ", ".join(told))
    if callers > 1 and hasattr(opened[best], "callers"):  # others have one way only
        opened[best] = open_backend(bundle, best, trusted, callers=callers)
    return best, opened[best]


def candidates(bundle: Bundle) -> list[str]:
    """The backends to choose from: none whose export found, on more images than the golden ones, that it differs by more than is allowed."""
    found = [name for name in fitting(bundle) if _agreed(bundle, name)]
    return [name for name in found if name not in _SLOW_TO_LOAD and not takes_minutes(bundle, name)] or found


def _agreed(bundle: Bundle, name: str) -> bool:
    exports = bundle.info.exports
    facts = exports.get("openvino", {}).get("bf16", {}) if name == "openvino-bf16" else exports.get(name, {})
    if "largest_difference" not in facts:
        return name not in _UNDER_A_CONTRACT
    return bool(facts.get("agreement") == 1 and facts["largest_difference"] <= TOLERANCE)
