"""Attention and the spread of a norm held constant: a transformer's logit is then shared out among its tokens by gradient times activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DetachedAttention(TorchFunctionMode):
    """A context in which no gradient flows through attention's weights or a norm's spread (Ali et al., 2022, 'XAI for Transformers').

    The answers stay the same. What is called inside is replaced, not the network's modules, so attention may be fused, explicit or windowed.
    """

    def __torch_function__(
        self, function: Callable, types: Any, arguments: Sequence = (), options: dict | None = None
    ) -> Any:
        return _HELD.get(function, function)(*arguments, **(options or {}))


def _attention(function: Callable) -> Callable:
    def held(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        return function(query.detach(), key.detach(), *rest, **options)

    return held


def _softmax(function: Callable) -> Callable:
    def held(*arguments: Any, **options: Any) -> Tensor:
        return function(*arguments, **options).detach()

    return held


def _rms_norm(tensor: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`functional.rms_norm` over the last axes, those of `shape`."""
    axes = tuple(range(-len(shape), 0))
    mean_square = tensor.detach().square().mean(axes, keepdim=True)
    scaled = tensor * (mean_square + (torch.finfo(tensor.dtype).eps if eps is None else eps)).rsqrt()
    return scaled if weight is None else scaled * weight


def _layer_norm(
    tensor: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`functional.layer_norm` over the last axes, those of `shape`."""
    scaled = _rms_norm(tensor - tensor.mean(tuple(range(-len(shape), 0)), keepdim=True), shape, weight, eps)
    return scaled if bias is None else scaled + bias


_HELD: dict[Callable, Callable] = {
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    **{
        function: _attention(function)
        for function in (functional.scaled_dot_product_attention, functional.multi_head_attention_forward)
    },
    **{function: _softmax(function) for function in (functional.softmax, torch.softmax, Tensor.softmax)},
}
