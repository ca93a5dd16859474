"""A teacher and a student that is several times faster: latency, accuracy, and what distillation adds.

python benchmarks/distillation.py FOLDER WEIGHTS [--px 224 112] [--epochs 8 16] [--work DIR] [-- overrides of students]

FOLDER holds train/ and test/ with a folder a class, WEIGHTS are torchvision's of MobileNet-V2. The teacher is a
MobileNet-V2 with frozen backbone at the first size. The student is the same network at the second size, all of its
layers trained, with the teacher and, for comparison, without. Latencies are of ONNX Runtime for one image, teacher and
student in turn, so that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.evaluation.compare import compare  # noqa: E402
from image_classifier.inference.latency import timed  # noqa: E402
from image_classifier.inference.load import load_predictor  # noqa: E402
from image_classifier.predictions import PredictionTable  # noqa: E402

_ROUNDS, _CALLS = 15, 20


def main() -> None:
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--px", nargs=2, type=int, default=[224, 112])
    parser.add_argument("--epochs", nargs=2, type=int, default=[8, 16])
    parser.add_argument("--work", type=Path, help="keep the models here; a model that is there is not trained again")
    options, overrides = parser.parse_args(sys.argv[1:place]), sys.argv[place + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        shared = [
            f"data.dir={options.folder.resolve()}",
            "model=torchvision",
            "model.backbone.name=mobilenet_v2",
            f"model.weights={options.weights.resolve()}",
        ]
        sizes, epochs = options.px, options.epochs
        frozen = ["model.freeze=backbone", "optimizer.lr=3e-3"]
        student = ["optimizer.lr=3e-4", *overrides]
        train(work, "teacher", sizes[0], epochs[0], [*shared, *frozen])
        train(work, "student", sizes[1], epochs[1], [*shared, *student, "model.teacher=teacher"])
        report_latency(work)
        report_accuracy(work, "student")
        train(work, "alone", sizes[1], epochs[1], [*shared, *student])
        report_accuracy(work, "alone")


def train(work: Path, name: str, size: int, epochs: int, overrides: list[str]) -> None:
    """Train one model, unless it is there."""
    if (work / "models" / name / "bundle.json").is_file():
        return
    line = [f"name={name}", "overwrite=true", f"data.image_size={size}", f"trainer.max_epochs={epochs}", *overrides]
    quick = ["data=folder", "data.batch_size=32", "logger=none", "plots.figures=false", "diagnostics=none"]
    quick.append("trainer.compile=false")  # its trial takes longer than it saves here
    done = subprocess.run(
        [sys.executable, str(ROOT / "commands.py"), "train", *quick, *line],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stderr}\n{name}: train ended with {done.returncode}")


def report_latency(work: Path) -> None:
    """Print the median latencies, measured in turn, and their ratio with the middle 80 % of the rounds."""
    predictors = [load_predictor(work / "models" / name, "onnx") for name in ("teacher", "student")]
    rounds = np.empty((_ROUNDS, 2))
    for row in rounds:
        for column, predictor in enumerate(predictors):
            size = predictor.preprocess.size
            pixels = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
            seconds = timed(lambda net=predictor.backend, x=pixels: net.logits(x), _CALLS, _CALLS)
            row[column] = 1000 * np.median(seconds)
    ratios = rounds[:, 0] / rounds[:, 1]
    teacher, student = np.median(rounds, axis=0)
    low, high = np.percentile(ratios, (10, 90))
    print(
        f"latency    teacher {teacher:.2f} ms, student {student:.2f} ms, "
        f"ratio {np.median(ratios):.2f} ({low:.2f} to {high:.2f})",
        flush=True,
    )


def report_accuracy(work: Path, name: str) -> None:
    """Print the test accuracy of the teacher and of another model, and the difference with its interval."""
    tables = [PredictionTable.read(work / "plots" / run / "test") for run in ("teacher", name)]
    paired = compare(*tables).paired["accuracy"]
    low, high = (100 * bound for bound in paired.interval)
    teacher, other = paired.values
    print(
        f"{name:<9}  accuracy {other:.4f}, teacher {teacher:.4f}, "
        f"{100 * paired.difference:+.1f} points ({low:+.1f} to {high:+.1f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
