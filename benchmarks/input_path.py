"""The input path against ImageFolder + DataLoader with two workers on native-size photographs, and its memory by rows.

python benchmarks/input_path.py FOLDER [--size 64] [--batch 32] [--rounds 3] [--rows 10000 1000000]
FOLDER has one sub-folder per class. Printed are ratios of sides run in turn in one process:
  first pass    images/s from files to a filled pixel cache / images/s of ImageFolder's first epoch (both with a warm
                page cache)
  later epochs  images/s of batches from the cache / images/s of ImageFolder's epochs
  waiting       share of a ResNet-18 training's time spent waiting for the next batch
  memory        resident memory of the input path over a manifest of so many rows, each in a process of its own
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.dataset.audit.checks import AuditSettings  # noqa: E402
from image_classifier.dataset.pixel_cache import CacheSettings, PixelCache, open_cache  # noqa: E402
from image_classifier.dataset.prepare import prepare  # noqa: E402
from image_classifier.dataset.settings import DataSettings  # noqa: E402
from image_classifier.images import Preprocess  # noqa: E402
from image_classifier.manifest import Manifest, Record  # noqa: E402
from image_classifier.training.datamodule import ImageDataModule  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, value in (("size", 64), ("batch", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(_memory(options.memory_of, options.size, options.batch))
        return
    _speed(options)
    for rows in options.rows:
        command = [
            sys.executable,
            __file__,
            options.folder,
            "--memory-of",
            str(rows),
            "--size",
            "32",
            "--batch",
            str(options.batch),
        ]
        print(
            f"memory over {rows:9,} rows: "
            f"{subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}",
            flush=True,
        )


def _speed(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        settings = DataSettings(
            image_size=options.size, manifest_path=f"{scratch}/m.csv", cache=CacheSettings(f"{scratch}/cache")
        )
        start = time.perf_counter()
        manifest, _ = prepare([options.folder], settings, AuditSettings(output_dir=scratch))
        print(
            f"scan, hash and audit of {len(manifest)} images: "
            f"{len(manifest) / (time.perf_counter() - start):.0f} images/s"
        )
        first, later, plain_first, plain_later = [], [], [], []
        for number in range(options.rounds):
            cache_settings = CacheSettings(f"{scratch}/cache{number}")
            first.append(_rate(len(manifest), lambda s=cache_settings: open_cache(manifest, settings.preprocess, s)))
            cache = open_cache(manifest, settings.preprocess, cache_settings)
            module = _module(cache, manifest, options.batch)
            later.append(_rate(len(module.rows["train"]), lambda m=module: _drain(m.train_dataloader())))
            loader = _plain(options)
            plain_first.append(_rate(len(manifest), lambda b=loader: _drain(b)))
            plain_later.append(_rate(len(manifest), lambda b=loader: _drain(b)))
        _print("first pass", first, plain_first)
        _print("later epochs", later, plain_later)
        print(f"waiting for data: {100 * _waiting(module):.2f} % of a ResNet-18 epoch")


def _print(name: str, ours: list[float], plain: list[float]) -> None:
    ratios = [mine / theirs for mine, theirs in zip(ours, plain, strict=True)]
    rates = f"{statistics.median(ours):.0f} / {statistics.median(plain):.0f} images/s"
    print(
        f"{name:<13} median ratio {statistics.median(ratios):.2f} ({rates}), pair by pair "
        f"{[round(ratio, 2) for ratio in ratios]}",
        flush=True,
    )


def _rate(count: int, action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return count / (time.perf_counter() - start)


def _drain(loader: DataLoader) -> None:
    for _ in loader:
        pass


def _plain(options: argparse.Namespace) -> DataLoader:
    steps = [transforms.Resize(options.size), transforms.CenterCrop(options.size), transforms.ToTensor()]
    images = ImageFolder(str(options.folder), transforms.Compose(steps))
    return DataLoader(images, options.batch, shuffle=True, num_workers=2, persistent_workers=True)


def _module(cache: PixelCache, manifest: Manifest, batch: int) -> ImageDataModule:
    return ImageDataModule(cache, manifest, batch, augment=None, seed=0, channels_last=True, balanced=False)


def _waiting(module: ImageDataModule) -> float:
    network = resnet18(num_classes=1000).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    waited = 0.0
    begin = start = time.perf_counter()
    for pixels, targets in module.train_dataloader():
        waited += time.perf_counter() - start
        loss = functional.cross_entropy(network(pixels.float() / 255), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        start = time.perf_counter()
    return waited / (time.perf_counter() - begin)


def _memory(rows: int, size: int, batch: int) -> str:
    """Resident memory before and after: manifest read from its file, cache opened, 200 batches drawn over all rows.

    The pixels are those of a sparse file: mapped pages are the kernel's to drop, so anonymous memory is what is
    reported.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _write_rows(Path(scratch), rows, size)
        before = _anonymous()
        manifest = Manifest.read(Path(scratch) / "manifest.csv", Path(scratch))
        cache = open_cache(manifest, Preprocess(size), CacheSettings(f"{scratch}/cache"))
        module = _module(cache, manifest, batch)
        for number, _ in enumerate(module.train_dataloader()):
            if number == 200:
                break
        after, peak = _anonymous(), int(_status("VmHWM")) / 1024
    return f"{before:.0f} MB before, {after:.0f} MB after ({after - before:+.0f} MB), highest resident {peak:.0f} MB"


def _write_rows(folder: Path, rows: int, size: int) -> None:
    """Write a manifest of so many rows and its pixel cache, in another process, whose memory is not counted."""
    imports = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from benchmarks.input_path import write_rows"
    code = f"{imports}; write_rows({str(folder)!r}, {rows}, {size})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def write_rows(folder: str, rows: int, size: int) -> None:
    """The files that `_memory` reads."""
    from image_classifier.dataset.pixel_cache import pixels_key

    digests = np.random.default_rng(0).integers(0, 256, (rows, 32), dtype=np.uint8)
    names = (digest.tobytes().hex() for digest in digests)
    labels = [f"class_{row % 100:03d}" for row in range(rows)]
    records = (
        Record(f"train/{labels[row]}/image_{row:07d}.jpg", labels[row], "train", name[:16], name, 500, 400)
        for row, name in enumerate(names)
    )
    Manifest.of(Path(folder), records).write(Path(folder) / "manifest.csv")
    store = Path(folder) / "cache" / pixels_key(Preprocess(size))
    store.mkdir(parents=True)
    (store / "index.u8").write_bytes(digests.tobytes())
    with (store / "pixels.u8").open("wb") as file:
        os.truncate(file.fileno(), rows * size * size * 3)


def _anonymous() -> float:
    """Anonymous resident memory of this process, MB."""
    return int(_status("RssAnon")) / 1024


def _status(key: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
