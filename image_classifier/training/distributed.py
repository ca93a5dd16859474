"""Training in several processes: which rank this one is, how ranks communicate, and how all end when one does.

What starts the processes (`launch`, torchrun, SLURM's srun) sets the rank in the environment. Each rank trains on its
own device with its share of every batch; only rank 0 prepares the data, writes files, prints and logs.
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

_TIMEOUT = timedelta(days=7)  # the others wait while rank 0 downloads, audits, decodes or exports
_GRACE_S = 30.0  # for a rank that waits for a failed one to end by itself


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process among those that train together: over all nodes, and on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.world_size // self.local_world_size


def rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """Return this process's rank as torchrun or srun set it in the environment; a single process where neither did.

    Raises:
        ConfigError: The nodes run different numbers of processes.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        world_size = int(environment["WORLD_SIZE"])
        info = RankInfo(
            int(environment["RANK"]),
            world_size,
            int(environment["LOCAL_RANK"]),
            int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        )
    elif (
        "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    ):  # only srun sets the step
        world_size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        info = RankInfo(
            int(environment["SLURM_PROCID"]), world_size, int(environment["SLURM_LOCALID"]), max(1, world_size // nodes)
        )
    else:
        return RankInfo()
    if info.world_size % info.local_world_size or info.local_rank >= info.local_world_size:
        raise ConfigError(
            f"{info.world_size} processes cannot be spread evenly over the nodes, {info.local_world_size} on this one",
            "start the same number on each node: srun --ntasks-per-node=N, or torchrun --nproc-per-node=N",
        )
    return info


def rank() -> int:
    """Return this process's number among all, from 0."""
    return rank_info().rank


def world_size() -> int:
    """Return how many processes train together."""
    return rank_info().world_size


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes, prints and logs."""
    return rank() == 0


def cluster_environment() -> ClusterEnvironment:
    """Return the environment for Lightning, which would also take an idle SLURM or MPI environment for a launcher."""
    return TorchElasticEnvironment() if world_size() > 1 else LightningEnvironment()


@dataclass
class _ProcessGroup:
    """What connects this process to the others while `process_group` lasts."""

    group: Any
    store: Any


_group: _ProcessGroup | None = None


@contextmanager
def process_group(on_gpu: bool) -> Iterator[None]:
    """Connect this process with the others in the block; a single process needs no connection.

    An error on one rank ends all: the first rank that fails raises it, the others exit with the same code. No rank
    waits for ever: one that is blocked by a dead rank is ended after half a minute.
    """
    global _group
    here = rank_info()
    if here.world_size == 1:
        yield
        return
    _set_environment(here)
    if not is_rank_zero():
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore")
    _die_with_the_launcher()
    if on_gpu:
        if torch.cuda.device_count() < here.local_world_size:
            raise ConfigError(
                f"{here.local_world_size} processes on this machine see {torch.cuda.device_count()} GPUs",
                "start one per GPU; with srun give them to the node, --gpus-per-node=N, not to the tasks",
            )
        torch.cuda.set_device(here.local_rank)
    store = _store(here)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=here.rank, world_size=here.world_size
    )
    # Python objects are sent between processors, whatever the gradients use, and the others may wait for hours.
    _group = _ProcessGroup(distributed.new_group(backend="gloo", timeout=_TIMEOUT), store)
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
                "another process of this training is gone", "its error is above; resume=last resumes the run"
            ) from error
        if other is None:
            raise
    finally:
        over.set()
        _group = None
    if other is not None:
        raise SystemExit(other)  # outside of the handler: that rank shows the error


def _set_environment(here: RankInfo) -> None:
    """Set torchrun's variables from those of srun, so that all other code reads one kind only."""
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
    """Return the key-value store that all ranks share; torchrun's agent has it, or else rank 0."""
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = distributed.TCPStore(
        address, port, here.world_size, master and here.rank == 0 and not has_agent, timeout=timedelta(minutes=15)
    )
    # The agent's store outlives the ranks that it starts again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"image_classifier/{attempt}", shared)


def _die_with_the_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that a killed one leaves no orphans behind."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _failed_before(mine: str) -> int | None:
    """Report that this rank fails; return the exit code of the rank that failed first, None where it is this one."""
    assert _group is not None
    try:
        first = _group.store.compare_set("failed", "", mine).decode()
    except RuntimeError:  # the process with the store is gone
        return None
    return None if first == mine else int(first.partition(" ")[2])


def _is_lost_contact(error: BaseException) -> bool:
    """Return whether a killed rank caused the error: any other rank reports its failure before it exits."""
    return isinstance(error, RuntimeError) and re.search("gloo|NCCL|c10d|[Cc]onnection", str(error)) is not None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ClassifierError) else 1


def _watch(store: Any, over: threading.Event) -> None:
    """End this process when another one has failed: a call into NCCL would wait without noticing."""
    while not over.wait(1.0):
        try:
            failed = store.get("failed").decode() if store.check(["failed"]) else ""
        except RuntimeError:  # the process with the store is gone
            failed = "0 1"
        if failed and int(failed.partition(" ")[2]) > 128:  # a signal: all ranks stop by themselves at the same step
            return
        if failed and not over.wait(_GRACE_S):
            os._exit(int(failed.partition(" ")[2]))


def broadcast(value: T | None) -> T:
    """Return rank 0's value on every rank."""
    if _group is None:
        return value  # type: ignore[return-value]
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_group.group)
    return box[0]  # type: ignore[return-value]


