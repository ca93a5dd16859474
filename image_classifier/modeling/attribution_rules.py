"""Constant attention weights and norm scales: gradient times activation then splits a logit between tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Function = Callable[..., Any]


class DetachedAttention(TorchFunctionMode):
    """A context in which no gradient flows through attention weights or the scale of a norm.

    Source: Ali et al., 2022, "XAI for Transformers".

    Outputs stay the same. It replaces the functions that are called inside, not the network's modules, so attention may
    be fused, explicit or windowed.
    """

    def __torch_function__(
        self, function: _Function, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        return _DETACHED.get(function, function)(*arguments, **(options or {}))


def _attention(function: _Function) -> _Function:
    def detached(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        return function(query.detach(), key.detach(), *rest, **options)

    return detached


def _softmax(function: _Function) -> _Function:
    def detached(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options).detach()

    return detached


def _rms_norm(tensor: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Compute `functional.rms_norm` over the last axes, those of `shape`, with a constant scale."""
    axes = tuple(range(-len(shape), 0))
    mean_square = tensor.detach().square().mean(axes, keepdim=True)
    scaled = tensor * (mean_square + (torch.finfo(tensor.dtype).eps if eps is None else eps)).rsqrt()
    return scaled if weight is None else scaled * weight


def _layer_norm(
    tensor: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Compute `functional.layer_norm` over the last axes, those of `shape`, with a constant scale."""
    scaled = _rms_norm(tensor - tensor.mean(tuple(range(-len(shape), 0)), keepdim=True), shape, weight, eps)
    return scaled if bias is None else scaled + bias


_DETACHED: dict[_Function, _Function] = {
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    **{
        function: _attention(function)
        for function in (functional.scaled_dot_product_attention, functional.multi_head_attention_forward)
    },
    **{function: _softmax(function) for function in (functional.softmax, torch.softmax, Tensor.softmax)},
}
