"""How near `infer` comes to the slower of its two halves, decoding and the network, and how far it is from a plain
loop; and its memory.

python benchmarks/infer_throughput.py IMAGES_DIR [--bundle BUNDLE] [--count 512] [--rounds 3] [--backend onnx]
[--memory 1000 20000]

All sides run in turn in this process over the same images: decoding alone (the predictor's own workers), the backend
alone (pixels in memory), both together as `infer` does it, and the loop that everybody writes: open, convert, resize,
run, one image at a time. Without --bundle it takes an untrained resnet18 at 224 pixels. Peak memory is that of
`infer` as a command, over a list that repeats the images.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.images import Preprocess  # noqa: E402
from image_classifier.inference.load import load_predictor  # noqa: E402
from image_classifier.inference.predictor import Predictor  # noqa: E402

# Runs commands.py and says on the last line of stderr how much memory it took at most, in MiB.
PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--memory", type=int, nargs="*", default=[1000, 20_000])
    options = parser.parse_args()
    found = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    with tempfile.TemporaryDirectory() as folder:
        model = options.bundle or _untrained(Path(folder) / "resnet18.onnx")
        predictor = load_predictor(model, options.backend if options.bundle else None)
        paths = (found * (options.count // len(found) + 1))[: options.count]
        print(
            f"{len(found)} files, {statistics.median(path.stat().st_size for path in found) / 1e3:.0f} kB "
            f"each; backend {predictor.backend_name}"
        )
        _speed(predictor, paths, options.rounds, model)
        for count in options.memory:
            print(f"{count} images: at most {_peak(model, predictor.backend_name, found, count):.0f} MiB", flush=True)


def _speed(predictor: Predictor, paths: list[Path], rounds: int, model: Path) -> None:
    pixels = [predictor.preprocess.read(path) for path in paths[: predictor.batch_size]]
    sides: dict[str, Callable[[], object]] = {
        "decode alone": lambda: _decode(predictor, paths),
        "backend alone": lambda: [predictor.logits_and_scores(pixels) for _ in range(len(paths) // len(pixels))],
        "infer": lambda: sum(1 for _ in predictor.predict(paths)),
        "plain loop": lambda: _plain(
            model / "model.onnx" if model.is_dir() else model, predictor.preprocess.size, paths
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            speeds[name].append(len(paths) / (time.perf_counter() - start))
    for name, each in speeds.items():
        print(f"{name:<14} median {statistics.median(each):.1f} images/s, each {[round(speed, 1) for speed in each]}")
    halves = list(zip(speeds["decode alone"], speeds["backend alone"], strict=True))
    slower = [speed / min(pair) for speed, pair in zip(speeds["infer"], halves, strict=True)]
    shared = [
        speed * (1 / decode + 1 / backend) for speed, (decode, backend) in zip(speeds["infer"], halves, strict=True)
    ]
    plain = [speed / loop for speed, loop in zip(speeds["infer"], speeds["plain loop"], strict=True)]
    print(f"infer / slower of the two: {statistics.median(slower):.2f}")
    print(f"infer / what the cores allow where both halves use all of them: {statistics.median(shared):.2f}")
    print(f"infer / plain loop: {statistics.median(plain):.2f}", flush=True)


def _decode(predictor: Predictor, paths: list[Path]) -> None:
    with ThreadPoolExecutor(predictor.workers) as pool:
        for _ in pool.map(predictor.preprocess.read, paths):
            pass


def _plain(model: Path, size: int, paths: list[Path]) -> None:
    """What everybody writes: no threads of its own, no batches, the whole picture decoded."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        session.run(["logits"], {"pixels": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])})


def _peak(model: Path, backend: str, found: list[Path], count: int) -> float:
    lines = "".join(f"{found[number % len(found)]}\n" for number in range(count))
    command = [
        sys.executable,
        "-c",
        PEAK,
        str(ROOT / "commands.py"),
        "infer",
        "--checkpoint_name",
        str(model),
        "--backend",
        backend,
    ]
    with tempfile.TemporaryDirectory() as folder:
        line = [*command, "--format", "jsonl", "--images", "-", "--output", str(Path(folder) / "answers.jsonl")]
        done = subprocess.run(line, input=lines, text=True, capture_output=True, check=True)
    return float(done.stderr.splitlines()[-1])


def _untrained(path: Path) -> Path:
    """resnet18 at 224 pixels with random weights, which is as fast as a trained one."""
    import torch
    from torchvision.models import resnet18

    from image_classifier.exporting.onnx import export_onnx
    from image_classifier.modeling.classifier import build_classifier

    torch.manual_seed(0)
    network = resnet18()
    network.fc = torch.nn.Identity()
    preprocess = Preprocess(224, scaled_decoding=True).as_dict()
    classifier = build_classifier(network, 5, 224, [0.5] * 3, [0.2] * 3)
    export_onnx(classifier, 224, {"classes": list("abcde"), "preprocess": preprocess}, path)
    return path


if __name__ == "__main__":
    main()
