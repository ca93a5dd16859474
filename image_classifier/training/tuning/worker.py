"""Workers: threads that claim trials, run each as a `train` of its own and tell the study how it ended."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from image_classifier.atomic_io import file_lock
from image_classifier.errors import StorageError, TrainingError
from image_classifier.program import child_command
from image_classifier.training.tuning.results import StudyPaths, remove_losing_runs
from image_classifier.training.tuning.space import SearchDimension
from image_classifier.training.tuning.storage import TROUBLE, one_line
from image_classifier.training.tuning.study import TuneSettings
from image_classifier.training.tuning.subprocess_run import TrialOutcome, TrialProcess, share
from image_classifier.training.tuning.trials import Owner, Trials, beating

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0  # at trials of other workers, when there is nothing else to do
_PATIENCE_S = 90.0  # for trials that were asked to stop: time to write their checkpoints
_NUM_TELLING_FAILURES = 3


@dataclass(frozen=True)
class TrialPlan:
    """What every trial of a study shares: its space, the words before and after a trial's own on the command line, its folders."""

    space: tuple[SearchDimension, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]
    places: StudyPaths
    program: tuple[str, ...] = (*child_command(), "train")

    def command(self, trial: optuna.trial.BaseTrial) -> list[str]:
        """The `train` of one trial; it goes on from its newest checkpoint where an earlier attempt left one."""
        run = self.places.name(trial.number)
        own = [entry.override(trial.params[entry.key]) for entry in self.space]
        again: list[str] = []
        if trial.user_attrs["attempts"] > 1:
            again = ["resume=last" if self.places.has_checkpoint(trial.number) else "overwrite=true"]
        return [*self.program, *self.first, *own, *self.last, f"name={run}", *again]


