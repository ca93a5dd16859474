"""The trials of a study: claimed one by one by many workers, and taken up again where a worker died."""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from image_classifier.atomic_io import file_lock
from image_classifier.training.tuning.storage import TROUBLE, patiently

log = logging.getLogger(__name__)

BEAT_S, DEAD_AFTER_S = 10.0, 60.0
MAX_ATTEMPTS = 5


class Trials:
    """An Optuna study whose budget is the numbers of its trials: those below `num_trials`, whoever runs them."""

    def __init__(self, study: optuna.Study, storage: Any) -> None:
        self.study, self._storage = study, storage
        self._id = storage.get_study_id_from_name(study.study_name)
        self._claiming = threading.Lock()
        self._seen: dict[int, tuple[Any, float]] = {}  # the last beat of others' trials and when it was new

    def trials(self, *states: TrialState) -> Sequence[FrozenTrial]:
        """The trials by number, all or those in one of the states."""
        return patiently(lambda: self.study.get_trials(deepcopy=False, states=states or None))

    def claim(self, space: dict[str, BaseDistribution], num_trials: int | None, owner: Owner) -> optuna.Trial | None:
        """The next trial: one that was given back, else a new one; None where the budget is used up."""
        with self._claiming:
            trials = self.trials()
            waiting = any(trial.state is TrialState.WAITING and _is_within(trial, num_trials) for trial in trials)
            if not waiting and num_trials is not None and len(trials) >= num_trials:
                return None
            trial = patiently(lambda: self.study.ask(space))
            if not _is_within(trial, num_trials):  # another worker was quicker
                self._set_waiting(trial.number)
                return None
            attempts = trial.user_attrs.get("attempts", 0) + 1
            for key, value in (("owner", owner.name), ("attempts", attempts), ("beat", 0)):
                trial.set_user_attr(key, value)
            return trial

    def one(self, number: int) -> FrozenTrial:
        """The trial of that number."""
        return next(trial for trial in self.trials() if trial.number == number)

    def give_back(self, number: int, is_ours: bool = False) -> None:
        """Let another worker, or this one later, run a trial again under the same number.

        A trial whose process died too often fails for good; an attempt that ended because we stopped it (`is_ours`) does not count.
        """
        attempts = self.one(number).user_attrs.get("attempts", 0) - is_ours
        if attempts >= MAX_ATTEMPTS:
            return self.fail(number, f"its process died {attempts} times")
        patiently(lambda: self._storage.set_trial_user_attr(self._id_of(number), "attempts", attempts))
        return self._set_waiting(number)

    def _set_waiting(self, number: int) -> None:
        patiently(lambda: self._storage.set_trial_state_values(self._id_of(number), state=TrialState.WAITING))

    def _id_of(self, number: int) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._id, number))

    def complete(self, number: int, value: float) -> None:
        """The trial's outcome."""
        self._tell(number, value, TrialState.COMPLETE)

    def prune(self, number: int) -> None:
        """The trial was stopped as not worth more."""
        self._tell(number, None, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """The trial failed; the study goes on."""
        patiently(lambda: self._storage.set_trial_user_attr(self._id_of(number), "reason", reason))
        self._tell(number, None, TrialState.FAIL)

    def _tell(self, number: int, value: float | None, state: TrialState) -> None:
        try:
            patiently(lambda: self.study.tell(number, value, state=state))
        except ValueError as error:  # another worker took this one for dead and ran its trial
            log.warning("trial %d is not this worker's any more (%s)", number, error)

    def take_up_dead(self, owner: Owner) -> list[int]:
        """Give back the trials of dead workers; returns the numbers of those that others are still running."""
        alive = []
        for trial in self.trials(TrialState.RUNNING):
            if trial.user_attrs.get("owner") == owner.name:
                continue
            if self._is_dead(trial, owner):
                log.info("trial %d: its worker died; it is run again", trial.number)
                self.give_back(trial.number)
            else:
                alive.append(trial.number)
        return alive

    def _is_dead(self, trial: FrozenTrial, owner: Owner) -> bool:
        """Known at once of workers on this machine; of others when their beat has not moved for a while, by this machine's clock."""
        theirs = trial.user_attrs.get("owner")
        if theirs is not None and owner.is_gone(theirs):
            return True
        beat = (theirs, trial.user_attrs.get("beat"))
        known, since = self._seen.get(trial.number, (None, 0.0))
        if known != beat:
            self._seen[trial.number] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > DEAD_AFTER_S


def _is_within(trial: FrozenTrial | optuna.Trial, num_trials: int | None) -> bool:
    return num_trials is None or trial.number < num_trials


@dataclass(frozen=True)
class Owner:
    """This process as the owner of trials: its name, and the folder where it holds a lock file of that name while it lives."""

    name: str
    folder: Path

    def is_gone(self, name: str) -> bool:
        """Whether an owner on this machine has ended; False where that cannot be known."""
        path = self.folder / f".{name}.lock"
        if name.rpartition("-")[0] != socket.gethostname() or not path.exists():
            return False
        try:
            with file_lock(path, wait=False):
                path.unlink()
        except BlockingIOError:
            return False
        return True


@contextmanager
def owner_in(folder: Path) -> Iterator[Owner]:
    """An owner for this process, whose lock file the system lets go of however the process ends."""
    owner = Owner(f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}", folder)
    path = folder / f".{owner.name}.lock"
    with ExitStack() as stack:
        stack.enter_context(file_lock(path))
        stack.callback(path.unlink, missing_ok=True)
        yield owner


@contextmanager
def beating(trial: optuna.Trial) -> Iterator[None]:
    """Say every few seconds that the trial is alive, for as long as the block runs."""
    done = threading.Event()

    def beat() -> None:
        number = 0
        while not done.wait(BEAT_S):
            number += 1
            try:
                trial.set_user_attr("beat", number)
            except (*TROUBLE, optuna.exceptions.UpdateFinishedTrialError) as error:
                log.debug("trial %d: no beat (%s)", trial.number, error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
