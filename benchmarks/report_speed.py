"""The verb `report` on a run with many images: seconds, memory and size of the page.

python benchmarks/report_speed.py [--images 60000] [--classes 10 100 1000] [--side 400] [--rounds 3]

The images are JPEGs of noise over colour, `--side` pixels wide; 200 different ones stand under the names of all. 85
of 100 answers are right. Each round is one command as a person types it, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.bundle import BundleInfo, seal  # noqa: E402
from image_classifier.evaluation.metrics.compute import compute_metrics  # noqa: E402
from image_classifier.evaluation.results import metrics_dict  # noqa: E402
from image_classifier.manifest import Manifest, Record  # noqa: E402
from image_classifier.predictions import PredictionTable  # noqa: E402

_DIFFERENT = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--side", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for num_classes in options.classes:
        with tempfile.TemporaryDirectory() as place:
            _make_run(Path(place), options.images, num_classes, options.side)
            times = [_timed(Path(place)) for _ in range(options.rounds)]
            size = (Path(place) / "plots/run/report.html").stat().st_size
        seconds = f"median {statistics.median(times):6.2f} s, each {[round(value, 2) for value in times]}"
        print(f"{options.images} images, {num_classes:>4} classes: {seconds}, page {size / 1e6:.2f} MB")
    print(f"peak memory of the largest: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")


def _timed(place: Path) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "commands.py", "report", "run"], cwd=place, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def _make_run(place: Path, num_images: int, num_classes: int, side: int) -> None:
    """A bundle of one part with its images and predictions."""
    generator = np.random.default_rng(0)
    targets = np.arange(num_images) % num_classes
    names = [f"{target:04d}/{row:06d}.jpg" for row, target in enumerate(targets.tolist())]
    _write_images(place / "images", names, side, generator)
    digests = (f"{row:064x}" for row in range(num_images))
    records = (
        Record(name, name[:4], "test", digest[-16:], digest, side, side)
        for name, digest in zip(names, digests, strict=True)
    )
    manifest = Manifest.of(place / "images", records)
    answers = np.where(generator.random(num_images) < 0.85, targets, generator.integers(0, num_classes, num_images))
    logits = generator.normal(size=(num_images, num_classes)).astype(np.float32)
    logits[np.arange(num_images), answers] += 6
    table = PredictionTable(tuple(names), manifest.targets, logits, manifest.classes)
    table.write(place / "plots/run/test")
    (place / "plots/run/test/metrics.json").write_text(json.dumps(metrics_dict(compute_metrics(table), None)))
    bundle = place / "models/run"
    bundle.mkdir(parents=True)
    manifest.write(bundle / "manifest.csv")
    seal(bundle, BundleInfo("run", manifest.classes, {}, {}, {}, {"data_root": str(manifest.root)}))


def _write_images(root: Path, names: list[str], side: int, generator: np.random.Generator) -> None:
    for row, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if row < _DIFFERENT:
            small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            os.link(root / names[row % _DIFFERENT], path)


if __name__ == "__main__":
    main()
