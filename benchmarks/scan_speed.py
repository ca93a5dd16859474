"""Looking at a folder of images for the first and for the second time.

python benchmarks/scan_speed.py FOLDER [--rounds 3] [--workers N]

First scan: every file read, hashed, decoded and made a thumbnail, by threads and by processes in turn. Second scan:
nothing changed, in a new store that the first one filled. What both share, finding the files, is timed by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.dataset import workers  # noqa: E402
from image_classifier.dataset.discovery import discover  # noqa: E402
from image_classifier.dataset.scan import scan_files  # noqa: E402
from image_classifier.images import DecodeLimits  # noqa: E402

Result = TypeVar("Result")
WAYS = {"threads": 10**12, "processes": 0}  # from how many files on processes are used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    os.sync()  # what was unpacked a moment ago is not written beside the first round
    discover([options.folder])  # nor does it pay for the folders' way into memory
    times: dict[str, list[float]] = {
        name: [] for name in (*(f"{scan}, {way}" for way in WAYS for scan in ("first", "second")), "find")
    }
    count = 0
    for _ in range(options.rounds):
        for way, limit in WAYS.items():
            workers.MANY = limit
            first, second, found, count = _round(options.folder, options.workers)
            times[f"first, {way}"].append(first)
            times[f"second, {way}"].append(second)
            times["find"].append(found)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(
            f"{name:<18} median {middle:6.2f} s, {count / middle:8.0f} files/s, each "
            f"{[round(value, 2) for value in seconds]}"
        )
    pairs = zip(times["first, threads"], times["first, processes"], strict=True)
    print(f"threads / processes: median {statistics.median(slow / fast for slow, fast in pairs):.2f}")
    pairs = zip(times["first, processes"], times["second, processes"], strict=True)
    print(f"first / second: median {statistics.median(first / second for first, second in pairs):.1f}")


def _round(folder: Path, count: int | None) -> tuple[float, float, float, int]:
    """Seconds of a first scan, a second one, and of finding alone; and how many files there are."""
    with tempfile.TemporaryDirectory() as store:

        def scan() -> int:
            return len(scan_files(discover([folder]), Path(store), DecodeLimits(), (255, 255, 255), count))

        first, files = _timed(scan)
        second, _ = _timed(scan)
        found, _ = _timed(lambda: discover([folder]))
    return first, second, found, files


def _timed(action: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