class Workers:
    """All workers of this process.

    Args:
        trials: The study.
        asked: Its settings.
        plan: What its trials share.
        owner: This process.
    """

    def __init__(self, trials: Trials, asked: TuneSettings, plan: TrialPlan, owner: Owner) -> None:
        self.trials, self.asked, self.plan, self.owner = trials, asked, plan, owner
        self._running: dict[int, TrialProcess] = {}
        self._ending = threading.Event()
        self._num_failures = 0

    def run(self) -> None:
        """Run trials until the budget is used up, waiting for those of other workers; on Ctrl-C or an error all stop and are given back.

        Raises:
            TrainingError: The first trials all failed.
        """
        deadline = time.monotonic() + (self.asked.max_seconds or math.inf)
        with ThreadPoolExecutor(self.asked.workers) as pool:
            futures = [pool.submit(self._work, worker) for worker in range(self.asked.workers)]
            try:
                self._watch(futures, deadline)
            finally:
                self._stop(futures)
        for future in futures:
            future.result()

    def _watch(self, futures: Sequence[Future[None]], deadline: float) -> None:
        while not all(future.done() for future in futures):
            done, _ = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                return
            if time.monotonic() > deadline:
                log.info("tune.max_time is over; unfinished trials go on with the same command")
                return

    def _stop(self, futures: Sequence[Future[None]]) -> None:
        """Ask what still runs to keep its newest step and end; for good after a while, or at a second Ctrl-C."""
        self._ending.set()
        try:
            for process in list(self._running.values()):
                process.stop()
            wait(futures, timeout=_PATIENCE_S)
        finally:
            for process in list(self._running.values()):
                process.stop(at_once=True)

    def _work(self, worker: int) -> None:
        try:
            self._claim_and_run(worker)
        except TROUBLE as error:
            raise StorageError(
                f"tune.storage does not answer ({one_line(error)})",
                "nothing is lost: run the same command when it does",
            ) from error

    def _claim_and_run(self, worker: int) -> None:
        waited = False
        while not self._ending.is_set():
            alive = self.trials.take_up_dead(self.owner)
            trial = self.trials.claim(
                {entry.key: entry.distribution for entry in self.plan.space}, self.asked.num_trials, self.owner
            )
            if trial is not None:
                self._run_trial(trial, worker)
            elif alive:
                if not waited:
                    log.info(
                        "waiting for what other workers are running: %s",
                        ", ".join(f"trial {number}" for number in alive),
                    )
                waited = True
                self._ending.wait(_LOOK_EVERY_S)
            else:
                return

    def _run_trial(self, trial: optuna.Trial, worker: int) -> None:
        number, places = trial.number, self.plan.places
        start = time.monotonic()
        with beating(trial):
            with file_lock(
                places.lock(number)
            ):  # an earlier attempt whose worker was killed may still be writing its checkpoint
                earlier = self.trials.one(number).intermediate_values
            if places.bundle(number).exists() and earlier:  # and all that was missing is that the study knows
                ending, values = TrialOutcome(), dict(earlier)
            else:
                values = dict(earlier) if places.has_checkpoint(number) else {}
                ending = self._train(trial, worker, values, set(earlier))
        trial.set_user_attr("seconds", round(trial.user_attrs.get("seconds", 0.0) + time.monotonic() - start, 1))
        self._tell(trial, ending, values)
        remove_losing_runs(self.trials.trials(), self.asked, places)

    def _train(self, trial: optuna.Trial, worker: int, values: dict[int, float], known: set[int]) -> TrialOutcome:
        process = TrialProcess(
            self.plan.command(trial), self.plan.places.log(trial.number), share(worker, self.asked.workers)
        )
        self._running[trial.number] = process
        if self._ending.is_set():
            process.stop()
        log.info(
            "trial %d: %s",
            trial.number,
            "  ".join(entry.override(trial.params[entry.key]) for entry in self.plan.space),
        )
        try:
            return process.run(lambda step, value: self._report(trial, step, value, values, known))
        finally:
            del self._running[trial.number]

    def _report(self, trial: optuna.Trial, step: int, value: float, values: dict[int, float], known: set[int]) -> bool:
        """Note one validation; whether the trial is worth no more."""
        values[step] = value
        try:
            if step not in known:
                trial.report(value, step)
            return trial.should_prune()
        except TROUBLE as error:
            log.warning(
                "trial %d goes on, though the study's database does not answer (%s)", trial.number, one_line(error)
            )
            return False

    def _tell(self, trial: optuna.Trial, ending: TrialOutcome, values: dict[int, float]) -> None:
        number = trial.number
        if ending.interrupted:
            log.info("trial %d: interrupted; it goes on later", number)
            self.trials.give_back(number, is_ours=self._ending.is_set())
        elif ending.pruned:
            self.trials.prune(number)
            log.info("trial %d: pruned at %.4f (validation %d)", number, values[max(values)], max(values))
        elif ending.reason:
            self._fail(number, ending.reason)
        else:
            self._complete(trial, values)

    def _complete(self, trial: optuna.Trial, values: dict[int, float]) -> None:
        """The trial's value is its best validation: that epoch's weights are what the run has kept."""
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if not finite:
            self._fail(trial.number, f"it reported no {self.asked.metric}")
            return
        step = (max if self.asked.maximise else min)(finite, key=lambda step: finite[step])
        trial.set_user_attr("validation", step)
        self.trials.complete(trial.number, finite[step])
        log.info(
            "trial %d: %s %.4f (validation %d of %d)", trial.number, self.asked.metric, finite[step], step, max(values)
        )

    def _fail(self, number: int, reason: str) -> None:
        self.trials.fail(number, reason)
        log.warning("trial %d failed: %s", number, reason)
        self._num_failures += 1
        if self._num_failures >= _NUM_TELLING_FAILURES and not self.trials.trials(
            TrialState.COMPLETE, TrialState.PRUNED
        ):
            raise TrainingError(
                f"the first {self._num_failures} trials all failed, the last with: {reason}",
                f"see {self.plan.places.folder}/",
            )
