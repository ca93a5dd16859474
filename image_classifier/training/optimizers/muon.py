"""Muon: momentum with orthogonalised steps for hidden matrices, and SGD or AdamW for all other parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from image_classifier.errors import ConfigError
from image_classifier.training.hardware import processor_flags

# The quintic of Jordan et al. (2024): steepest at zero, so five rounds lift small singular values to 0.7..1.2.
# Exactly 1 would gain nothing.
_QUINTIC = (3.4445, -4.7750, 2.0315)
SCALES = ("match_rms_adamw", "original", "none")


class Muon(torch.optim.Optimizer):
    """Muon for groups of kind "matrix", an auxiliary optimizer for the others.

    Source: Jordan et al., 2024, kellerjordan.github.io/posts/muon.

    torch.optim.Muon takes matrices only, one after another. Kernels, norms, biases and the head would need a second
    optimizer, for which Lightning's automatic optimisation, gradient accumulation and our schedulers are not made. And
    it always computes in bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: str = "match_rms_adamw",
        newton_schulz_steps: int = 5,
        normalise_weights: bool = False,
        auxiliary: str = "adamw",
        auxiliary_lr: float | None = None,
        auxiliary_momentum: float = 0.9,
        auxiliary_betas: tuple[float, float] = (0.9, 0.95),
        auxiliary_weight_decay: float | None = None,
        head_lr_scale: float = 1.0,
        exact: bool = False,
    ) -> None:
        """Set up Muon over groups with a "kind" (see groups.py); without one, matrices and kernels are hidden ones.

        Args:
            params: Parameters or groups of them; kernels [O, I, h, w] are treated as matrices [O, I * h * w].
            lr: Step size of the hidden matrices.
            momentum: Of the hidden matrices.
            nesterov: Nesterov momentum, in SGD too.
            weight_decay: Decoupled decay of the hidden matrices: times 1 - lr * weight_decay a step.
            scale: Factor of a step [R, C]: `match_rms_adamw`, 0.2 sqrt(max(R, C)), as long as AdamW's, so that AdamW's
                lr and weight decay fit (Liu et al., 2025, section 2.2); `original`, sqrt(max(1, R / C)); `none`.
            newton_schulz_steps: Rounds of the iteration; 3 are enough where speed counts.
            normalise_weights: Keep every hidden matrix [R, C] at norm sqrt(R), so that `lr` is a relative step (for
                networks with norms).
            auxiliary: `adamw` or `sgd`, for all other kinds.
            auxiliary_lr: Its learning rate; None: `lr`.
            auxiliary_momentum: Of `sgd`.
            auxiliary_betas: Of `adamw`.
            auxiliary_weight_decay: None: `weight_decay`; decoupled in `adamw`, added to the gradient in `sgd`, as in
                torch.
            head_lr_scale: Factor of the auxiliary learning rate for groups of kind "head".
            exact: Orthogonalise in float32 where bfloat16 would be faster; the trainer's precision sets it.

        Raises:
            ConfigError: `scale`, `auxiliary`, `lr`, `momentum` or `newton_schulz_steps` is invalid.
        """
        _check(lr, momentum, scale, newton_schulz_steps, auxiliary)
        rate = lr if auxiliary_lr is None else auxiliary_lr
        decay = weight_decay if auxiliary_weight_decay is None else auxiliary_weight_decay
        self._auxiliary = _auxiliary(auxiliary, rate, decay, auxiliary_momentum, nesterov, tuple(auxiliary_betas))
        self._head_lr_scale = head_lr_scale
        self._exact = exact
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "scale": scale}
        super().__init__(
            params, defaults | {"newton_schulz_steps": newton_schulz_steps, "normalise_weights": normalise_weights}
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"_auxiliary": self._auxiliary, "_head_lr_scale": self._head_lr_scale, "_exact": self._exact}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its "kind" decides whether Muon or the auxiliary optimizer steps it.

        Raises:
            ConfigError: A group of matrices has vectors or sharded tensors.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        kind = param_group.get("kind") or ("matrix" if all(parameter.ndim > 1 for parameter in params) else "vector")
        group = param_group | {"params": params, "kind": kind}
        if kind != "matrix":
            # The auxiliary optimizer's settings, where the group has none of its own.
            for name, value in self._auxiliary.defaults.items():
                group.setdefault(name, value * self._head_lr_scale if (name, kind) == ("lr", "head") else value)
        elif any(parameter.ndim < 2 or hasattr(parameter, "full_tensor") for parameter in params):
            raise ConfigError(
                "optimizer=muon needs complete matrices, and trainer=fsdp shards them over processes",
                "use trainer=ddp, or optimizer=adamw",
            )
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every group; return the loss of the closure, if there is one."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            if group["kind"] == "matrix":
                self._step_matrices(group)
        # Checkpoints and schedulers see one optimizer: the auxiliary one works on this one's groups and state. Loading
        # a checkpoint replaces both, so they are set each time.
        self._auxiliary.param_groups = [group for group in self.param_groups if group["kind"] != "matrix"]
        self._auxiliary.state = self.state
        self._auxiliary.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not params:
            return
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in params]
        directions = [self.state[parameter]["momentum_buffer"] for parameter in params]
        # The running sum of gradients, in place; with Nesterov, the gradient plus the next decayed sum.
        torch._foreach_mul_(directions, group["momentum"])
        torch._foreach_add_(directions, gradients)
        if group["nesterov"]:
            directions = list(torch._foreach_add(gradients, directions, alpha=group["momentum"]))
        # Orthogonal directions of the same shapes.
        updates = orthogonalised(directions, group["newton_schulz_steps"], self._exact)
        # The weights before the step: norm sqrt(R), then decoupled decay.
        if group["normalise_weights"]:
            _normalise(params)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        # The step, scaled by each matrix's shape.
        torch._foreach_mul_(updates, [-group["lr"] * _length(update, group["scale"]) for update in updates])
        torch._foreach_add_(params, updates)


