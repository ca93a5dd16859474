"""What this machine is good at: number format and memory layout, chosen by capability and said in the log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Choice:
    """The value chosen, and why."""

    value: object
    reason: str


def choose_precision(requested: str, accelerator: str) -> Choice:
    """Lightning's precision for `trainer.precision`: bfloat16 only where the hardware multiplies it faster than float32."""
    if requested != "auto":
        return Choice(requested, "asked for")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16-mixed", f"{torch.cuda.get_device_name()} multiplies bfloat16")
        return Choice("32-true", f"{torch.cuda.get_device_name()} has no bfloat16")
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return Choice("32-true", "Apple GPU")
    found = sorted({"amx_bf16", "avx512_bf16"} & processor_flags())
    if found:
        return Choice("bf16-mixed", f"the processor has {' and '.join(found)}")
    return Choice("32-true", "the processor has neither AMX nor AVX512-BF16, so bfloat16 would be slower")


def choose_channels_last(requested: str | bool, accelerator: str) -> Choice:
    """Whether convolutions keep channels last in memory."""
    if requested != "auto":
        return Choice(bool(requested), "asked for")
    return Choice(True, "the cached pixels are channels last already, and convolutions are at least as fast")


def processor_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0]) if lines else frozenset()
