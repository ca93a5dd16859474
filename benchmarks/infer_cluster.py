"""`infer` on this machine and on a cluster of this machine's processors, side by side, and what a million images cost.

python benchmarks/infer_cluster.py IMAGES_DIR --bundle BUNDLE --price PRICE [--count 2048] [--rounds 3] [--workers 1 2] [--batch_size 64]

PRICE is that of one processor core for one hour, in any currency; there is none here, as it differs by provider, machine and day. Per side and
round the command runs as a user runs it, over COUNT and over twice COUNT images; the difference of both times is that of COUNT images without
start-up. Cost of a million images = 1e6 / (images/s) / 3600 * cores * PRICE. Sides run in turn, so ratios of one round count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from image_classifier.inference.predictor import cores

ROOT = Path(__file__).resolve().parents[1]


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
    found = sorted(path for path in options.images.resolve().rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    sides = {f"local, {cores()} cores": (cores(), []), **{f"ray, workers of a core: {n}": (n, _ray(n)) for n in options.workers}}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    starts: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (_, more) in sides.items():
            half, whole = (_seconds(options, found, count, more) for count in (options.count, 2 * options.count))
            speeds[name].append(options.count / (whole - half))
            starts[name].append(2 * half - whole)
            print(f"{name}: {speeds[name][-1]:.1f} images/s, start and end {starts[name][-1]:.1f} s", flush=True)
    local = next(iter(speeds.values()))
    for name, (used, _) in sides.items():
        speed, ratio = statistics.median(speeds[name]), statistics.median(a / b for a, b in zip(speeds[name], local, strict=True))
        cost = 1e6 / speed / 3600 * used * options.price
        start = statistics.median(starts[name])
        print(f"{name:<26} {speed:8.1f} images/s  / local {ratio:.2f}  start and end {start:.1f} s  a million images: {cost:.3g}")


def _ray(workers: int) -> list[str]:
    return ["--engine", "ray", "--ray.workers", str(workers), "--ray.shard_batches", "2"]


def _seconds(options: argparse.Namespace, found: list[Path], count: int, more: list[str]) -> float:
    """How long the command takes over a list that repeats the images."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "list.csv"
        table.write_text("path\n" + "".join(f'"{found[number % len(found)]}"\n' for number in range(count)))
        line = [sys.executable, str(ROOT / "commands.py"), "infer", "--checkpoint_name", str(options.bundle), "--images", str(table)]
        line += ["--format", "parquet", "--output", str(Path(folder) / "answers"), "--batch_size", str(options.batch_size), *more]
        start = time.perf_counter()
        subprocess.run(line, check=True, capture_output=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
