"""A training step on a processor: float32, bfloat16, and bfloat16 with some depthwise convolutions in float32.

python benchmarks/depthwise.py [NETWORK ...] [--batch 16] [--size 224] [--rounds 3]

Networks are timm's. The fastest round counts; one line each, in images a second.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext

import timm
import torch
from torch import nn

from image_classifier.training.depthwise import depthwise_in_float32

NETWORKS = ("mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "convnext_atto", "resnet18")
WAYS = {"float32": (False, False), "bfloat16": (True, False), "ours": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'network':<24}" + "".join(f"{way:>10}" for way in WAYS))
    for name in options.networks:
        network = timm.create_model(name).train().to(memory_format=torch.channels_last)
        pixels = torch.rand(options.batch, 3, options.size, options.size).contiguous(memory_format=torch.channels_last)
        seconds = dict.fromkeys(WAYS, math.inf)
        for _ in range(1 + options.rounds):  # the first warms up
            seconds = {way: min(seconds[way], _step(network, pixels, *WAYS[way])) for way in WAYS}
        print(f"{name:<24}" + "".join(f"{options.batch / seconds[way]:>10.1f}" for way in WAYS), flush=True)


def _step(network: nn.Module, pixels: torch.Tensor, half: bool, ours: bool) -> float:
    """Return the seconds of a forward and a backward pass."""
    start = time.perf_counter()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with autocast, depthwise_in_float32(pixels.device) if ours else nullcontext():
        loss = network(pixels).float().sum()
    loss.backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
