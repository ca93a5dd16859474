"""Time, memory and recall of the search for near-duplicates as a data set grows.

python benchmarks/near_duplicates.py FOLDER_OR_ARCHIVE... [--sizes 10000 100000 1000000] [--plot growth.png]

Thumbnails are those of the images given (a tar or a folder), then as many generated ones as are wanted: blends of
crops of two of the images, which keep the statistics of photographs. Every 50th is a twin of an earlier one: brighter
or darker, noisy, blurred, shifted, every second one mirrored. Brute force (all correlations by matrix products) runs
on the smallest size and is extrapolated to the others.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.dataset.duplicates import DuplicateSettings, find_near_duplicates  # noqa: E402
from image_classifier.dataset.lsh import propose  # noqa: E402

BASE = 40  # side of the pictures that crops are cut from, pixels
EVERY = 50  # thumbnails to one planted twin
MOST = 60_000  # real images at most
BINS = (0.98, 0.985, 0.99, 0.995, 1.0001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="*")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(options.measure)))
        return
    pictures = _pictures(options.sources)
    print(f"{len(pictures)} real images")
    with tempfile.TemporaryDirectory() as folder:
        rows = [_run(pictures, size, Path(folder)) for size in sorted(options.sizes)]
        brute = _brute(np.load(Path(folder) / f"{rows[0]['images']}.npy"))
    _report(rows, brute)
    if options.plot:
        _plot(rows, brute, options.plot)


def _pictures(sources: list[Path]) -> np.ndarray:
    """All images of the sources, uint8 [M, 40, 40, 3]."""
    result = []
    for content in (content for source in sources for content in _files(source)):
        if len(result) == MOST:
            break
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.draft("RGB", (64, 64))
                result.append(np.asarray(image.convert("RGB").resize((BASE, BASE), Image.Resampling.BICUBIC)))
        except (UnidentifiedImageError, OSError):
            continue
    return np.stack(result)


def _files(source: Path) -> Iterator[bytes]:
    if source.is_dir():
        yield from (path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file())
        return
    with tarfile.open(source) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield file.read()


def _run(pictures: np.ndarray, size: int, folder: Path) -> dict[str, float]:
    """Make a set of that size and measure the search in a process of its own."""
    path = folder / f"{size}.npy"
    first, second, correlation = _generate(pictures, size, path)
    np.savez(path.with_suffix(".npz"), first=first, second=second, correlation=correlation)
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def _generate(pictures: np.ndarray, size: int, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write `size` thumbnails; the planted pairs with their correlations come back."""
    rng = np.random.default_rng(size)
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (size, 16, 16, 3))
    twins = size // EVERY
    real = rng.permutation(len(pictures))[: size - twins]
    for row, number in enumerate(real):
        file[row] = _small(pictures[number])
    for row in range(len(real), size - twins):
        one, other = rng.integers(0, len(pictures), 2)
        blend = rng.uniform(0.2, 0.4)
        mixed = (1 - blend) * _crop(pictures[one], rng) + blend * _crop(pictures[other], rng)
        file[row] = np.clip(128 + (mixed - mixed.mean()) * 1.2 + rng.uniform(-40, 40), 0, 255)
    first = rng.choice(size - twins, twins, replace=False)
    second = np.arange(size - twins, size)
    for number, (model, row) in enumerate(zip(first, second, strict=True)):
        file[row] = _perturbed(file[model], rng)[:, :: -1 if number % 2 else 1]
    correlation = np.concatenate(
        [_correlation(file[first[at]], file[second[at]]) for at in np.array_split(np.arange(twins), twins // 4096 + 1)]
    )
    return first, second, correlation


def _small(picture: np.ndarray, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC, box=box))


def _crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = rng.uniform(0.5, 0.9) * BASE
    x, y = rng.uniform(0, BASE - side, 2)
    return _small(picture, (x, y, x + side, y + side))[:, :: rng.choice((-1, 1))].astype(np.float32)


def _perturbed(thumbnail: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values = thumbnail.astype(np.float32)
    shift = rng.uniform(0, 0.35)
    values = (1 - shift) * values + shift * np.roll(values, rng.choice((-1, 1)), rng.integers(2))
    values += rng.normal(0, rng.uniform(0, 0.2) * values.std(), values.shape)
    return np.clip(128 + (values - 128) * rng.uniform(0.8, 1.2) + rng.uniform(-15, 15), 0, 255).astype(np.uint8)


def _unit(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    values -= values.mean(1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The higher of the correlations with the other image and with its mirror image, float32 [P]."""
    sides = (np.einsum("nv,nv->n", _unit(first), _unit(side)) for side in (second, second[:, :, ::-1]))
    return np.maximum(*sides)


def _measure(path: Path) -> dict[str, float]:
    thumbnails, planted = np.load(path, mmap_mode="r"), np.load(path.with_suffix(".npz"))
    settings = DuplicateSettings()
    start, busy = time.perf_counter(), time.process_time()
    twins = find_near_duplicates(thumbnails, settings)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
    count = len(thumbnails)
    found = set((twins.first * count + twins.second).tolist())
    hit = np.array([int(code) in found for code in planted["first"] * count + planted["second"]])
    row = {
        "images": count,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(busy, 2),
        "peak_gb": round(peak, 2),
        "twins": len(twins),
    }
    proposed = sum(
        len(pairs) for pairs, _ in propose(thumbnails, np.arange(count), settings.threshold or 1, settings.mirrored)
    )
    row["proposed_per_image"] = round(proposed / count, 2)
    row["pairs_over_0.7"] = round(_alike(thumbnails), 6)
    for low, high in itertools.pairwise(BINS):
        at = (planted["correlation"] >= low) & (planted["correlation"] < high)
        row[f"recall_{low}"], row[f"planted_{low}"] = round(float(hit[at].mean()), 5), int(at.sum())
    return row


def _alike(thumbnails: np.ndarray) -> float:
    """The part of all pairs that correlate by more than 0.7: how hard a set is, by a sample."""
    sample = _unit(thumbnails[np.sort(np.random.default_rng(0).choice(len(thumbnails), 5000, replace=False))])
    return float((sample @ sample.T > 0.7).mean() - 1 / len(sample))


def _brute(thumbnails: np.ndarray) -> float:
    """Seconds for all correlations, plain and mirrored."""
    start = time.perf_counter()
    unit, mirrored = _unit(thumbnails), _unit(thumbnails[:, :, ::-1])
    for at in range(0, len(unit), 2000):
        for side in (unit[at:], mirrored[at:]):
            np.nonzero(unit[at : at + 2000] @ side.T >= DuplicateSettings.threshold)
    return time.perf_counter() - start


def _report(rows: list[dict[str, float]], brute: float) -> None:
    for row in rows:
        slow = brute * (row["images"] / rows[0]["images"]) ** 2
        print(
            f"{row['images']:>9,} images: {row['seconds']:.2f} s; brute force {slow:,.1f} s, "
            f"{slow / row['seconds']:.1f} x as long"
        )
    print(f"brute force was measured on {rows[0]['images']:,} images and extrapolated by the square")
    for small, large in itertools.pairwise(rows):
        exponent = np.log(large["seconds"] / small["seconds"]) / np.log(large["images"] / small["images"])
        print(f"{small['images']:,} to {large['images']:,} images: time grows as images ** {exponent:.2f}")


def _plot(rows: list[dict[str, float]], brute: float, path: Path) -> None:
    from matplotlib.figure import Figure

    images = np.array([row["images"] for row in rows])
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(images, brute * (images / images[0]) ** 2, "--", color="0.55", label="brute force, extrapolated")
    axes.loglog(images, [row["seconds"] for row in rows], "o-", color="tab:blue", label="find_twins")
    for row in rows:
        text = f"{row['seconds']:.3g} s\n{row['peak_gb']:.2g} GB"
        axes.annotate(
            text, (row["images"], row["seconds"]), xytext=(0, -8), textcoords="offset points", ha="center", va="top"
        )
    axes.set(
        xlabel="images",
        ylabel="seconds",
        title="Near-duplicates, plain and mirrored",
        ylim=(min(row["seconds"] for row in rows) / 8, None),
    )
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
