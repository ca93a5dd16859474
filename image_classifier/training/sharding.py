"""Fully sharded training (Zhao et al., 2023): each device keeps a part of weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from image_classifier.modeling.classifier import Classifier
from image_classifier.training.distributed import world_size


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for torch's `fully_shard`, with checkpoints that hold the full network."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False)


def is_sharded(strategy: Strategy) -> bool:
    """Return whether each device holds only a part of the network."""
    return isinstance(strategy, ModelParallelStrategy)


def shard(classifier: Classifier, criterion: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights over the devices of `mesh`; while a block computes, its weights are gathered."""
    for block in _blocks(classifier.backbone):
        fully_shard(block, mesh=mesh)
    fully_shard(classifier, mesh=mesh)
    for method in ("embed", "classify"):  # training calls these, not forward
        register_fsdp_forward_method(classifier, method)
    if any(True for _ in criterion.parameters()):
        fully_shard(criterion, mesh=mesh)


def unsharded(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with each sharded tensor gathered, on every rank; all ranks must call this."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of a network's sequences that have weights, such as a ResNet's blocks."""
    for sequence in network.children():
        if isinstance(sequence, nn.Sequential | nn.ModuleList):
            yield from (block for block in sequence.children() if any(True for _ in block.parameters()))