def from_rank_zero(work: Callable[[], T]) -> T:
    """Return what `work` returns on rank 0; the others wait and do not call it."""
    return broadcast(work() if is_rank_zero() else None)


def first_on_each_node(work: Callable[[], T]) -> T:
    """Call `work` on every rank and return its value; the first rank of each node goes first and writes its files."""
    if _group is None:
        return work()
    first = rank_info().local_rank == 0
    early = work() if first else None
    barrier()
    return early if first else work()  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Return every rank's value, in the order of the ranks, on every rank."""
    if _group is None:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=_group.group)
    return values


def gather_rows(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the batches [n, ...] of all ranks as one tensor [N, ...]; ranks may have different numbers of batches."""
    if _group is None:
        return torch.cat(list(batches))
    of_ranks = gather([batch.detach().cpu() for batch in batches])
    rows = [torch.cat(of_rank) for of_rank in of_ranks if of_rank]
    return torch.cat(rows).to(batches[0].device if batches else "cpu")


def seed_per_rank(seed: int) -> None:
    """Give each rank random numbers of its own: with equal ones dropout would drop the same units on all ranks."""
    if _group is not None:
        torch.manual_seed(seed + rank() * 2**32)


def barrier() -> None:
    """Wait until every rank has reached this point."""
    if _group is not None:
        distributed.barrier(group=_group.group)


def rank_share(rows: np.ndarray) -> np.ndarray:
    """Return this rank's share of some rows: shares are consecutive and differ by one row at most."""
    here = rank_info()
    return np.array_split(rows, here.world_size)[here.rank]


def check_rank_shares(batch_size: int, num_train: int, num_val: int) -> None:
    """Check that the ranks can share each batch evenly, and that each rank has images.

    With unequal shares the mean of the ranks' losses would not be the loss of the batch.

    Raises:
        ConfigError: The batch size is not a multiple of the number of ranks.
        DataError: There are fewer images than ranks.
    """
    ranks = world_size()
    if batch_size % ranks:
        near = max(ranks, batch_size // ranks * ranks)
        raise ConfigError(
            f"data.batch_size={batch_size} cannot be shared by {ranks} processes",
            f"use a multiple of {ranks}, such as {near}",
        )
    if min(num_train, num_val) < ranks:
        raise DataError(
            f"{num_train} images to train on and {num_val} to validate on are too few for {ranks} processes",
            "lower trainer.devices",
        )


class SyncCallback(pl.Callback):
    """Corrects what Lightning 2.6 does wrong where several ranks train."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning waits for the device in every step to get rank 0's signals; StopOnSignal gets all ranks', rarely.
        skip_sigterm_broadcast(trainer)
        norms = [module for module in pl_module.modules() if isinstance(module, _BatchNorm)]
        is_local = any(not isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        if is_local and trainer.strategy.root_device.type == "cpu":
            log.info(
                "batch norm: each process uses the statistics of its share of the batch (torch joins them on GPUs only)"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        same_buffers(pl_module)  # averaged weights are in place by now


def same_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers, which are saved, to all ranks: batch norm moves them with each rank's own images."""
    if _group is not None:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)
