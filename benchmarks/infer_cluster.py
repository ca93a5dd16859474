"""`infer` on this machine and on a cluster of this machine's processors, side by side, and what a million images cost.

python benchmarks/infer_cluster.py IMAGES_DIR --bundle BUNDLE --price PRICE [--count 2048] [--rounds 3] [--workers 1
2] [--batch_size 64]

PRICE is that of one processor core for one hour, in any currency; there is none here, as it differs by provider,
machine and day. On the cluster's side the command runs as a user runs it; its speed is that between the first file of
answers of each worker and the last, what is left is start-up. On this machine's side the predictor answers in this
process, already loaded. Cost of a million images = 1e6 / (images/s) / 3600 * cores * PRICE. Sides run in turn, so
ratios of one round count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.cpu import usable_cores  # noqa: E402
from image_classifier.inference.load import load_predictor  # noqa: E402
from image_classifier.inference.predictor import Predictor  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--price", type=float, required=True)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    found = sorted(
        path for path in options.images.resolve().rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")
    )
    paths = [found[number % len(found)] for number in range(options.count)]
    predictor = load_predictor(options.bundle, batch_size=options.batch_size)
    used = {"local": usable_cores(), **{f"ray, {workers} workers": workers for workers in options.workers}}
    speeds: dict[str, list[float]] = {name: [] for name in used}
    starts: dict[str, list[float]] = {name: [] for name in used}
    for _ in range(options.rounds):
        for name, workers in used.items():
            speed, start = _here(predictor, paths) if name == "local" else _on_ray(options, paths, workers)
            speeds[name].append(speed)
            starts[name].append(start)
            print(f"{name}: {speed:.1f} images/s, start and end {start:.1f} s", flush=True)
    for name, processors in used.items():
        speed, ratio = (
            statistics.median(speeds[name]),
            statistics.median(a / b for a, b in zip(speeds[name], speeds["local"], strict=True)),
        )
        cost = 1e6 / speed / 3600 * processors * options.price
        start = statistics.median(starts[name])
        print(
            f"{name:<14} {processors} cores {speed:8.1f} images/s  / local {ratio:.2f}  start and end "
            f"{start:.1f} s  a million images: {cost:.3g}"
        )


def _here(predictor: Predictor, paths: list[Path]) -> tuple[float, float]:
    start = time.perf_counter()
    deque(predictor.predict(paths), maxlen=0)
    return len(paths) / (time.perf_counter() - start), 0.0


def _on_ray(options: argparse.Namespace, paths: list[Path], workers: int) -> tuple[float, float]:
    """Images/s between the first files of answers and the last, and the other seconds of the command."""
    with tempfile.TemporaryDirectory() as folder:
        table, output = Path(folder) / "list.csv", Path(folder) / "answers"
        table.write_text("path\n" + "".join(f'"{path}"\n' for path in paths))
        line = [
            sys.executable,
            str(ROOT / "commands.py"),
            "infer",
            "--checkpoint_name",
            str(options.bundle),
            "--images",
            str(table),
        ]
        line += ["--format", "parquet", "--output", str(output), "--batch_size", str(options.batch_size)]
        start = time.perf_counter()
        subprocess.run(
            [*line, "--engine", "ray", "--ray.workers", str(workers), "--ray.shard_batches", "1"],
            check=True,
            capture_output=True,
        )
        whole = time.perf_counter() - start
        written = sorted(path.stat().st_mtime for path in output.glob("part-*"))
        seconds = written[-1] - written[workers - 1]
        answered = (len(written) - workers) * options.batch_size
        return answered / seconds, whole - len(paths) * seconds / answered


if __name__ == "__main__":
    main()
