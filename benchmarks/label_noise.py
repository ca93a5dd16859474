"""How many planted wrong labels `suspects` finds: recall at the planted count and at twice that.

python benchmarks/label_noise.py FOLDER [--share 0.05] [--kind symmetric pairs] [--seeds 0 1] [--work DIR] -- OVERRIDES

FOLDER holds a folder a class. A share of its images, drawn by the seed, is linked into a wrong class in a copy of
links, of which `suspects` runs as a person would start it, with the overrides after `--`. Kinds: symmetric, any other
class; pairs, the class after the right one, so that each class is confused with one other, as people confuse them.
The images' own wrong labels, which nobody planted, count as misses.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("symmetric", "pairs")


def main() -> None:
    own, overrides = _divided(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, help="keep the trees and the trainings here, to go on after a stop")
    options = parser.parse_args(own)
    print("kind       seed  images  planted  listed  precision@1x  recall@1x  recall@2x  seconds", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kind:
            for seed in options.seeds:
                work = (options.work or Path(folder)).resolve() / f"{kind}-{seed}"
                _measure(options.folder.resolve(), work, kind, seed, options.share, overrides)


def _divided(words: list[str]) -> tuple[list[str], list[str]]:
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _measure(source: Path, work: Path, kind: str, seed: int, share: float, overrides: list[str]) -> None:
    """Plant, run `suspects` and print one row."""
    planted, total = plant(source, work / "images", kind, seed, share)
    start = time.perf_counter()
    line = [
        sys.executable,
        str(ROOT / "commands.py"),
        "suspects",
        "data=folder",
        f"data.dir={work / 'images'}",
        "logger=none",
        *overrides,
    ]
    done = subprocess.run(line, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{' '.join(line)} failed")
    seconds = time.perf_counter() - start
    found = re.search(r"^table +(.+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    with (work / found[1]).open(encoding="utf-8", newline="") as file:
        ranked = [row["path"] for row in csv.DictReader(file)]
    hits = [sum(path in planted for path in ranked[: factor * len(planted)]) for factor in (1, 2)]
    shares = (hits[0] / min(len(planted), max(1, len(ranked))), hits[0] / len(planted), hits[1] / len(planted))
    figures = "  ".join(f"{value:{width}.3f}" for value, width in zip(shares, (12, 9, 9), strict=True))
    print(
        f"{kind:<9}  {seed:4d}  {total:6d}  {len(planted):7d}  {len(ranked):6d}  {figures}  {seconds:7.0f}", flush=True
    )


def plant(source: Path, target: Path, kind: str, seed: int, share: float) -> tuple[set[str], int]:
    """Links to the images of `source` in `target`, a share of them in a wrong class; returns the paths of these and
    how many images there are.
    """
    classes = sorted(path.name for path in source.iterdir() if path.is_dir())
    images = [(label, path) for label in range(len(classes)) for path in sorted((source / classes[label]).iterdir())]
    random = np.random.default_rng(seed)
    wrong = set(random.choice(len(images), round(share * len(images)), replace=False).tolist())
    planted = set()
    for place, (label, path) in enumerate(images):
        step = 0 if place not in wrong else 1 if kind == "pairs" else int(random.integers(1, len(classes)))
        name = f"{classes[(label + step) % len(classes)]}/{label}-{path.name}"
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not (target / name).is_symlink():
            os.symlink(path, target / name)
        if step:
            planted.add(name)
    return planted, len(images)


if __name__ == "__main__":
    main()
