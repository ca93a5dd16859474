"""Training speed against a plain PyTorch loop, run in turn.

python benchmarks/train_speed.py PLAIN_LOOP.py ARCHIVE [options]

PLAIN_LOOP.py DATA ARCH PX BATCH EPOCHS prints one JSON line with img_s and acc; ARCHIVE holds train/ and test/ folders.
Options: --arch resnet18 --px 64 --batch 64 --epochs 1 --rounds 3, and any override of `train` after them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain_loop", type=Path)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--arch", default="resnet18")
    for name, value in (("px", 64), ("batch", 64), ("epochs", 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(options.archive) as archive:
            archive.extractall(Path(folder) / "data", filter="data")
        results = [_round(options, Path(folder), number, overrides) for number in range(options.rounds)]
    for side, name in enumerate(("plain loop", "train")):
        speeds, scores = ([pair[side][key] for pair in results] for key in ("images_s", "accuracy"))
        print(f"{name:<11} images/s {statistics.median(speeds):7.1f} (each {speeds})   test accuracy {statistics.median(scores):.4f} (each {scores})")
    ratios = [ours["images_s"] / plain["images_s"] for plain, ours in results]
    print(f"images/s, train / plain loop: median {statistics.median(ratios):.2f}, pair by pair {[round(ratio, 2) for ratio in ratios]}")


def _round(options: argparse.Namespace, folder: Path, number: int, overrides: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    plain = _plain(options, folder)
    print(f"round {number + 1}: plain loop {plain}", flush=True)
    ours = _ours(options, folder, number, overrides)
    print(f"round {number + 1}: train      {ours}", flush=True)
    return plain, ours


def _plain(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    command = [sys.executable, options.plain_loop, folder / "data", options.arch, options.px, options.batch, options.epochs]
    answer = json.loads(_run(command).splitlines()[-1])
    return {"images_s": answer["img_s"], "accuracy": answer["acc"]}


def _ours(options: argparse.Namespace, folder: Path, number: int, overrides: list[str]) -> dict[str, float]:
    command = [sys.executable, ROOT / "commands.py", "train", "data=folder", f"data.dir={folder}/data", f"data.cache.dir={folder}/cache"]
    command += [f"data.manifest_path={folder}/manifest.csv", f"model={options.arch}", f"data.image_size={options.px}"]
    command += [f"data.batch_size={options.batch}", f"trainer.max_epochs={options.epochs}", "logger=none", f"name=bench{number}"]
    command += [f"{key}_dir={folder}/{key}" for key in ("runs", "models", "plots")]
    text = _run([*command, *overrides])
    return {"images_s": _number(text, "images/s"), "accuracy": _number(text, "test accuracy")}


def _number(text: str, name: str) -> float:
    found = re.findall(rf"^{name} ([\d.]+)$", text, re.MULTILINE)
    return float(found[-1])


def _run(command: list[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
