"""Convolutions that carry the batch normalisation behind them while it keeps its mean and variance.

It is then a factor and an addend for each channel. Applied to the weights they cost almost nothing; applied to the
pixels they read and write all of them twice.
"""

from __future__ import annotations

import torch
from torch import fx, nn


def fuse_norms(module: fx.GraphModule) -> fx.GraphModule:
    """Fuse each convolution of a graph with the batch normalisation that alone uses its output; return the same module.

    The layers stay those of the network: what is learned goes to their own parameters, and one whose normalisation is
    in training mode answers as before.
    """
    nodes = list(module.graph.nodes)
    calls = [node.target for node in nodes if node.op == "call_module"]
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = module.get_submodule(str(before.target)), module.get_submodule(str(node.target))
        # Subclasses compute something else; a layer that is called twice has two inputs.
        if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or not norm.track_running_stats:
            continue
        if calls.count(before.target) > 1 or calls.count(node.target) > 1:
            continue
        name = f"{str(before.target).replace('.', '_')}_with_norm"
        module.add_submodule(name, ConvWithNorm(conv, norm))
        with module.graph.inserting_before(before):
            fused = module.graph.call_module(name, before.args)
        node.replace_all_uses_with(fused)
        module.graph.erase_node(node)
        module.graph.erase_node(before)
    module.recompile()
    return module


class ConvWithNorm(nn.Module):
    """A convolution and the batch normalisation behind it: images [N, C, H, W] to [N, D, H, W]."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        conv, norm = self.conv, self.norm
        mean, variance = norm.running_mean, norm.running_var
        # Scaling many weights takes longer than scaling a few pixels. A GPU has one fast kernel for the normalisation.
        is_slower = conv.weight.numel() > images.numel() or images.device.type != "cpu"
        if norm.training or is_slower or mean is None or variance is None:
            normalised: torch.Tensor = norm(conv(images))
            return normalised
        # norm(conv(x)) = scale * (weight * x + bias - mean) + shift
        scale = torch.rsqrt(variance + norm.eps) * (1 if norm.weight is None else norm.weight)
        bias = -mean * scale if conv.bias is None else (conv.bias - mean) * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        answer: torch.Tensor = conv._conv_forward(images, conv.weight * scale.view(-1, 1, 1, 1), bias)
        return answer
