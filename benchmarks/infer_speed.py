"""Inference from the command line, backends in turn.

python benchmarks/infer_speed.py BUNDLE IMAGES_DIR [--count 10000] [--rounds 3]

Cold start to the answer for one image, and `count` images from start to end with each backend, run in turn; answers
are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    paths = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    paths = (paths * (options.count // len(paths) + 1))[: options.count]
    cold = [_timed(options.bundle, "onnx", paths[:1])[0] for _ in range(2 * options.rounds + 1)][1:]
    print(f"one image, cold start to answer: median {statistics.median(cold):.2f} s, worst {max(cold):.2f} s")
    times: dict[str, list[float]] = {"onnx": [], "checkpoint": []}
    answers: dict[str, list[dict[str, object]]] = {}
    for _ in range(options.rounds):
        for backend in times:
            seconds, answers[backend] = _timed(options.bundle, backend, paths)
            times[backend].append(seconds)
    for backend, seconds in times.items():
        print(
            f"{len(paths)} images, {backend}: median {statistics.median(seconds):.2f} s, each "
            f"{[round(value, 2) for value in seconds]}"
        )
    ratios = [slow / fast for fast, slow in zip(times["onnx"], times["checkpoint"], strict=True)]
    print(f"checkpoint / onnx: median {statistics.median(ratios):.2f}")
    pairs = list(zip(answers["onnx"], answers["checkpoint"], strict=True))
    same = sum(a["predicted_class"] == b["predicted_class"] for a, b in pairs)
    apart = max(abs(float(str(a["confidence"])) - float(str(b["confidence"]))) for a, b in pairs)
    print(f"same class on {same} of {len(pairs)}; largest difference of a confidence {apart:.1e}")


def _timed(bundle: str, backend: str, paths: list[Path]) -> tuple[float, list[dict[str, object]]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.jsonl"
        command = [sys.executable, ROOT / "commands.py", "infer", "--checkpoint_name", bundle, "--backend", backend]
        start = time.perf_counter()
        subprocess.run(
            [*map(str, command), "--format", "jsonl", "--output", str(output), "--images", "-"],
            input="\n".join(map(str, paths)),
            text=True,
            check=True,
        )
        return time.perf_counter() - start, [json.loads(line) for line in output.read_text().splitlines()]


if __name__ == "__main__":
    main()
