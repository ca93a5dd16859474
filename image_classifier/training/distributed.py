"""Many processes, one training: who this one is, how they speak to each other, and how all end when one does.

Whoever starts the processes (`launch`, torchrun, SLURM's srun) says in the environment which of them this is. Each trains on its own
device with its share of every batch; the main rank alone prepares the data, writes files, prints and tracks.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from image_classifier.errors import ClassifierError, ConfigError, DataError, TrainingError
from image_classifier.training.lightning_compat import skip_sigterm_broadcast

log = logging.getLogger(__name__)
T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # the others wait while the main rank downloads, audits, decodes or exports
_GRACE_S = 30.0  # so long may a rank that waits for a failed one take to end by itself


@dataclass(frozen=True)
class RankInfo:
    """Which of the processes that train together this one is: over all nodes, and on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def nodes(self) -> int:
        """Machines that take part."""
        return self.world_size // self.local_world_size


def rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """This process's place as torchrun or srun wrote it into the environment; alone where neither did.

    Raises:
        ConfigError: The nodes run different numbers of processes.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        world_size = int(environment["WORLD_SIZE"])
        found = RankInfo(
            int(environment["RANK"]),
            world_size,
            int(environment["LOCAL_RANK"]),
            int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        )
    elif (
        "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    ):  # only srun sets the step
        world_size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        found = RankInfo(
            int(environment["SLURM_PROCID"]), world_size, int(environment["SLURM_LOCALID"]), max(1, world_size // nodes)
        )
    else:
        return RankInfo()
    if found.world_size % found.local_world_size or found.local_rank >= found.local_world_size:
        fact = (
            f"{found.world_size} processes cannot be spread evenly over the nodes, {found.local_world_size} on this one"
        )
        raise ConfigError(
            fact, "start the same number on each node: srun --ntasks-per-node=N, or torchrun --nproc-per-node=N"
        )
    return found


def rank() -> int:
    """This process's number among all, from 0."""
    return rank_info().rank


def world_size() -> int:
    """How many processes train together."""
    return rank_info().world_size


def is_rank_zero() -> bool:
    """Whether this process is the one that writes, prints and tracks."""
    return rank() == 0


def cluster_environment() -> ClusterEnvironment:
    """What Lightning is to believe: it would also take an idle SLURM or MPI environment for a launcher."""
    return TorchElasticEnvironment() if world_size() > 1 else LightningEnvironment()


@dataclass
class _ProcessGroup:
    """What binds this process to the others while `joined` lasts."""

    group: Any
    store: Any


_ties: _ProcessGroup | None = None


@contextmanager
def process_group(on_gpu: bool) -> Iterator[None]:
    """Train together with the other processes in this block; does nothing for a process that is alone.

    An error on one rank is everyone's: the first that fails raises it, the others leave quietly with the same exit code. Nobody waits
    for ever: a rank that is held up by a dead one is ended after half a minute.
    """
    global _ties
    here = rank_info()
    if here.world_size == 1:
        yield
        return
    _take_place(here)
    if not is_rank_zero():
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore")
    _die_with_the_launcher()
    if on_gpu:
        if torch.cuda.device_count() < here.local_world_size:
            fact = f"{here.local_world_size} processes on this machine see {torch.cuda.device_count()} GPUs"
            raise ConfigError(
                fact, "start one a GPU; with srun give them to the node, --gpus-per-node=N, not to the tasks"
            )
        torch.cuda.set_device(here.local_rank)
    store = _store(here)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=here.rank, world_size=here.world_size
    )
    # Objects travel between processors, whatever the gradients do, and may keep the others waiting for hours.
    _ties = _ProcessGroup(distributed.new_group(backend="gloo", timeout=_PATIENCE), store)
    over = threading.Event()
    threading.Thread(target=_watch, args=(_store(here, master=False), over), daemon=True).start()
    other = None
    try:
        yield
        barrier()
        distributed.destroy_process_group()
    except BaseException as error:
        other = _failed_before(f"{here.rank} {_exit_code(error)}")
        if other is None and _is_lost_contact(error):
            raise TrainingError(
                "another process of this training is gone", "what it said stands above; resume=last goes on"
            ) from error
        if other is None:
            raise
    finally:
        over.set()
        _ties = None
    if other is not None:
        raise SystemExit(other)  # outside of the handler: that rank says why


