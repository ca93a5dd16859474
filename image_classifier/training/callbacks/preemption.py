"""SIGTERM, Ctrl-C and SLURM's warning: finish the step, save a checkpoint, exit with 128 + the signal's number.

Lightning 2.6 looks at a signal only after some steps, saves nothing by itself, and then exits with 0, as if the work
were done.
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

from image_classifier.training.callbacks.checkpoints import STEPS_BETWEEN_CHECKS, BetweenSteps, last_checkpoint
from image_classifier.training.callbacks.exact_resume import is_accumulating
from image_classifier.training.distributed import gather, is_rank_zero, world_size
from image_classifier.training.lightning_compat import callbacks_of, keep_signal_handlers

log = logging.getLogger(__name__)

_ECHO_S = 5.0  # launchers, tuners and systemd each pass on the same SIGTERM within this time
_HOW_TO_RESUME = "run the same command with resume=last to continue"


class SignalHandler:
    """Handler of signals to this process: at once, or, during training, after the step under way."""

    def __init__(self) -> None:
        self.received = 0  # number of the first signal
        self._is_deferred = False
        self._pid = os.getpid()
        self._received_at_s = 0.0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """End the block in an orderly way at a signal, at once at the second one.

        A repeated SIGTERM soon after the first does not count: several senders may pass it on.
        """
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
        """Only remember the first signal in this block, whose code checks `received` between its steps."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        # A signal that came after the last check.
        if self.received:
            _write_stderr(f"stopped by {_name_of(self.received)} after the last step; {_HOW_TO_RESUME}")
            raise SystemExit(128 + self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked worker process inherits this handler: give it the default one.
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_first = not self.received
        now = time.monotonic()
        # An echo of the first SIGTERM.
        if not is_first and self._is_deferred and number == signal.SIGTERM and now - self._received_at_s < _ECHO_S:
            return
        self.received = number
        self._received_at_s = now
        # The first signal during training: the step under way is finished.
        if is_first and self._is_deferred:
            if is_rank_zero():
                _write_stderr(f"{_name_of(number)}: finishing the step under way; send it again to stop at once")
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        # The other ranks are stopped by the launcher too, also where rank 0 has already said what is wrong.
        if is_rank_zero():
            _write_stderr(f"stopped by {_name_of(number)}")
        raise SystemExit(128 + number)


def _name_of(number: int) -> str:
    return signal.Signals(number).name


def _write_stderr(line: str) -> None:
    """Write a line without the locks of sys.stderr and logging, which a signal handler must not wait for."""
    os.write(2, f"{line}\n".encode())


def slurm_job() -> str:
    """Return the SLURM job of this process, the same after a requeue; empty outside of SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}" if array else os.environ.get("SLURM_JOB_ID", "")


def slurm_warnings() -> list[signal.Signals]:
    """Return the signals by which SLURM, or submitit on top of it, warns that the job's time is nearly used up."""
    if not slurm_job():
        return []
    names = {"USR1", os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")}
    return [signal.Signals[f"SIG{name}"] for name in sorted(names)]


def _requeue() -> None:
    """Ask SLURM to start this job again; it finds its run folder by the job's number."""
    try:
        done = subprocess.run(["scontrol", "requeue", slurm_job()], capture_output=True, text=True, timeout=60)
        reason = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        log.error("SLURM did not requeue job %s (%s); continue by hand with resume=last", slurm_job(), reason)
    else:
        log.warning("SLURM job %s is back in the queue and will continue by itself", slurm_job())


class StopOnSignal(BetweenSteps):
    """Saves a checkpoint and ends the run between two steps when a signal has reached any of its processes."""

    def __init__(self, signals: SignalHandler) -> None:
        self.signals = signals

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        keep_signal_handlers(trainer)

    def between_steps(self, trainer: pl.Trainer, at_epoch_end: bool) -> None:
        self._check(trainer, at_rare_hook=at_epoch_end)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, at_rare_hook=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if world_size() > 1 or is_accumulating(trainer) or trainer.sanity_checking or not self.signals.received:
            return  # several processes finish the validation first
        # The checkpoint needs the weights being trained in the module, not the averages.
        for callback in callbacks_of(trainer, WeightAveraging):
            callback.on_validation_epoch_end(trainer, pl_module)
        self._stop(trainer, self.signals.received)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer, at_rare_hook=True)

    def _check(self, trainer: pl.Trainer, at_rare_hook: bool) -> None:
        if world_size() > 1 and not at_rare_hook and trainer.global_step % STEPS_BETWEEN_CHECKS:
            return
        if received := max(gather(self.signals.received)):
            self._stop(trainer, received)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        last = last_checkpoint(trainer)
        if last and trainer.global_step:
            last.save(trainer)
            log.warning(
                "stopped by %s after step %d, which is saved; %s",
                _name_of(number),
                trainer.global_step,
                _HOW_TO_RESUME,
            )
        else:
            log.warning("stopped by %s before the first step was complete", _name_of(number))
        raise SystemExit(128 + number)
