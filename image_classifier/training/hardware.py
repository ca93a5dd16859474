"""What this machine is good at: number format and memory layout, chosen by capability and said in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """What a training uses: Lightning's precision, and whether images lie channels last in memory."""

    precision: str
    channels_last: bool


@dataclass(frozen=True)
class Choice:
    """The value chosen, and why."""

    value: object
    reason: str


def choose_hardware(precision: str, channels_last: str | bool, accelerator: str) -> Hardware:
    """Settle `trainer.precision` and `trainer.channels_last` and say in the log what was chosen and why."""
    number = choose_precision(str(precision), accelerator)
    layout = choose_channels_last(channels_last, number.value, accelerator)
    log.info("precision: %s (%s)", number.value, number.reason)
    log.info("memory layout: channels %s (%s)", "last" if layout.value else "first", layout.reason)
    return Hardware(str(number.value), bool(layout.value))


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


def choose_channels_last(requested: str | bool, precision: object, accelerator: str) -> Choice:
    """Whether convolutions keep channels last in memory (ratios measured with ResNet-18 at 64 px: docs/LOG.md)."""
    if requested != "auto":
        return Choice(bool(requested), "asked for")
    if precision != "32-true":
        return Choice(True, "bfloat16 convolutions are faster so")
    on_cpu = accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and "avx512f" in processor_flags():
        return Choice(False, "float32 convolutions with AVX-512 are faster so")
    return Choice(True, "float32 convolutions without AVX-512 are faster so" if on_cpu else "convolutions on this device are at least as fast so")


def processor_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0]) if lines else frozenset()
