"""Scaled JPEG decoding against full decoding: how much faster, and how far the pixels are apart.

python benchmarks/scaled_decoding.py ARCHIVE_OR_FOLDER [--size 64 224] [--mode crop] [--interpolation bilinear]
[--count 300] [--rounds 5]

One thread reads the same photographs with both, in turn; the difference is taken between the squares the network
would be given.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.images import Preprocess, is_image_name, read_size  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--size", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--mode", default="crop")
    parser.add_argument("--interpolation", default="bilinear")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with _folder(options.images) as folder:
        paths = sorted(path for path in folder.rglob("*") if is_image_name(path.name))
        contents = [path.read_bytes() for path in paths[:: max(1, len(paths) // options.count)]][: options.count]
    shapes = np.array([read_size(content) for content in contents])
    print(f"{len(contents)} images, median {np.median(shapes[:, 0]):.0f} x {np.median(shapes[:, 1]):.0f} pixels")
    for size in options.size:
        full = Preprocess(size, options.mode, options.interpolation)
        scaled = Preprocess(size, options.mode, options.interpolation, scaled_decoding=True)
        _compare_speed(full, scaled, contents, options.rounds)
        _compare_pixels(full, scaled, contents)


@contextmanager
def _folder(images: Path) -> Iterator[Path]:
    if images.is_dir():
        yield images
        return
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(images) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def _compare_speed(full: Preprocess, scaled: Preprocess, contents: list[bytes], rounds: int) -> None:
    pairs = [(_images_a_second(full, contents), _images_a_second(scaled, contents)) for _ in range(rounds)]
    ratios = [fast / slow for slow, fast in pairs]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    print(
        f"{full.size} px {full.mode}: images/s full {medians[0]:.0f}, scaled {medians[1]:.0f};"
        f" scaled / full: median {statistics.median(ratios):.2f}, round by round "
        f"{[round(ratio, 2) for ratio in ratios]}"
    )


def _images_a_second(preprocess: Preprocess, contents: list[bytes]) -> float:
    start = time.perf_counter()
    for content in contents:
        preprocess.read(content)
    return len(contents) / (time.perf_counter() - start)


def _compare_pixels(full: Preprocess, scaled: Preprocess, contents: list[bytes]) -> None:
    apart = np.stack([np.abs(full.read(content).astype(np.int16) - scaled.read(content)) for content in contents])
    changed = (apart > 0).any(axis=(1, 2, 3))
    levels = f"mean {apart.mean():.2f}, 99th percentile {np.percentile(apart, 99):.0f}, largest {apart.max()}"
    among = f" (mean {apart[changed].mean():.2f} among them)" if changed.any() else ""
    print(
        f"{full.size} px {full.mode}: grey levels apart: {levels}; {changed.mean():.0%} of images differ at all{among}"
    )


if __name__ == "__main__":
    main()
