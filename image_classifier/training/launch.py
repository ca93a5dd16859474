"""One process per device: a command that wants several devices starts itself again once for each, as torchrun would."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator

from image_classifier.cpu import usable_cores
from image_classifier.errors import ConfigError
from image_classifier.program import torchrun_target
from image_classifier.training.callbacks.preemption import slurm_warnings

log = logging.getLogger(__name__)

_TIME_TO_SAVE_S = 600  # after a signal, before a rank that still runs is killed


def uses_gpu(accelerator: str) -> bool:
    """Return whether a training with this `trainer.accelerator` runs on NVIDIA GPUs."""
    return accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()


def device_count(accelerator: str, devices: Any) -> int:
    """Return how many devices of this machine `trainer.devices` means; `auto` and -1 are all GPUs, or one processor.

    Raises:
        ConfigError: There are no such devices.
    """
    on_mps = accelerator in ("auto", "gpu", "mps") and not uses_gpu(accelerator) and MPSAccelerator.is_available()
    kind: Any = CUDAAccelerator if uses_gpu(accelerator) else MPSAccelerator if on_mps else CPUAccelerator
    if devices in ("auto", -1, "-1"):
        return int(kind.auto_device_count())
    wanted = list(devices) if not isinstance(devices, int | str) else devices
    try:
        return len(kind.get_parallel_devices(kind.parse_devices(wanted)))
    except Exception as error:  # Lightning raises many types
        raise ConfigError(f"invalid trainer.devices={devices} ({error})", "use a number, or auto") from error


def launched() -> bool:
    """Return whether a launcher (this module, torchrun, srun) started this process as one of several."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def needs_ranks(accelerator: str, devices: Any, nodes: int) -> bool:
    """Return whether several devices are configured and no launcher is at work yet.

    Raises:
        ConfigError: There are no such devices, or several nodes and no launcher that can start processes on them.
    """
    if launched():
        return False
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes} needs a launcher that starts processes on every node",
            f"run `torchrun --nnodes={nodes} --nproc-per-node=N ... {torchrun_target()} train ...` on each node, "
            "or start it with SLURM's srun",
        )
    return device_count(accelerator, devices) > 1


def run_ranks(accelerator: str, devices: Any, command: Sequence[str]) -> None:
    """Run a command once for each device, and wait for all.

    Args:
        accelerator: `trainer.accelerator`.
        devices: `trainer.devices`.
        command: The program and its arguments.

    Raises:
        SystemExit: The exit code of the ranks, where it is not 0; they have logged why.
    """
    count = device_count(accelerator, devices)
    log.info("starting %d processes, one per device", count)
    code = _run(count, command, _visible(accelerator, devices))
    if code:
        raise SystemExit(code)


def _visible(accelerator: str, devices: Any) -> dict[str, str]:
    """Return the GPUs of a list as the only ones that the ranks see: they take them by number."""
    if isinstance(devices, int | str):
        chosen = [number for number in str(devices).split(",") if number] if "," in str(devices) else []
    else:
        chosen = list(devices)
    if not uses_gpu(accelerator) or not chosen:
        return {}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = [visible[int(number)] if visible else str(number) for number in chosen]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


def _run(count: int, command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command `count` times under torch's elastic agent; return the exit code of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks log themselves what is wrong
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // count)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_TIME_TO_SAVE_S),
    } | environment
    with _environment(environment):
        job = LaunchConfig(
            1, 1, count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
        )
        job.signals_to_handle = ",".join([job.signals_to_handle, *(number.name for number in slurm_warnings())])
        try:
            elastic_launch(job, command[0])(*command[1:])
        except ChildFailedError as error:
            failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
            codes = [failure.exitcode for failure in failures]
            return next((code for code in codes if code > 0), 128 - codes[0])
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes started in the block; those already set stay, except the choice of GPUs."""
    before = dict(os.environ)
    new = {name: value for name, value in values.items() if name not in before or name == "CUDA_VISIBLE_DEVICES"}
    os.environ.update(new)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
