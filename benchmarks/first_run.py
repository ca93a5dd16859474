"""The first command on photographs of one's own against what a user would write: accuracy and seconds, in turn.

python benchmarks/first_run.py FINETUNE.py WEIGHTS.pth FOLDER[:PX] ... [--seeds 3] [--ours quick,normal]
    [--peers "probe 0,frozen 3,full 3"] [--test 0.2]

FINETUNE.py DATA WEIGHTS.pth MODE EPOCHS PX trains MobileNetV2 plainly on DATA/train, and prints a JSON line with `acc`
on DATA/test and `wall_s`. Each FOLDER holds one folder a class, or train/ and test/ of such. With each seed the images
are split anew into train and test, stratified by class; both sides get the same split, from start-up to bundle, with
empty caches. PX is the peers' image size (224). One line of JSON a run, then a table of means.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

COMMANDS = Path(__file__).resolve().parents[1] / "commands.py"
IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ours", default="quick,normal")
    parser.add_argument("--peers", default="probe 0,frozen 3,full 3")
    parser.add_argument("--test", type=float, default=0.2)
    parser.add_argument("--max", type=int, default=10**9, help="images of a class")
    options = parser.parse_args()
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for seed in range(options.seeds):
        for word in options.folders:
            folder, _, px = word.partition(":")
            for name, result in _runs(options, Path(folder), px or "224", seed):
                rows[Path(folder).name, name].append(result)
                print(json.dumps({"set": Path(folder).name, "run": name, "seed": seed, **result}), flush=True)
    print(f"\n{'set':<18}{'run':<12}{'accuracy':>9}{'seconds':>9}{'MB':>7}  seeds")
    for (data, name), results in rows.items():
        values = [mean(row[key] for row in results) for key in ("accuracy", "seconds", "peak_mb")]
        print(f"{data:<18}{name:<12}{values[0]:>9.4f}{values[1]:>9.1f}{values[2]:>7.0f}  {len(results)}")


def _runs(options: argparse.Namespace, folder: Path, px: str, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and the result of each run on one split, peers and ours in turn."""
    peers = [peer for peer in options.peers.split(",") if peer]
    ours = [effort for effort in options.ours.split(",") if effort]
    for number in range(max(len(peers), len(ours))):
        with tempfile.TemporaryDirectory() as directory:
            data = Path(directory) / folder.name
            _split(folder, data, seed, options.test, options.max)
            if number < len(peers):
                mode, _, epochs = peers[number].partition(" ")
                line = [options.script, data, options.weights, mode, epochs, px]
                output, seconds, peak = _timed([sys.executable, *map(str, line)], directory)
                accuracy = json.loads(output.splitlines()[-1])["acc"]
                yield f"{mode} {epochs}", {"accuracy": accuracy, "seconds": seconds, "peak_mb": peak}
            if number < len(ours):
                words = ["train", str(data), f"model.weights={options.weights.resolve()}", f"effort={ours[number]}"]
                line = [COMMANDS, *words, "name=run", f"seed={seed}"]
                output, seconds, peak = _timed([sys.executable, *map(str, line)], directory)
                found = re.search(r"^test accuracy ([\d.]+)", output, re.MULTILINE)
                assert found is not None, output
                yield ours[number], {"accuracy": float(found.group(1)), "seconds": seconds, "peak_mb": peak}


def _split(folder: Path, target: Path, seed: int, share: float, most: int) -> None:
    """Link the images of a folder to train/ and test/, a share of each class for the test."""
    by_class: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGES:
            by_class[path.parent.name].append(path)
    for label, paths in by_class.items():
        random.Random(seed).shuffle(paths)
        paths = paths[:most]
        for number, path in enumerate(paths):
            to = target / ("test" if number < share * len(paths) else "train") / label / f"{number}{path.suffix}"
            to.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, to)


def _timed(line: list[str], directory: str) -> tuple[str, float, float]:
    """Return the output, the seconds and the peak memory in MB of a command."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(line, cwd=directory, stdout=output, stderr=subprocess.STDOUT, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"{' '.join(line)} failed:\n{text[-3000:]}")
    return text, seconds, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
