"""What augmenting a batch costs, as a share of ResNet-18's forward and backward over it: every recipe of
conf/augment, in turn.

python benchmarks/augment_cost.py [--rounds 5] [--sizes 64x64 32x224]   (batch x side in pixels)
Precision and memory layout are those that `train` chooses on this machine. The goal is under 0.25 on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
import torchvision
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from image_classifier.cli import hydra_app  # noqa: E402
from image_classifier.training.hardware import Hardware, SpeedSettings, choose_hardware  # noqa: E402

_CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["64x64", "32x224"])
    options = parser.parse_args()
    hardware = choose_hardware(SpeedSettings(accelerator="cpu"))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {hardware}")
    for size in options.sizes:
        count, side = map(int, size.split("x"))
        report(count, side, hardware, options.rounds)


def report(count: int, side: int, hardware: Hardware, rounds: int) -> None:
    """Time the network and each recipe once a round, and print medians and the median of the rounds' ratios."""
    layout = torch.channels_last if hardware.channels_last else torch.contiguous_format
    pixels = photographs(count, side).contiguous(memory_format=layout)
    targets = torch.arange(count) % _CLASSES
    step = network_step(pixels, targets, hardware, layout)
    recipes = {
        path.stem: recipe(path.stem, pixels, targets)
        for path in sorted((ROOT / "conf/augment").glob("*.yaml"))
        if path.stem != "none"
    }
    for warm in (step, *recipes.values()):
        warm(0)
    times: dict[str, list[float]] = {name: [] for name in ("network", *recipes)}
    for number in range(rounds):
        for name, action in {"network": step, **recipes}.items():
            repeats = 1 if name == "network" else 3
            start = time.perf_counter()
            for repeat in range(repeats):
                action(1 + repeats * number + repeat)
            times[name].append((time.perf_counter() - start) / repeats)
    print(
        f"batch {count}, {side} px: forward and backward of resnet18 {1e3 * statistics.median(times['network']):.0f} ms"
    )
    for name in recipes:
        ratio = statistics.median(own / network for own, network in zip(times[name], times["network"], strict=True))
        print(f"  {name:12} {1e3 * statistics.median(times[name]):7.1f} ms   ratio {ratio:.3f}")


def photographs(count: int, side: int) -> torch.Tensor:
    """Smooth noise, uint8 [N, 3, S, S]: as hard to compute on as photographs."""
    coarse = torch.rand(count, 3, max(2, side // 8), max(2, side // 8), generator=torch.Generator().manual_seed(0))
    return (255 * functional.interpolate(coarse, size=side, mode="bilinear")).to(torch.uint8)


def network_step(
    pixels: torch.Tensor, targets: torch.Tensor, hardware: Hardware, layout: torch.memory_format
) -> Callable[[int], None]:
    network = torchvision.models.resnet18(num_classes=_CLASSES).to(memory_format=layout)

    def step(_: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=hardware.precision == "bf16-mixed"):
            loss = functional.cross_entropy(network(pixels.float() / 255), targets)
        loss.backward()
        network.zero_grad()

    return step


def recipe(name: str, pixels: torch.Tensor, targets: torch.Tensor) -> Callable[[int], None]:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        augment = hydra_app.instantiate(hydra.compose("train", [f"augment={name}", "data.flip=true"]).augment)
    generator = torch.Generator()

    def act(seed: int) -> None:
        augment(pixels, targets, _CLASSES, generator.manual_seed(seed))

    return act


if __name__ == "__main__":
    main()
