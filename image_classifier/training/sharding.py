"""Fully sharded training (Zhao et al., 2023): each device keeps its part of the weights, of their gradients and of the optimizer's state."""

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
    """Lightning's strategy for torch's `fully_shard`, with checkpoints that hold the whole network, as everywhere."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False)


def is_sharded(strategy: Strategy) -> bool:
    """Whether each device holds only a part of the network."""
    return isinstance(strategy, ModelParallelStrategy)


def shard(classifier: Classifier, criterion: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights over the devices of `mesh`; those of one block at a time are brought together, where they are used."""
    for block in _blocks(classifier.backbone):
        fully_shard(block, mesh=mesh)
    fully_shard(classifier, mesh=mesh)
    for method in ("embed", "classify"):  # training calls them by their names
        register_fsdp_forward_method(classifier, method)
    if any(True for _ in criterion.parameters()):
        fully_shard(criterion, mesh=mesh)


def unsharded(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with each sharded tensor brought together, on every rank; all ranks must ask."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The members of a network's sequences, such as a ResNet's blocks or a transformer's layers, that have weights."""
    for part in network.children():
        if isinstance(part, nn.Sequential | nn.ModuleList):
            yield from (block for block in part.children() if any(True for _ in block.parameters()))
