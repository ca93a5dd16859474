"""`backend=auto`: the fastest backend of this machine that still answers as the checkpoint did."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError, ConfigError, ParityError
from image_classifier.inference.backends import fitting, open_backend, takes_minutes
from image_classifier.inference.golden import Check, Golden, check_golden
from image_classifier.inference.predictor import Backend

log = logging.getLogger(__name__)

AUTO = "auto"
TOLERANCE = 0.02  # allowed difference of a probability, for golden images and those of the export
_REPEATS = 2  # the machine may be busy
_SLOW_TO_LOAD = ("checkpoint",)  # takes seconds: only where there is nothing else
_NEEDS_AN_EXPORT = ("int8",)  # usable only where its export measured how it answers


def fastest_backend(bundle: Bundle, trusted: Sequence[str] = (), concurrent_runs: int = 1) -> tuple[str, Backend]:
    """Return the fastest backend and its name.

    It must give every golden image its class and each probability within 0.02.

    Raises:
        CheckpointError: No backend that is installed does, or the golden images are damaged.
    """
    bundle.verify(["golden.npz"])
    golden = Golden.of(bundle)
    opened: dict[str, Backend] = {}
    checks: list[Check] = []
    results: list[str] = []
    for name in candidates(bundle):
        try:
            opened[name] = open_backend(bundle, name, trusted)
            repeated = [check_golden(name, opened[name], golden, bundle.info.temperature) for _ in range(_REPEATS)]
        except (CheckpointError, ConfigError, ParityError) as error:
            results.append(f"{name} cannot be used ({error.fact})")
            continue
        check = min(repeated, key=lambda check: check.milliseconds)
        if check.fails(TOLERANCE):
            results.append(f"{name} differs by up to {check.largest_difference:.2g}")
            continue
        results.append(f"{name} {check.milliseconds:.2f} ms an image")
        checks.append(check)
    if not checks:
        raise CheckpointError(
            f"no backend answers as {bundle.info.name!r} should ({'; '.join(results) or 'none is installed'})",
            "export it again",
        )
    best = min(checks, key=lambda check: check.milliseconds).backend
    log.info("backend %s: %s", best, ", ".join(results))
    if concurrent_runs > 1 and hasattr(opened[best], "concurrent_runs"):  # the others run one batch at a time
        opened[best] = open_backend(bundle, best, trusted, concurrent_runs=concurrent_runs)
    return best, opened[best]


def candidates(bundle: Bundle) -> list[str]:
    """Return the backends to choose from: none that its export measured to differ by more than is allowed."""
    agreeing = [name for name in fitting(bundle) if _agrees(bundle, name)]
    quick = [name for name in agreeing if name not in _SLOW_TO_LOAD and not takes_minutes(bundle, name)]
    return quick or agreeing


def _agrees(bundle: Bundle, name: str) -> bool:
    exports = bundle.info.exports
    export = exports.get("openvino", {}).get("bf16", {}) if name == "openvino-bf16" else exports.get(name, {})
    if "largest_difference" not in export:
        return name not in _NEEDS_AN_EXPORT
    return bool(export.get("agreement") == 1 and export["largest_difference"] <= TOLERANCE)
