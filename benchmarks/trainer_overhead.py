"""What Lightning and our callbacks cost: images/s of a run against a bare loop over the same tensors, same precision and layout.

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
from typing import Any

import hydra
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.dataset.pixel_cache import open_cache
from image_classifier.dataset.run import prepare_from
from image_classifier.training.builders import build_datamodule, build_module, build_trainer, speed_settings
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.callbacks.exact_resume import ExactResume
from image_classifier.training.callbacks.nan_guard import NanGuard
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.datamodule import ImageDataModule
from image_classifier.training.hardware import Hardware, choose_hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = hydra.compose("train", ["logger=none", f"run_dir={folder}", *overrides])
        manifest, data = prepare_from(config)
        cache = open_cache(manifest, data.preprocess, data.cache)
        pairs = [
            (_bare(config, manifest, data, cache), _lightning(config, manifest, data, cache, Path(folder)))
            for _ in range(options.rounds)
        ]
    ratios = [ours / bare for bare, ours in pairs]
    print(
        f"bare loop images/s {statistics.median(pair[0] for pair in pairs):.1f}, train images/s {statistics.median(pair[1] for pair in pairs):.1f}"
    )
    print(
        f"images/s, train / bare loop: median {statistics.median(ratios):.3f}, pair by pair {[round(ratio, 3) for ratio in ratios]}"
    )


def _parts(config: Any, manifest: Any, data: Any, cache: Any) -> tuple[Any, ImageDataModule, Hardware]:
    hardware = choose_hardware(speed_settings(config))
    return (
        build_module(config, manifest, data, cache, hardware),
        build_datamodule(config, manifest, data, cache, hardware),
        hardware,
    )


def _bare(config: Any, manifest: Any, data: Any, cache: Any) -> float:
    module, datamodule, hardware = _parts(config, manifest, data, cache)
    loader, step = datamodule.train_dataloader(), 0
    optimizer = module.make_optimizer(module.classifier.parameters())
    images, seconds, warmup = 0, 0.0, 3
    for epoch in range(config.trainer.max_epochs):
        loader.sampler.set_epoch(epoch)
        start = time.perf_counter()
        for pixels, targets in islice(loader, config.trainer.get("limit_train_batches")):
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


def _lightning(config: Any, manifest: Any, data: Any, cache: Any, folder: Path) -> float:
    module, datamodule, hardware = _parts(config, manifest, data, cache)
    throughput = Throughput()
    trainer = build_trainer(
        config,
        hardware,
        throughput,
        CSVMetrics(folder / "metrics.csv", throughput),
        ExactResume({}, False),
        NanGuard("stop", folder),
    )
    trainer.fit(module, datamodule=datamodule)
    return throughput.images_per_second


if __name__ == "__main__":
    main()
