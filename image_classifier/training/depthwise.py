"""Depthwise convolutions in float32, in a training on a processor in bfloat16, where their gradient is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def depthwise_in_float32(device: torch.device) -> AbstractContextManager[object]:
    """Return a context for the forward pass of a training step under autocast.

    On a processor, where autocast computes in bfloat16, depthwise convolutions with a stride or with a kernel above 3
    are computed in float32: their gradient is up to 50 times as fast (docs/decisions/029). Elsewhere it does nothing.
    """
    is_slow = device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    return _DepthwiseInFloat32() if is_slow and torch.get_autocast_dtype("cpu") == torch.bfloat16 else nullcontext()


class _DepthwiseInFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # torch's and timm's layers give pixels and weights by position; a network that names them is left as it is.
        if func is not torch.conv2d or len(args) < 2 or not _has_slow_gradient(*args, **(kwargs or {})):
            return func(*args, **(kwargs or {}))
        pixels, *others = args
        with torch.autocast("cpu", enabled=False):
            return func(pixels.float(), *others, **(kwargs or {}))


def _has_slow_gradient(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> bool:
    """Return whether a convolution, given as to torch.conv2d, is depthwise, in float32, and no plain 3 x 3 one."""
    is_depthwise = groups > 1 and weight.shape[1] == 1 and weight.dtype == torch.float32
    return is_depthwise and (max(weight.shape[2:]) > 3 or stride not in (1, [1, 1], (1, 1)))
