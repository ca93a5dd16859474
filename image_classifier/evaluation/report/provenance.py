"""Where a result came from: the images and their parts, the exports with size and speed, the command, versions and hashes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from image_classifier.evaluation.report.run_data import RunData
from image_classifier.html.text import plain

_CLASSES = 100  # classes that are drawn
_FILES = {"onnx": "model.onnx", "checkpoint": "model.ckpt"}  # backend -> the export it reads
_EXPORTS = (".onnx", ".ckpt", ".engine", ".pt", ".safetensors")


def data_rows(facts: RunData) -> dict[str, Any]:
    """Images of each part and class: of many classes the largest and the smallest; {} where there is no manifest."""
    if not facts.parts:
        return {}
    totals = [sum(counts) for counts in zip(*facts.parts.values(), strict=True)]
    order = sorted(range(len(totals)), key=lambda code: (-totals[code], facts.labels[code]))
    shown = order if len(order) <= _CLASSES else order[: _CLASSES // 2] + order[-_CLASSES // 2 :]
    rows = [
        {
            "label": plain(facts.labels[code]),
            "parts": [(split, counts[code]) for split, counts in facts.parts.items()],
            "images": totals[code],
        }
        for code in shown
    ]
    return {
        "splits": {split: sum(counts) for split, counts in facts.parts.items()},
        "rows": rows,
        "largest": max(totals),
        "classes": len(totals),
        "audit": _findings(facts.audit),
    }


def _findings(audit: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Severity, kind, how much and the headline of each kind of finding."""
    headlines = audit.get("headlines") or {}
    return [
        (str(count["severity"]), kind.replace("_", " "), f"{count['files']}", plain(headlines.get(kind, "")))
        for kind, count in (audit.get("counts") or {}).items()
    ]


def exports(sizes: Mapping[str, tuple[int, str]], latency: Mapping[str, Any]) -> dict[str, Any]:
    """The models of the bundle with their sizes and, where it was measured, how fast they answer and on which machine."""
    measured = {_FILES.get(name, name): flat(values) for name, values in (latency.get("backends") or {}).items()}
    columns = list(dict.fromkeys(column for values in measured.values() for column in values))
    names = [*(name for name in sizes if name.endswith(_EXPORTS)), *(name for name in measured if name not in sizes)]
    rows = [
        {"name": plain(name), "size": sizes.get(name, (0, ""))[0], "values": measured.get(name, {})} for name in names
    ]
    return {"rows": rows, "columns": columns, "notes": flat(latency.get("hardware") or {})} if rows else {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as one row: {"batch 1": {"p50_ms": 3}} has the column "batch 1 p50_ms"."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        words = f"{prefix} {name}".strip()
        row |= flat(value, words) if isinstance(value, Mapping) else {words: value}
    return row


def origin(facts: RunData) -> dict[str, Any]:
    """Command, versions and hashes; {} where there is no bundle."""
    if facts.info is None:
        return {}
    known = facts.info.provenance
    command = known.get("command", [])
    rows = {
        "trained": known.get("created", ""),
        "image_classifier": known.get("version", ""),
        "commit": known.get("git", ""),
        "seed": str(known.get("seed", "")),
        "manifest sha256": known.get("manifest_sha256", ""),
        "images": known.get("data_root", ""),
        "Python": known.get("python", ""),
        "packages": ", ".join(f"{name} {version}" for name, version in (known.get("packages") or {}).items()),
        "training speed": f"{known['images_per_second']} images/s" if "images_per_second" in known else "",
        "preprocessing": json.dumps(facts.info.preprocess),
    }
    return {
        "command": command if isinstance(command, str) else shlex.join(map(str, command)),
        "rows": [(name, plain(str(value))) for name, value in rows.items() if value],
        "files": [(plain(name), size, digest) for name, (size, digest) in facts.sizes.items()],
    }
