"""A training step above a cut, with kept statistics: batch normalisation by itself, and fused with its convolution.

python benchmarks/upper_layers.py [NETWORK:CUT ...] [--batch 32] [--size 224] [--rounds 15]

Networks are torchvision's, cuts are names of `finetune.cut`. Both ways take turns, in bfloat16 with the strided
depthwise convolutions in float32, with AdamW; the fastest round counts. One line each, in images a second.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import nn

from image_classifier.modeling.backbones import torchvision_backbone
from image_classifier.training.depthwise import depthwise_in_float32
from image_classifier.training.transfer import split_network

CUTS = ("mobilenet_v2:add_7", "resnet18:layer3_1_relu_1", "mobilenet_v3_large:add_7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cuts", nargs="*", default=CUTS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{'network and cut':<32}{'apart':>8}{'fused':>8}{'ratio':>7}")
    for word in options.cuts:
        name, _, cut_name = word.partition(":")
        backbone = torchvision_backbone(name).eval().to(memory_format=torch.channels_last)
        found = {cut.name: cut for cut in split_network.cuts(backbone, torch.rand(2, 3, options.size, options.size))}
        cut = found[cut_name]
        graph = split_network.traced(backbone, training=True)
        assert graph is not None
        apart, (_, fused) = split_network._above(graph, cut_name), split_network.split(backbone, cut)
        values = torch.rand(options.batch, *cut.shape).contiguous(memory_format=torch.channels_last).bfloat16()
        optimizer = torch.optim.AdamW(backbone.parameters(), 1e-6, fused=True)
        seconds = [math.inf, math.inf]
        for _ in range(1 + options.rounds):
            seconds = [
                min(old, _step(way, values, optimizer)) for old, way in zip(seconds, (apart, fused), strict=True)
            ]
        rates = [options.batch / value for value in seconds]
        print(f"{word:<32}{rates[0]:>8.0f}{rates[1]:>8.0f}{rates[1] / rates[0]:>7.2f}", flush=True)


def _step(upper: nn.Module, values: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16), depthwise_in_float32(values.device):
        loss = upper(values).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