def _take_place(here: RankInfo) -> None:
    """Say in torch's own words what srun said, so that all below knows one way only."""
    if "RANK" in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    port = 15_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10_000 + int(os.environ.get("SLURM_STEP_ID", "0")) % 100
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    os.environ.setdefault("MASTER_PORT", str(port))
    numbers = {
        "RANK": here.rank,
        "WORLD_SIZE": here.world_size,
        "LOCAL_RANK": here.local_rank,
        "LOCAL_WORLD_SIZE": here.local_world_size,
    }
    numbers |= {"GROUP_RANK": here.rank // here.local_world_size}
    os.environ.update({name: str(number) for name, number in numbers.items()})


def _store(here: RankInfo, master: bool = True) -> Any:
    """The table of keys that all ranks share; torchrun's agent holds it, or else the main rank."""
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = distributed.TCPStore(
        address, port, here.world_size, master and here.rank == 0 and not held, timeout=timedelta(minutes=15)
    )
    attempt = os.environ.get(
        "TORCHELASTIC_RESTART_COUNT", "0"
    )  # the agent's table outlives the ranks that it starts again
    return distributed.PrefixStore(f"image_classifier/{attempt}", shared)


def _die_with_the_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that a killed one leaves no orphans behind."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _failed_before(mine: str) -> int | None:
    """Tell the others that this rank fails; the exit code of the one that did so first, None where it is this one."""
    assert _ties is not None
    try:
        first = _ties.store.compare_set("failed", "", mine).decode()
    except RuntimeError:  # whoever held the table is gone
        return None
    return None if first == mine else int(first.partition(" ")[2])


def _is_lost_contact(error: BaseException) -> bool:
    """Whether a rank that was killed is behind the error: one that can speak says that it fails before it leaves."""
    return isinstance(error, RuntimeError) and re.search("gloo|NCCL|c10d|[Cc]onnection", str(error)) is not None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ClassifierError) else 1


def _watch(store: Any, over: threading.Event) -> None:
    """End this process when another one has failed and it does not notice: a call into NCCL waits on without looking up."""
    while not over.wait(1.0):
        try:
            failed = store.get("failed").decode() if store.check(["failed"]) else ""
        except RuntimeError:  # whoever held the table is gone
            failed = "0 1"
        if failed and int(failed.partition(" ")[2]) > 128:  # a signal: all ranks stop at the same step by themselves
            return
        if failed and not over.wait(_GRACE_S):
            os._exit(int(failed.partition(" ")[2]))


def broadcast(value: T | None) -> T:
    """The main rank's value, on every rank."""
    if _ties is None:
        return value  # type: ignore[return-value]
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_ties.group)
    return box[0]  # type: ignore[return-value]


def from_rank_zero(work: Callable[[], T]) -> T:
    """What `work` gives on the main rank, which alone does it; the others wait."""
    return broadcast(work() if is_rank_zero() else None)


def first_on_each_node(work: Callable[[], T]) -> T:
    """What `work` gives on every rank, done on the first one of each node before the others, who find its files."""
    if _ties is None:
        return work()
    first = rank_info().local_rank == 0
    early = work() if first else None
    barrier()
    return early if first else work()  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if _ties is None:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_ties.group)
    return values


def gather_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The batches [n, ...] of all ranks one below the other [N, ...]; the ranks may hold different numbers of them."""
    if _ties is None:
        return torch.cat(list(parts))
    found = [torch.cat(theirs) for theirs in gather([part.detach().cpu() for part in parts]) if theirs]
    return torch.cat(found).to(parts[0].device if parts else "cpu")


def seed_per_rank(seed: int) -> None:
    """Let each rank draw its own random numbers from here on: equal ones would drop the same neurons everywhere."""
    if _ties is not None:
        torch.manual_seed(seed + rank() * 2**32)


def barrier() -> None:
    """Wait until every rank is here."""
    if _ties is not None:
        distributed.barrier(group=_ties.group)


def rank_share(rows: np.ndarray) -> np.ndarray:
    """This rank's part of some rows: the parts follow one another and differ by one row at most."""
    here = rank_info()
    return np.array_split(rows, here.world_size)[here.rank]


def check_rank_shares(batch_size: int, num_train: int, num_val: int) -> None:
    """Refuse a global batch that the ranks cannot share evenly, for their losses would not average to its own, and a rank without images."""
    parts = world_size()
    if batch_size % parts:
        near = max(parts, batch_size // parts * parts)
        raise ConfigError(
            f"data.batch_size={batch_size} cannot be shared by {parts} processes",
            f"use a multiple of {parts}, such as {near}",
        )
    if min(num_train, num_val) < parts:
        raise DataError(
            f"{num_train} images to train on and {num_val} to validate on are too few for {parts} processes",
            "lower trainer.devices",
        )


class SyncCallback(pl.Callback):
    """What Lightning 2.6 does amiss where several ranks train, set right."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # It waits for the device in every step to hear of the main rank's signals; StopOnSignal hears of all ranks', and seldom.
        skip_sigterm_broadcast(trainer)
        normed = any(
            isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm) for part in pl_module.modules()
        )
        if normed and trainer.strategy.root_device.type == "cpu":
            log.info(
                "batch norm: each process takes the statistics of its own part of the batch (torch joins them on GPUs only)"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        same_buffers(pl_module)  # by now averaged weights have taken their place


def same_buffers(module: nn.Module) -> None:
    """Give every rank the main rank's buffers: those of batch norm move with each rank's own images, and the main rank's are saved."""
    if _ties is not None:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)