def orthogonalised(directions: list[Tensor], steps: int, exact: bool = False) -> list[Tensor]:
    """Return a nearly orthogonal matrix of the same shape and type for each; equal shapes are one batch."""
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for position, direction in enumerate(directions):
        shapes[direction.shape].append(position)
    updates = list(directions)
    for positions in shapes.values():
        stacked = torch.stack([directions[position] for position in positions])
        update = newton_schulz(stacked.flatten(2), steps, torch.float32 if exact else number_format(stacked.device))
        for position, one in zip(positions, update.to(stacked.dtype).view(stacked.shape).unbind(), strict=True):
            updates[position] = one
    return updates


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return U f(S) V' of each matrix U S V' [N, R, C], with f(S) near 1, by the quintic Newton-Schulz iteration.

    It computes in `dtype`. Zero matrices stay zero.
    """
    linear, cubic, quintic = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    # The Gram matrix of the shorter side costs less.
    wide = matrices.mT if tall else matrices
    # The largest singular value must be at most 1: the Frobenius norm is its upper bound. Divided before rounding.
    wide = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)).to(dtype)
    for _ in range(steps):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        wide = torch.baddbmm(wide, polynomial, wide, beta=linear)
    return wide.mT if tall else wide


def number_format(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it faster than float32: three digits are enough for a direction."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and {"amx_bf16", "avx512_bf16"} & processor_flags() else torch.float32


def _length(update: Tensor, scale: str) -> float:
    rows = update.shape[0]
    columns = math.prod(update.shape[1:])
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if scale == "original" else 1.0


def _normalise(params: list[Tensor]) -> None:
    norms = torch._foreach_norm(params)
    factors = [math.sqrt(len(parameter)) / norm.clamp(min=1e-12) for parameter, norm in zip(params, norms, strict=True)]
    torch._foreach_mul_(params, factors)


def _auxiliary(
    name: str, lr: float, weight_decay: float, momentum: float, nesterov: bool, betas: tuple[Any, ...]
) -> torch.optim.Optimizer:
    """Build the optimizer of the other kinds, around a placeholder: its groups are set before each step."""
    placeholder = [torch.zeros(1, requires_grad=True)]
    if name == "sgd":
        return torch.optim.SGD(placeholder, lr, momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0)
    return torch.optim.AdamW(placeholder, lr, betas, weight_decay=weight_decay)


def _check(lr: float, momentum: float, scale: str, steps: int, auxiliary: str) -> None:
    if scale not in SCALES:
        raise ConfigError(f"invalid optimizer.scale={scale!r}", f"use one of {', '.join(SCALES)}")
    if auxiliary not in ("sgd", "adamw"):
        raise ConfigError(f"invalid optimizer.auxiliary={auxiliary!r}", "use sgd or adamw")
    if not (lr >= 0 and 0 <= momentum < 1 and steps >= 1):
        raise ConfigError(
            f"invalid optimizer.lr={lr}, momentum={momentum} or newton_schulz_steps={steps}",
            "see conf/optimizer/muon.yaml",
        )
