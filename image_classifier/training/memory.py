"""How much memory training steps took, and how much there is left: of the GPU where there is one, else of this process's share of the machine."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_SHARE = 0.8  # of what is free may be planned for
_NO_LIMIT = 2**60


def reset_peak(on_gpu: bool) -> None:
    """Forget the GPU's peak; a process's own cannot be forgotten."""
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_used(on_gpu: bool) -> float:
    """Peak bytes: on a GPU since `reset_peak`, else of this process since it began."""
    if on_gpu:
        return float(torch.cuda.max_memory_reserved())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def free_memory(on_gpu: bool) -> float:
    """Bytes that may still be planned for: all of a GPU, which says when it is full; else a share of what machine and container have left."""
    if on_gpu:
        return float("inf")
    return _SHARE * min(_machine_free(), _container_free(Path("/sys/fs/cgroup")))


def _machine_free() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _container_free(place: Path) -> float:
    """What the control group allows beyond what it uses (version 2, then 1); cached files do not count, for they give way."""
    second = ("memory.max", "memory.current", "memory.stat", "file")
    first = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache")
    for limit, used, stat, cached in (second, first):
        try:
            most, now = (place / limit).read_text().strip(), float((place / used).read_text())
            counts = dict(line.split() for line in (place / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max" and float(most) < _NO_LIMIT:
            return max(0.0, float(most) - now + float(counts.get(cached, 0)))
    return float("inf")
