"""What one training step costs on a fixed batch, and what might make it cheaper: variants of a bare loop, in turn.

python benchmarks/bare_step.py [--arch resnet18 --px 64 --batch 64 --rounds 5 --steps 8] [--profile]

Printed are images/s and the median of the rounds' ratios to bfloat16 autocast with channels last, which `train`
chooses where it pays.
--profile lists the operations that take most of that step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], None]
CHOSEN = "bfloat16 autocast, channels last"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    for name, value in (("px", 64), ("batch", 64), ("rounds", 5), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    variants = {
        "float32, channels first": _step(options, autocast=False, channels_last=False),
        "float32, channels last": _step(options, autocast=False),
        "bfloat16 autocast, channels first": _step(options, channels_last=False),
        CHOSEN: _step(options),
        "the same, optimizer not fused": _step(options, fused=False),
        "the same, gradients kept and zeroed": _step(options, set_to_none=False),
        "the same, weights in bfloat16": _step(options, autocast=False, weights=torch.bfloat16),
        "the same, compiled": _step(options, compiled=True),
    }
    for step in variants.values():
        step()
        step()
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, step in variants.items():
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            speeds[name].append(options.steps * options.batch / (time.perf_counter() - start))
    for name, found in speeds.items():
        ratio = statistics.median(own / chosen for own, chosen in zip(found, speeds[CHOSEN], strict=True))
        print(f"{name:<36} {statistics.median(found):7.1f} images/s   ratio {ratio:.2f}")
    if options.profile:
        _profile(variants[CHOSEN])


def _step(
    options: argparse.Namespace,
    autocast: bool = True,
    channels_last: bool = True,
    fused: bool = True,
    set_to_none: bool = True,
    weights: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Step:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = torchvision.models.get_model(options.arch, num_classes=10).to(memory_format=layout, dtype=weights)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=fused)
    if compiled:
        network.compile()
    pixels = torch.randint(0, 256, (options.batch, 3, options.px, options.px), dtype=torch.uint8).contiguous(
        memory_format=layout
    )
    targets = torch.randint(0, 10, (options.batch,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = functional.cross_entropy(network((pixels.float() / 255).to(weights)).float(), targets)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        optimizer.step()

    return step


def _profile(step: Step) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        for _ in range(3):
            step()
    print(measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=50))


if __name__ == "__main__":
    main()
