"""Time to accuracy, whole command from start-up to bundle, against a plain PyTorch loop run just before it.

python benchmarks/time_to_accuracy.py PLAIN_LOOP.py ARCHIVE [options] [overrides of `train`]

PLAIN_LOOP.py DATA ARCH PX BATCH EPOCHS prints one JSON line with acc and wall_s; ARCHIVE holds train/ and test/ folders.
Options: --arch resnet18 --px 64 --batch 64 --epochs 10; --plain ACCURACY,SECONDS takes the plain side from an earlier run on this machine.
Every override list after `--` is one of our runs: -- experiment=fast trainer.max_epochs=2 -- experiment=fast trainer.max_epochs=12
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    ours = [list(words) for is_mark, words in groupby(sys.argv[1:], lambda word: word == "--") if not is_mark]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain_loop", type=Path)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--plain", default="")
    for name, value in (("px", 64), ("batch", 64), ("epochs", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(ours.pop(0))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with tarfile.open(options.archive) as archive:
            archive.extractall(data, filter="data")
        accuracy, seconds = [float(part) for part in options.plain.split(",")] if options.plain else _plain(options, data)
        print(f"plain loop: test accuracy {accuracy:.4f} in {seconds:.0f} s", flush=True)
        for number, overrides in enumerate(ours or [["experiment=fast"]]):
            found, wall_s = _train(Path(folder), data, number, overrides)
            share = f"{seconds / wall_s:.1f} times as fast as the plain loop's run"
            print(f"train {' '.join(overrides)}: test accuracy {found:.4f} in {wall_s:.1f} s, {share}", flush=True)


def _plain(options: argparse.Namespace, data: Path) -> tuple[float, float]:
    command = [sys.executable, options.plain_loop, data, options.arch, options.px, options.batch, options.epochs]
    start = time.perf_counter()
    answer = json.loads(_run(command, ROOT).splitlines()[-1])
    return answer["acc"], time.perf_counter() - start


def _train(folder: Path, data: Path, number: int, overrides: list[str]) -> tuple[float, float]:
    """Test accuracy and wall seconds of one run in an empty folder: nothing is cached from an earlier one."""
    fresh = folder / f"run{number}"
    fresh.mkdir()
    start = time.perf_counter()
    text = _run([sys.executable, ROOT / "commands.py", "train", "data=folder", f"data.dir={data}", "name=run", *overrides], fresh)
    wall_s = time.perf_counter() - start
    return float(re.findall(r"^test accuracy ([\d.]+)", text, re.MULTILINE)[-1]), wall_s


def _run(command: list[object], folder: Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
