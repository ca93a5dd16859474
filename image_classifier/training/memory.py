"""Memory that training steps used, and memory that is left: of the GPU, or of this process's share of the machine."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_SHARE = 0.8  # of the free memory, for which may be planned
_NO_LIMIT = 2**60


def reset_peak(on_gpu: bool) -> None:
    """Reset the GPU's peak; that of a process cannot be reset."""
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_used(on_gpu: bool) -> float:
    """Return peak bytes: on a GPU since `reset_peak`, else of this process since it started."""
    if on_gpu:
        return float(torch.cuda.max_memory_reserved())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def free_memory(on_gpu: bool) -> float:
    """Return bytes that a batch may still use: unlimited on a GPU, which reports when it is full, else a share."""
    if on_gpu:
        return float("inf")
    return _SHARE * min(_machine_free(), _container_free(Path("/sys/fs/cgroup")))


def _machine_free() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))


def _container_free(root: Path) -> float:
    """Return the bytes that the control group (version 2, then 1) still allows; cached files do not count as used."""
    second = ("memory.max", "memory.current", "memory.stat", "file")
    first = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache")
    for limit, used, stat, cached in (second, first):
        try:
            max_bytes, used_bytes = (root / limit).read_text().strip(), float((root / used).read_text())
            counts = dict(line.split() for line in (root / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if max_bytes != "max" and float(max_bytes) < _NO_LIMIT:
            return max(0.0, float(max_bytes) - used_bytes + float(counts.get(cached, 0)))
    return float("inf")
