"""One process a device: a plain command that asks for several starts itself again that often, as torchrun would."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator

from image_classifier.cpu import usable_cores
from image_classifier.errors import ConfigError
from image_classifier.program import child_command, torchrun_target
from image_classifier.training.callbacks.preemption import slurm_warnings

log = logging.getLogger(__name__)

_TIME_TO_SAVE_S = 600  # after a signal, before a rank that is still there is killed


def uses_gpu(accelerator: str) -> bool:
    """Whether a training with this `trainer.accelerator` runs on NVIDIA GPUs."""
    return accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()


def device_count(accelerator: str, devices: Any) -> int:
    """How many devices of this machine `trainer.devices` asks for; `auto` and -1 are all GPUs, but one processor.

    Raises:
        ConfigError: No such devices.
    """
    on_mps = accelerator in ("auto", "gpu", "mps") and not uses_gpu(accelerator) and MPSAccelerator.is_available()
    kind: Any = CUDAAccelerator if uses_gpu(accelerator) else MPSAccelerator if on_mps else CPUAccelerator
    if devices in ("auto", -1, "-1"):
        return int(kind.auto_device_count())
    wanted = list(devices) if not isinstance(devices, int | str) else devices
    try:
        return len(kind.get_parallel_devices(kind.parse_devices(wanted)))
    except Exception as error:  # Lightning has many words for it
        raise ConfigError(f"invalid trainer.devices {devices} ({error})", "expected a number, or auto") from error


def launched() -> bool:
    """Whether a launcher (this module, torchrun, srun) started this process as one of several."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def run_ranks(accelerator: str, devices: Any, nodes: int) -> bool:
    """Where several devices are asked for and no launcher is at work, run this very command once for each and wait for all.

    Returns:
        Whether that was done, so that nothing is left to do here.

    Raises:
        ConfigError: Several nodes without a launcher, which alone can start processes there.
        SystemExit: The exit code of the ranks, where it is not 0; they have said why.
    """
    if launched():
        return False
    if nodes > 1:
        hint = f"run `torchrun --nnodes={nodes} --nproc-per-node=N ... {torchrun_target()} train ...` on each node, or start it with SLURM's srun"
        raise ConfigError(f"trainer.num_nodes={nodes} needs a launcher that starts processes on every node", hint)
    count = device_count(accelerator, devices)
    if count == 1:
        return False
    if len(sys.argv) < 2 or sys.argv[1] != "train":
        raise ConfigError(
            f"trainer.devices={devices} is for the verb train; here each run has one device", "set trainer.devices=1"
        )
    log.info("starting %d processes, one a device", count)
    code = _run(count, _visible(accelerator, devices))
    if code:
        raise SystemExit(code)
    return True


def _visible(accelerator: str, devices: Any) -> dict[str, str]:
    """The GPUs of a list, as the only ones that the ranks see: they take them by number."""
    chosen = (
        devices
        if not isinstance(devices, int | str)
        else [part for part in str(devices).split(",") if part]
        if "," in str(devices)
        else []
    )
    if not uses_gpu(accelerator) or not chosen:
        return {}
    mine = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine[int(number)] if mine else str(number) for number in chosen)}


def _run(count: int, environment: dict[str, str]) -> int:
    """Run this command `count` times under torch's elastic agent; the exit code of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks say themselves what is wrong
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
            elastic_launch(job, child_command()[0])(*child_command()[1:], *sys.argv[1:])
        except ChildFailedError as error:
            codes = [
                failure.exitcode for _, failure in sorted(error.failures.items(), key=lambda item: item[1].timestamp)
            ]
            return next((code for code in codes if code > 0), 128 - codes[0])
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes started in the block; those that are set already stay, but for the choice of GPUs."""
    before = dict(os.environ)
    os.environ.update(
        {name: value for name, value in values.items() if name not in before or name == "CUDA_VISIBLE_DEVICES"}
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
