"""Seconds and peak memory of all metrics with their bootstrap intervals, as images and classes grow.

python benchmarks/metrics_speed.py [--images 10000 100000 1000000] [--classes 10 100 1000] [--resamples 1000]
[--threads 2] [--plot growth.png]

The logits (float32, generated: normal noise, a signal that differs from image to image, one class in ten hard) lie in
memory as they do after `test`, and count in the peak, which is of a process of its own: the largest resident memory
up to its end. Processor seconds are those of all
threads: what a busy machine says least wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.evaluation.metrics.compute import compute_metrics  # noqa: E402
from image_classifier.parallel import slices  # noqa: E402
from image_classifier.predictions import PredictionTable  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.images[0], options.classes[0], options.resamples, options.threads)))
        return
    rows = [_run(images, classes, options) for classes in options.classes for images in options.images]
    if options.plot:
        _plot(rows, options.plot)


def _run(images: int, classes: int, options: argparse.Namespace) -> dict[str, float]:
    words = [
        "--images",
        images,
        "--classes",
        classes,
        "--resamples",
        options.resamples,
        "--threads",
        options.threads,
        "--measure",
    ]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, float] = json.loads(done.stdout)
    print(
        f"{images:>9,} images x {classes:>5,} classes: {row['seconds']:6.2f} s, processor "
        f"{row['processor_s']:5.2f} s on {options.threads} threads, "
        f"peak {row['peak'] / 1e9:5.2f} GB, of it logits {row['logits'] / 1e9:.2f} GB (the machine's load: "
        f"{os.getloadavg()[0]:.1f})",
        flush=True,
    )
    return row


def _measure(images: int, classes: int, resamples: int, threads: int) -> dict[str, float]:
    table = _table(images, classes)
    start, spent = time.perf_counter(), time.process_time()
    compute_metrics(table, resamples, threads)
    seconds, processor = time.perf_counter() - start, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "images": images,
        "classes": classes,
        "logits": table.logits.nbytes,
        "seconds": seconds,
        "processor_s": processor,
        "peak": peak,
    }


def _table(images: int, classes: int) -> PredictionTable:
    """Answers of a middling classifier, made by blocks of rows, so that they take no more memory than they are."""
    rng = np.random.default_rng(0)
    targets, logits = rng.integers(0, classes, images), np.empty((images, classes), dtype=np.float32)
    for rows in slices(images, 1024):
        block = rng.standard_normal((rows.stop - rows.start, classes), dtype=np.float32)
        signal = rng.normal(4.5, 2.0, len(block)) * np.where(targets[rows] % 10, 1.0, 0.5)
        block[np.arange(len(block)), targets[rows]] += signal
        logits[rows] = 1.5 * block
    return PredictionTable(("",) * images, targets, logits, tuple(f"class_{number:04d}" for number in range(classes)))


def _plot(rows: list[dict[str, float]], path: Path) -> None:
    """The growth of processor time and memory with the number of images, one line for each number of classes."""
    from matplotlib.ticker import FuncFormatter

    from image_classifier.evaluation.plots.figure import BLUE, GREY, ORANGE, axes_at, new_figure, save_figure

    figure = new_figure(9.4, 4.0, "All metrics with their bootstrap intervals")
    for place, (key, scale, label) in enumerate(
        (("processor_s", 1.0, "processor seconds, all threads"), ("peak", 1e9, "peak memory, GB (logits included)"))
    ):
        axes = axes_at(figure, 0.75 + 4.65 * place, 0.6, 3.8, 2.7)
        for colour, mark, classes in zip(
            (GREY, ORANGE, BLUE), "^so", sorted({row["classes"] for row in rows}), strict=False
        ):
            own = [row for row in rows if row["classes"] == classes]
            axes.plot(
                [row["images"] for row in own],
                [row[key] / scale for row in own],
                color=colour,
                marker=mark,
                label=f"{classes:,.0f} classes",
            )
        axes.set(xscale="log", yscale="log", xlabel="images", ylabel=label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1 else f"{value:,.0f}"))
            axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.grid(color="#e3e3e3", linewidth=0.8)
    figure.axes[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
