"""What Lightning and our callbacks cost: images/s of a run against a bare loop over the same tensors, same precision
and layout.

python benchmarks/trainer_overhead.py [--rounds 3] [overrides of train, such as data=simpsons_mnist model=resnet18]
Both sides use the same network, batch size, augmentation, optimizer and cached pixels, in one process, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.cli.train_config import compose_train_config  # noqa: E402
from image_classifier.dataset.pixel_cache import open_cache  # noqa: E402
from image_classifier.dataset.run import prepare_dataset  # noqa: E402
from image_classifier.training.builders import (  # noqa: E402
    TrainingInputs,
    build_datamodule,
    build_module,
    build_trainer,
)
from image_classifier.training.callbacks.csv_metrics import CSVMetrics  # noqa: E402
from image_classifier.training.callbacks.exact_resume import ExactResume  # noqa: E402
from image_classifier.training.callbacks.nan_guard import NanGuard  # noqa: E402
from image_classifier.training.callbacks.throughput import Throughput  # noqa: E402
from image_classifier.training.hardware import choose_hardware  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = compose_train_config(["logger=none", f"run_dir={folder}", *overrides])
        manifest, _ = prepare_dataset(config.data, config.audit)
        cache = open_cache(manifest, config.data.preprocess, config.data.cache)
        inputs = TrainingInputs(config, manifest, cache, choose_hardware(config.trainer.speed))
        pairs = [(_bare(inputs), _lightning(inputs, Path(folder))) for _ in range(options.rounds)]
    ratios = [ours / bare for bare, ours in pairs]
    print(
        f"bare loop images/s {statistics.median(pair[0] for pair in pairs):.1f}, train images/s "
        f"{statistics.median(pair[1] for pair in pairs):.1f}"
    )
    print(
        f"images/s, train / bare loop: median {statistics.median(ratios):.3f}, pair by pair "
        f"{[round(ratio, 3) for ratio in ratios]}"
    )


def _bare(inputs: TrainingInputs) -> float:
    module, datamodule = build_module(inputs), build_datamodule(inputs)
    config, hardware = inputs.config, inputs.hardware
    loader, step = datamodule.train_dataloader(), 0
    optimizer = module.make_optimizer(module.classifier.parameters())
    images, seconds, warmup = 0, 0.0, 3
    for epoch in range(config.trainer.max_epochs or 1):
        loader.sampler.set_epoch(epoch)
        start = time.perf_counter()
        for pixels, targets in islice(loader, config.trainer.node.get("limit_train_batches")):
            step += 1
            pixels, targets = datamodule.augmented((pixels, targets), step)
            with torch.autocast("cpu", torch.bfloat16, enabled=hardware.precision == "bf16-mixed"):
                loss = module.criterion(module.classifier(pixels), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            now = time.perf_counter()
            if warmup > 0:
                warmup -= 1
            else:
                images, seconds = images + len(targets), seconds + now - start
            start = now
    return images / seconds


def _lightning(inputs: TrainingInputs, folder: Path) -> float:
    module, datamodule = build_module(inputs), build_datamodule(inputs)
    throughput = Throughput()
    trainer = build_trainer(
        inputs.config,
        inputs.hardware,
        throughput,
        CSVMetrics(folder / "metrics.csv", throughput),
        ExactResume({}, False),
        NanGuard("stop", folder),
    )
    trainer.fit(module, datamodule=datamodule)
    return throughput.images_per_second


if __name__ == "__main__":
    main()
