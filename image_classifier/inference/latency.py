"""Latency, throughput and size of each form of a model on this machine, each measured in a separate process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.bundle import INFO_NAME, read_bundle
from image_classifier.cpu import usable_cores
from image_classifier.errors import CheckpointError
from image_classifier.inference.backends import BACKENDS, fitting, takes_minutes
from image_classifier.inference.load import load_predictor
from image_classifier.inference.predictor import Backend

_WARM_UP = 3  # calls that are not counted
_MIN_CALLS = 10
_MAX_CALLS = 200
_MAX_SECONDS = 4.0  # for one measurement
# For the measurement at the end of a training:
_SMALL_BATCH = 8
_SHORT_SECONDS = 0.25


@dataclass(frozen=True)
class Latency:
    """The figures of each backend, and of the machine they were measured on."""

    backends: Mapping[str, Mapping[str, Any]]
    hardware: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {"backends": {name: dict(row) for name, row in self.backends.items()}, "hardware": dict(self.hardware)}

    def lines(self) -> Iterator[str]:
        """Yield the lines for a terminal."""
        for name, row in self.backends.items():
            yield (
                f"latency {name}: p50 {row['p50_ms']:.1f} ms, p95 {row['p95_ms']:.1f} ms, "
                f"{row['images_per_s']:.0f} images/s at {row['batch_size']}, {row['megabytes']:.1f} MB"
            )
        machine = self.hardware
        yield f"on {machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f} while measured"

    def write(self, directory: Path) -> None:
        """Write latency.json; StorageError where the disk refuses."""
        write_text(directory / "latency.json", json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")


def measure_latency(path: Path, batch_size: int = 64, trusted: Sequence[str] = ()) -> Latency:
    """Measure each backend of a bundle or file, from pixels in memory to logits.

    A backend that must build an engine first is left out.
    Each has a fresh process: none shares memory or warm caches with another, and the caller loads no torch.

    Raises:
        CheckpointError: A backend cannot be loaded or fails.
    """
    rows = {backend: _in_a_process(path, backend, batch_size, trusted) for backend in _backends(path)}
    return Latency(rows, hardware())


def hardware() -> dict[str, Any]:
    """Return the processor's name, the cores this process may use, and the load average of the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "load": round(load, 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def timed(
    call: Callable[[], object],
    min_calls: int = _MIN_CALLS,
    max_calls: int = _MAX_CALLS,
    seconds: float = _MAX_SECONDS,
    warm_up: int = _WARM_UP,
) -> np.ndarray:
    """Return the seconds of each call, float64 [n], after some that warm up.

    There are `max_calls`, or as many as fit into `seconds`, but at least `min_calls`.
    """
    for _ in range(warm_up):
        call()
    spent: list[float] = []
    while len(spent) < max_calls and (len(spent) < min_calls or sum(spent) < seconds):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return np.array(spent)


def measure_backend(backend: Backend, size: int, batch_size: int, seconds: float = _MAX_SECONDS) -> dict[str, float]:
    """Return milliseconds for one image (median, 95th percentile) and images a second in batches, pixels to logits."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, 3, size, size), dtype=np.uint8)
    single = timed(lambda: backend.logits(pixels[:1]), seconds=seconds)
    batches = timed(lambda: backend.logits(pixels), min_calls=3, seconds=seconds, warm_up=1)
    p50, p95 = np.percentile(1000 * single, (50, 95))
    return {
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "images_per_s": batch_size / float(np.median(batches)),
        "calls": len(single),
    }


def _backends(path: Path) -> list[str]:
    if (path / INFO_NAME).is_file():
        bundle = read_bundle(path)
        return [name for name in fitting(bundle) if not takes_minutes(bundle, name)]
    return ["checkpoint" if path.suffix == ".ckpt" else "onnx"]


def _file(path: Path, backend: str) -> Path:
    if path.is_file():
        return path
    bundle = read_bundle(path)
    return bundle.path(BACKENDS[backend].file(bundle))


def _in_a_process(path: Path, backend: str, batch_size: int, trusted: Sequence[str]) -> dict[str, Any]:
    request = json.dumps([os.fspath(path.absolute()), backend, batch_size, list(trusted)])
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "image_classifier.inference.latency", request],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (os.fspath(root), os.environ.get("PYTHONPATH", "")))),
        },
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        raise CheckpointError(f"the latency of the backend {backend} cannot be measured", reason)
    return _row(json.loads(done.stdout.splitlines()[-1]), batch_size, _file(path, backend))


def in_this_process(backend: Backend, file: Path, size: int) -> dict[str, Any]:
    """Return the figures of one backend, measured in this process in about a second: for the end of a training."""
    return _row(measure_backend(backend, size, _SMALL_BATCH, _SHORT_SECONDS), _SMALL_BATCH, file)


def _row(figures: Mapping[str, float], batch_size: int, file: Path) -> dict[str, Any]:
    return {**figures, "batch_size": batch_size, "file": file.name, "megabytes": file.stat().st_size / 1e6}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(request: str) -> None:
    """Measure one backend in this process and write its figures as a line of JSON, for `_in_a_process`."""
    path, backend, batch_size, trusted = json.loads(request)
    predictor = load_predictor(Path(path), backend, trusted=trusted)
    figures = measure_backend(predictor.backend, predictor.preprocess.size, batch_size)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
