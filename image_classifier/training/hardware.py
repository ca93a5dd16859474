"""Settings that make a step fast on this machine: number format, memory layout, fused optimizers, compiling."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from image_classifier.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """The choices for one training.

    Attributes:
        precision: Lightning's.
        channels_last: Whether images are channels last in memory.
        fused: Whether an optimizer that can do so updates all parameters in one pass.
        compile: `auto` compiles where the rest of the run is long enough to repay it; true always, false never.
        benchmark: Whether cuDNN times its algorithms before it chooses.
    """

    precision: str
    channels_last: bool
    fused: bool = False
    compile: str | bool = False
    benchmark: bool = False


@dataclass(frozen=True)
class Choice:
    """The value chosen, and why."""

    value: object
    reason: str


@dataclass(frozen=True)
class SpeedSettings:
    """The keys of `trainer` that decide how fast a step is."""

    precision: str | int = "auto"
    channels_last: str | bool = "auto"
    compile: str | bool = "auto"
    speed: str = "auto"
    accelerator: str = "auto"
    deterministic: bool | str | None = False
    gradient_clip_val: float | None = None

    def __post_init__(self) -> None:
        if self.speed not in ("auto", "safe"):
            raise ConfigError(
                f"trainer.speed={self.speed!r} is unknown",
                "use auto, or safe: float32 and nothing that only makes it faster",
            )
        for key, value in (("compile", self.compile), ("channels_last", self.channels_last)):
            if value not in ("auto", True, False):
                raise ConfigError(f"trainer.{key}={value!r} is unknown", "use auto, true or false")
        # Lightning takes a negative number for no clipping, and one that is not finite makes every gradient so.
        clip = self.gradient_clip_val
        if clip is not None and not 0 <= clip < math.inf:
            raise ConfigError(f"trainer.gradient_clip_val must be 0 or more, not {clip}", "use null for no clipping")


def choose_hardware(settings: SpeedSettings) -> Hardware:
    """Choose what makes a step fast, and log each choice with its reason."""
    safe = settings.speed == "safe"
    if safe and settings.precision == "auto":
        number = Choice("32-true", "trainer.speed=safe")
    else:
        number = choose_precision(str(settings.precision), settings.accelerator)
    if safe:
        layout = Choice(False, "trainer.speed=safe")
    else:
        layout = choose_channels_last(settings.channels_last, number.value, settings.accelerator)
    fused = choose_fused(safe, settings.gradient_clip_val, number.value)
    compiling = choose_compile(safe, settings.compile, settings.deterministic)
    log.info("precision: %s (%s)", number.value, number.reason)
    log.info("memory layout: channels %s (%s)", "last" if layout.value else "first", layout.reason)
    log.info("fused optimizer: %s (%s)", _word(fused.value), fused.reason)
    log.info("torch.compile: %s (%s)", _word(compiling.value), compiling.reason)
    on_cuda = settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if on_cuda:
        tf32 = not safe
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        reason = "trainer.speed=safe" if safe else "faster for the float32 products of this GPU"
        log.info("TF32: %s (%s)", _word(tf32), reason)
    benchmark = on_cuda and not safe and not settings.deterministic
    return Hardware(str(number.value), bool(layout.value), bool(fused.value), compiling.value, benchmark)  # type: ignore[arg-type]


def _word(value: object) -> str:
    return "auto" if value == "auto" else "on" if value else "off"


def choose_fused(safe: bool, gradient_clip_val: float | None, precision: object) -> Choice:
    """Choose whether optimizers that can do so update all parameters in one pass over memory."""
    if safe:
        return Choice(False, "trainer.speed=safe")
    if precision == "16-mixed":
        return Choice(False, "its gradients are unscaled within the step, where trainer.on_nan cannot check them")
    if gradient_clip_val and str(precision).endswith("-mixed"):
        return Choice(False, "Lightning does not clip the gradients of a fused optimizer in mixed precision")
    return Choice(True, "one pass over the parameters, where the optimizer can")


def choose_compile(safe: bool, requested: str | bool, deterministic: bool | str | None) -> Choice:
    """Choose whether the backbone is compiled; the run itself decides about `auto` (callbacks.torch_compile)."""
    if safe:
        return Choice(False, "trainer.speed=safe")
    if requested != "auto":
        return Choice(bool(requested), "as configured")
    if deterministic:
        return Choice(False, "trainer.deterministic: a choice by the clock would not repeat")
    return Choice("auto", "decided when the length of the run is known")


def choose_precision(requested: str, accelerator: str) -> Choice:
    """Choose Lightning's precision: bfloat16 only where the hardware multiplies it faster than float32."""
    if requested != "auto":
        return Choice(requested, "as configured")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16-mixed", f"{torch.cuda.get_device_name()} multiplies bfloat16")
        return Choice("32-true", f"{torch.cuda.get_device_name()} has no bfloat16")
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return Choice("32-true", "Apple GPU")
    extensions = sorted({"amx_bf16", "avx512_bf16"} & processor_flags())
    if extensions:
        return Choice("bf16-mixed", f"the processor has {' and '.join(extensions)}")
    return Choice("32-true", "the processor has neither AMX nor AVX512-BF16, so bfloat16 would be slower")


def choose_channels_last(requested: str | bool, precision: object, accelerator: str) -> Choice:
    """Choose whether convolutions keep channels last in memory (measured with ResNet-18 at 64 px: docs/LOG.md)."""
    if requested != "auto":
        return Choice(bool(requested), "as configured")
    if precision != "32-true":
        return Choice(True, "faster for bfloat16 convolutions")
    on_cpu = accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and "avx512f" in processor_flags():
        return Choice(False, "faster for float32 convolutions with AVX-512")
    if on_cpu:
        return Choice(True, "faster for float32 convolutions without AVX-512")
    return Choice(True, "at least as fast for convolutions on this device")


def processor_flags() -> frozenset[str]:
    """Return the processor's instruction sets as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0]) if lines else frozenset()
