"""One job of a sweep (`-m`), wherever a launcher runs it: in this process, in joblib's beside it, on a machine of SLURM's."""

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
    """Carries an error of the task past Hydra, which would print and swallow an Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Sent(Exception):
    """An error in another process, which Hydra keeps until all jobs are done; in the process that waits for them it escapes."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = (
            error if isinstance(error, ClassifierError) else RuntimeError(f"{type(error).__name__}: {error}")
        )  # others may not travel

    def __reduce__(self) -> tuple[type[Escape], tuple[Exception]]:
        return Escape, (self.error,)


def guarded(verb: str, task: Task, on_arrival: Callable[[], None]) -> Task:
    """The task as Hydra is to run it: with a full command line in sys.argv, and with errors that reach `run_verb`.

    Where it arrives in another process, a job that fails says so there and stops no other.
    """
    full, home = list(sys.argv), _this_process()

    def run(config: DictConfig) -> object:
        sys.argv[:] = _line_of_job(verb, full)
        launched = home != _this_process()
        if launched:
            on_arrival()
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
    """The command line that runs this job alone, from which its ranks are started: in a sweep with the job's own overrides."""
    running = HydraConfig.get()
    if running.mode != RunMode.MULTIRUN:
        return full
    flags = tuple(flag for flag in translate(verb, full[2:]).flags if flag[0] != "--multirun")
    paths = [override for override in running.overrides.hydra if override.startswith("hydra.searchpath")]
    return [full[0], verb, *CommandLine(flags, (*paths, *running.overrides.task)).argv()]
