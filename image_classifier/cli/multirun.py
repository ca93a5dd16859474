"""One job of a sweep (`-m`), in this process, in a process of joblib or on a machine of SLURM."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from image_classifier.cli.options import CommandLine, translate
from image_classifier.errors import ClassifierError

log = logging.getLogger(__name__)

Task = Callable[[DictConfig], object]


class Escape(BaseException):
    """An error of the task on its way through Hydra, which would print and swallow an Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Sent(Exception):
    """An error in another process, which Hydra keeps until all jobs are done; unpickled it is an `Escape`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        # Errors of other packages may not survive pickling.
        is_ours = isinstance(error, ClassifierError)
        self.error = error if is_ours else RuntimeError(f"{type(error).__name__}: {error}")

    def __reduce__(self) -> tuple[type[Escape], tuple[Exception]]:
        return Escape, (self.error,)


def guarded(verb: str, task: Task, on_launch: Callable[[], None]) -> Task:
    """Return the task for Hydra: it runs with a full command line in sys.argv, and its errors reach `run_verb`.

    In another process a job that fails logs its error there and stops no other job.
    """
    argv = list(sys.argv)
    home = _this_process()

    def run(config: DictConfig) -> object:
        sys.argv[:] = _line_of_job(verb, argv)
        launched = home != _this_process()
        if launched:
            on_launch()
        try:
            return task(config)
        except Exception as error:
            if not launched:
                raise Escape(error) from None
            overrides = " ".join(HydraConfig.get().overrides.task)
            log.error(
                "the job %s failed: %s",
                overrides,
                error,
                exc_info=None if isinstance(error, ClassifierError) else error,
            )
            raise _Sent(error) from None

    return run


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _line_of_job(verb: str, full: list[str]) -> list[str]:
    """Return the command line that runs this job alone, with its own overrides: its ranks are started with it."""
    running = HydraConfig.get()
    if running.mode != RunMode.MULTIRUN:
        return full
    flags = tuple(flag for flag in translate(verb, full[2:]).flags if flag[0] != "--multirun")
    paths = [override for override in running.overrides.hydra if override.startswith("hydra.searchpath")]
    return [full[0], verb, *CommandLine(flags, (*paths, *running.overrides.task)).argv()]
