"""The two sides of a comparison, each a command of its own: a plain PyTorch loop, and `python commands.py train`.

PLAIN_LOOP.py DATA ARCH PX BATCH EPOCHS prints one JSON line with img_s (images per second) and acc (accuracy on the
test part).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TEST_SHARE = 5  # one file in so many


@dataclass(frozen=True)
class Run:
    """What one side reached: `seconds` are those of its whole command."""

    images_s: float
    accuracy: float
    seconds: float


def arguments(about: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A parser of PLAIN_LOOP.py, ARCHIVE, --arch and integers."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain_loop", type=Path)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--arch", default="resnet18")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def unpack(archive: Path, folder: Path) -> Path:
    """A folder with train/ and test/; where the archive has no such parts, every fifth file by name is the test
    part.
    """
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "all", filter="data")
    if (folder / "all" / "train").is_dir():
        return folder / "all"
    for number, path in enumerate(sorted(path for path in (folder / "all").rglob("*") if path.is_file())):
        place = folder / "parts" / ("train" if number % _TEST_SHARE else "test") / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / path.name)
    return folder / "parts"


def plain_loop(options: argparse.Namespace, data: Path) -> Run:
    """One run of the plain loop over the train/ and test/ folders in `data`."""
    text, seconds = _timed(
        [options.plain_loop.resolve(), data, options.arch, options.px, options.batch, options.epochs], ROOT
    )
    answer = json.loads(text.splitlines()[-1])
    return Run(answer["img_s"], answer["acc"], seconds)


def train(data: Path, folder: Path, overrides: list[str]) -> Run:
    """One run of `train` over the same folders, started in `folder`."""
    text, seconds = _timed([ROOT / "commands.py", "train", "data=folder", f"data.dir={data}", *overrides], folder)
    return Run(_number(text, "images/s"), _number(text, "test accuracy"), seconds)


def _number(text: str, name: str) -> float:
    return float(re.findall(rf"^{name} ([\d.]+)", text, re.MULTILINE)[-1])


def _timed(script: list[object], folder: Path) -> tuple[str, float]:
    """What a Python script printed and how many seconds it took; it ends this program where it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, script)], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{script} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout, time.perf_counter() - start
