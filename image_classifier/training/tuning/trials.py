"""Trials of a study: claimed one by one by many workers, and requeued where a worker has died."""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from image_classifier.atomic_io import file_lock
from image_classifier.training.tuning.storage import TROUBLE, patiently, stale_trial_ids

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5


class Trials:
    """An Optuna study whose budget is the numbers of its trials: those below `num_trials`, whoever runs them.

    Optuna's heartbeat tells which workers have died. What Optuna does about their trials is replaced: it fails a stale
    trial for good and adds a copy under a new number. Here the trial waits again under its own number, so that it
    resumes from its checkpoint, counts once in the budget, and is one row of every table.
    """

    def __init__(self, study: optuna.Study, storage: RDBStorage) -> None:
        self.study = study
        self.storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._claiming = threading.Lock()
        self._watched: set[int] = set()  # numbers of other workers' trials that were seen running

    def trials(self, *states: TrialState) -> Sequence[FrozenTrial]:
        """Return the trials by number, all or those in one of the states."""
        return patiently(lambda: self.study.get_trials(deepcopy=False, states=states or None))

    def claim(self, space: dict[str, BaseDistribution], num_trials: int | None, owner: Owner) -> optuna.Trial | None:
        """Return the next trial: one that waits to be run again, else a new one; None where the budget is used up."""
        with self._claiming:
            trials = self.trials()
            is_waiting = any(trial.state is TrialState.WAITING and _is_within(trial, num_trials) for trial in trials)
            if not is_waiting and num_trials is not None and len(trials) >= num_trials:
                return None
            trial = patiently(lambda: self.study.ask(space))
            # Another worker may have been quicker: a trial beyond the budget waits for a larger one.
            if not _is_within(trial, num_trials):
                self._set_waiting(trial.number)
                return None
            self.record_heartbeat(trial.number)
            trial.set_user_attr("owner", owner.name)
            trial.set_user_attr("attempts", trial.user_attrs.get("attempts", 0) + 1)
            return trial

    def one(self, number: int) -> FrozenTrial:
        """Return the trial of that number."""
        return next(trial for trial in self.trials() if trial.number == number)

    def requeue(self, number: int, stopped_by_us: bool = False) -> None:
        """Let another worker, or this one later, run a trial again under the same number.

        A trial whose process died too often fails for good. An attempt that ended because this command was stopped
        (`stopped_by_us`) does not count.
        """
        attempts = self.one(number).user_attrs.get("attempts", 0) - stopped_by_us
        if attempts >= MAX_ATTEMPTS:
            return self.fail(number, f"its process died {attempts} times")
        patiently(lambda: self.storage.set_trial_user_attr(self._id_of(number), "attempts", attempts))
        # Else the next worker's trial would be stale for the moment between its claim and its first heartbeat.
        self.record_heartbeat(number)
        return self._set_waiting(number)

    def _set_waiting(self, number: int) -> None:
        patiently(lambda: self.storage.set_trial_state_values(self._id_of(number), state=TrialState.WAITING))

    def _id_of(self, number: int) -> int:
        return int(self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number))

    def complete(self, number: int, value: float) -> None:
        """Record the trial's value."""
        self._tell(number, value, TrialState.COMPLETE)

    def prune(self, number: int) -> None:
        """Record that the trial was pruned."""
        self._tell(number, None, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Record that the trial failed; the study continues."""
        patiently(lambda: self.storage.set_trial_user_attr(self._id_of(number), "reason", reason))
        self._tell(number, None, TrialState.FAIL)

    def _tell(self, number: int, value: float | None, state: TrialState) -> None:
        try:
            patiently(lambda: self.study.tell(number, value, state=state))
        except ValueError as error:
            log.warning("trial %d: its result is dropped, as another worker has finished it (%s)", number, error)

    def requeue_dead(self, owner: Owner) -> list[int]:
        """Requeue the trials of dead workers; return the numbers of those that other workers are still running."""
        stale = patiently(lambda: stale_trial_ids(self.storage, self._study_id))
        alive = []
        for trial in self.trials(TrialState.RUNNING):
            name = trial.user_attrs.get("owner")
            if name == owner.name:
                continue
            # Workers on this machine are known to be dead at once, others by their last heartbeat.
            if (name is not None and owner.is_gone(name)) or self._id_of(trial.number) in stale:
                log.info("trial %d: its worker died; it is run again", trial.number)
                self._watched.discard(trial.number)
                self.requeue(trial.number)
            else:
                self._watch(trial.number)
                alive.append(trial.number)
        return alive

    def _watch(self, number: int) -> None:
        """Record one heartbeat for another worker's trial, when it is first seen here.

        A trial without any heartbeat is never stale for Optuna: one whose worker was killed in the moment of its claim,
        or one of a study begun by an older version. From now on it is stale like any other.
        """
        if number not in self._watched:
            self.record_heartbeat(number)
            self._watched.add(number)

    def record_heartbeat(self, number: int) -> None:
        """Record in the database that the trial's worker is alive."""
        patiently(lambda: self.storage.record_heartbeat(self._id_of(number)))

    @contextmanager
    def heartbeat(self, number: int) -> Iterator[None]:
        """Record the trial's heartbeat at intervals while the block runs.

        Optuna's own thread ends at the first error of the database, and a living trial would then be taken for dead.
        """
        interval_s = self.storage.get_heartbeat_interval()
        trial_id = self._id_of(number)
        is_done = threading.Event()

        def beat() -> None:
            while not is_done.wait(interval_s):
                try:
                    self.storage.record_heartbeat(trial_id)
                except TROUBLE as error:
                    log.debug("trial %d: no heartbeat (%s)", number, error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()


def _is_within(trial: FrozenTrial | optuna.Trial, num_trials: int | None) -> bool:
    return num_trials is None or trial.number < num_trials


@dataclass(frozen=True)
class Owner:
    """A process that runs trials: its name, and the folder where it holds a lock file of that name while it lives.

    By the lock file other commands on this machine know at once that it has died; a heartbeat takes a minute.
    """

    name: str
    folder: Path

    def is_gone(self, name: str) -> bool:
        """Return whether another owner, on this machine, has ended; False where that cannot be known."""
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
    """Yield an owner for this process; the system releases its lock file however the process ends."""
    owner = Owner(f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}", folder)
    path = folder / f".{owner.name}.lock"
    with ExitStack() as stack:
        stack.enter_context(file_lock(path))
        stack.callback(path.unlink, missing_ok=True)
        yield owner
