"""How fast and how large each form of a model is on this machine, every one measured in a process of its own."""

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

_WARM_UP, _FEWEST, _MOST, _SECONDS = 3, 10, 200, 4.0  # calls, and how long they may take
_SMALL_BATCH, _HURRY = 16, 0.5


@dataclass(frozen=True)
class Latency:
    """What was measured of each backend, and on which machine."""

    backends: Mapping[str, Mapping[str, Any]]
    hardware: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"backends": {name: dict(row) for name, row in self.backends.items()}, "hardware": dict(self.hardware)}

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        for name, row in self.backends.items():
            times = f"p50 {row['p50_ms']:.1f} ms, p95 {row['p95_ms']:.1f} ms, {row['images_per_s']:.0f} images/s at {row['batch_size']}"
            yield f"latency {name}: {times}, {row['megabytes']:.1f} MB"
        yield f"on {self.hardware['processor']}, {self.hardware['cores']} cores, load {self.hardware['load']:.1f} while measured"

    def write(self, directory: Path) -> None:
        """Write latency.json; StorageError where the disk refuses."""
        write_text(directory / "latency.json", json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")


def measure_latency(path: Path, batch_size: int = 64, trusted: Sequence[str] = ()) -> Latency:
    """Latency of every backend, but one that must build first, of what `bundle.find_checkpoint` found, pixels in memory to logits.

    A fresh process for each: none warms the other up or shares its memory, and the caller loads no torch.

    Raises:
        CheckpointError: A backend cannot be loaded or fails.
    """
    rows = {backend: _in_a_process(path, backend, batch_size, trusted) for backend in _backends(path)}
    return Latency(rows, hardware())


def hardware() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and how many processes wanted one in the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "load": round(load, 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def timed(
    logits: Callable[[], object], fewest: int = _FEWEST, most: int = _MOST, seconds: float = _SECONDS
) -> np.ndarray:
    """Seconds of each call, float64 [n], the first ones left out: `most` calls, or as many as fit into the time, at least `fewest`."""
    for _ in range(_WARM_UP):
        logits()
    spent: list[float] = []
    while len(spent) < most and (len(spent) < fewest or sum(spent) < seconds):
        start = time.perf_counter()
        logits()
        spent.append(time.perf_counter() - start)
    return np.array(spent)


def measured(backend: Backend, size: int, batch_size: int, seconds: float = _SECONDS) -> dict[str, float]:
    """Milliseconds for one image (median and 95th percentile) and images a second in batches, from preprocessed pixels to logits."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, 3, size, size), dtype=np.uint8)
    single = timed(lambda: backend.logits(pixels[:1]), seconds=seconds)
    batches = timed(lambda: backend.logits(pixels), fewest=3, seconds=seconds)
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
    """What was measured of one backend in a second or two, beside whatever else this process holds: for the end of a training."""
    return _row(measured(backend, size, _SMALL_BATCH, _HURRY), _SMALL_BATCH, file)


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
    """Measure one backend in this process and print its figures as a line of JSON."""
    path, backend, batch_size, trusted = json.loads(request)
    predictor = load_predictor(Path(path), backend, trusted=trusted)
    print(json.dumps(measured(predictor.backend, predictor.preprocess.size, batch_size)))


if __name__ == "__main__":
    main(sys.argv[1])
