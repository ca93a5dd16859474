"""SIGTERM, Ctrl-C and SLURM's warning: the step under way is finished and saved, then the run ends with 128 + the signal's number.

Lightning 2.6 looks at a signal only after some steps, saves nothing by itself, and then ends with 0, as if the work were done.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging

from image_classifier.training.callbacks.checkpoints import STEPS_BETWEEN_LOOKS, BetweenSteps, last_checkpoint
from image_classifier.training.callbacks.exact_resume import is_accumulating
from image_classifier.training.distributed import gather, is_rank_zero, world_size

log = logging.getLogger(__name__)

_ECHO_S = 5.0  # launchers, tuners and systemd each pass the same SIGTERM on


class SignalHandler:
    """Signals to this process: acted on at once, or, while steps are made, remembered until one is complete."""

    def __init__(self) -> None:
        self.received = 0
        self._deferred, self._owner, self._since = False, os.getpid(), 0.0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Turn signals into an orderly end of the block; the second one ends it at once, but for a SIGTERM that several senders pass on."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGTERM, signal.SIGINT, *slurm_warnings()]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        except BaseException:
            if self.received in slurm_warnings() and is_rank_zero():
                _requeue()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember the first signal in this block, which asks for it between its steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received:  # after the last step was looked at
            os.write(
                2,
                f"stopped by {signal.Signals(self.received).name} after the last step; the same command with resume=last goes on\n".encode(),
            )
            raise SystemExit(128 + self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker process that was forked off
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first, now = not self.received, time.monotonic()
        if not first and self._deferred and number == signal.SIGTERM and now - self._since < _ECHO_S:
            return
        self.received, self._since = number, now
        if first and self._deferred and not is_rank_zero():
            return
        if first and self._deferred:
            os.write(
                2, f"{signal.Signals(number).name}: finishing the step under way; once more to stop at once\n".encode()
            )
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
            raise SystemExit(128 + number)


def slurm_job() -> str:
    """The SLURM job this process belongs to, the same after a requeue; empty outside of SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}" if array else os.environ.get("SLURM_JOB_ID", "")


def slurm_warnings() -> list[signal.Signals]:
    """The signals by which SLURM, or submitit on top of it, says that the job's time is nearly used up."""
    if not slurm_job():
        return []
    names = {"USR1", os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")}
    return [signal.Signals[f"SIG{name}"] for name in sorted(names)]


def _requeue() -> None:
    """Ask SLURM to start this job again; it finds its run folder by the job's number."""
    try:
        done = subprocess.run(["scontrol", "requeue", slurm_job()], capture_output=True, text=True, timeout=60)
        said = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        log.error(
            "SLURM job %s was not put back into the queue (%s); go on by hand with resume=last", slurm_job(), said
        )
    else:
        log.warning("SLURM job %s is back in the queue and will go on by itself", slurm_job())


class StopOnSignal(BetweenSteps):
    """Saves and ends the run between two steps when a signal came to any of its processes."""

    def __init__(self, signals: SignalHandler) -> None:
        self.signals = signals

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def between_steps(self, trainer: pl.Trainer, at_epoch_end: bool) -> None:
        self._look(trainer, rare=at_epoch_end)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, rare=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if world_size() > 1 or is_accumulating(trainer) or trainer.sanity_checking or not self.signals.received:
            return  # with several processes the validation ends first
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.on_validation_epoch_end(trainer, pl_module)  # the averages go back to their place
        self._stop(trainer, self.signals.received)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, rare=True)

    def _look(self, trainer: pl.Trainer, rare: bool) -> None:
        if world_size() > 1 and not rare and trainer.global_step % STEPS_BETWEEN_LOOKS:
            return
        if asked := max(gather(self.signals.received)):
            self._stop(trainer, asked)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        name = signal.Signals(number).name
        last = last_checkpoint(trainer)
        if last and trainer.global_step:
            last.save(trainer)
            log.warning(
                "stopped by %s after step %d, which is saved; the same command with resume=last goes on",
                name,
                trainer.global_step,
            )
        else:
            log.warning("stopped by %s before a step was made", name)
        raise SystemExit(128 + number)
