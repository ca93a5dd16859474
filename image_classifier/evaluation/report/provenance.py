"""The origin of a result: images by split, exports with size and speed, command, versions and hashes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from image_classifier.evaluation.report.run_data import RunData
from image_classifier.evaluation.report.sentences import initial_weights_in_words
from image_classifier.html.text import plain
from image_classifier.modeling.weight_origin import WeightOrigin

_MAX_CLASSES = 100  # classes that are drawn
_FILES = {"onnx": "model.onnx", "checkpoint": "model.ckpt"}  # backend -> the export it reads
_EXPORTS = (".onnx", ".ckpt", ".engine", ".pt", ".safetensors")


def data_rows(run: RunData) -> dict[str, Any]:
    """Return the images of each class by split; of many classes the largest and the smallest; {} without a manifest."""
    if not run.split_counts:
        return {}
    totals = [sum(counts) for counts in zip(*run.split_counts.values(), strict=True)]
    order = sorted(range(len(totals)), key=lambda code: (-totals[code], run.labels[code]))
    shown = order if len(order) <= _MAX_CLASSES else order[: _MAX_CLASSES // 2] + order[-_MAX_CLASSES // 2 :]
    rows = [
        {
            "label": plain(run.labels[code]),
            "splits": [(split, counts[code]) for split, counts in run.split_counts.items()],
            "images": totals[code],
        }
        for code in shown
    ]
    return {
        "splits": {split: sum(counts) for split, counts in run.split_counts.items()},
        "rows": rows,
        "largest": max(totals),
        "classes": len(totals),
        "audit": _issues(run.audit),
    }


def _issues(audit: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return severity, name, number of files and headline of each issue type."""
    headlines = audit.get("headlines") or {}
    return [
        (str(count["severity"]), name.replace("_", " "), f"{count['files']}", plain(headlines.get(name, "")))
        for name, count in (audit.get("counts") or {}).items()
    ]


def exports(sizes: Mapping[str, tuple[int, str]], latency: Mapping[str, Any]) -> dict[str, Any]:
    """Return the models of the bundle with their sizes and, where measured, their speed and the hardware."""
    measured = {_FILES.get(name, name): flat(values) for name, values in (latency.get("backends") or {}).items()}
    columns = list(dict.fromkeys(column for values in measured.values() for column in values))
    names = [*(name for name in sizes if name.endswith(_EXPORTS)), *(name for name in measured if name not in sizes)]
    rows = [
        {"name": plain(name), "size": sizes.get(name, (0, ""))[0], "values": measured.get(name, {})} for name in names
    ]
    return {"rows": rows, "columns": columns, "notes": flat(latency.get("hardware") or {})} if rows else {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as one row.

    >>> flat({"batch 1": {"p50_ms": 3}, "threads": 2})
    {'batch 1 p50_ms': 3, 'threads': 2}
    """
    row: dict[str, Any] = {}
    for name, value in values.items():
        column = f"{prefix} {name}".strip()
        row |= flat(value, column) if isinstance(value, Mapping) else {column: value}
    return row


def origin(run: RunData) -> dict[str, Any]:
    """Return command, versions, hashes and initial weights; {} without a bundle."""
    if run.info is None:
        return {}
    known = run.info.provenance
    command = known.get("command", [])
    weights = WeightOrigin.from_dict(known.get("initial_weights"))
    rows = {
        "trained": known.get("created", ""),
        "image_classifier": known.get("version", ""),
        "commit": known.get("git", ""),
        "seed": str(known.get("seed", "")),
        "manifest sha256": known.get("manifest_sha256", ""),
        "images": known.get("data_root", ""),
        "Python": known.get("python", ""),
        "packages": ", ".join(f"{name} {version}" for name, version in (known.get("packages") or {}).items()),
        "initial weights": " ".join(filter(None, [weights.page, weights.sha256])) if weights else "",
        "training speed": f"{known['images_per_second']} images/s" if "images_per_second" in known else "",
        "preprocessing": json.dumps(run.info.preprocess),
    }
    return {
        "command": command if isinstance(command, str) else shlex.join(map(str, command)),
        "rows": [(name, plain(str(value))) for name, value in rows.items() if value],
        "weights": initial_weights_in_words(run),
        "files": [(plain(name), size, digest) for name, (size, digest) in run.sizes.items()],
    }
