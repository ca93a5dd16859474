"""Workers of a study: threads that claim trials, run each as a `train` process, and record how it ended."""

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
from image_classifier.training.tuning.trials import Owner, Trials

log = logging.getLogger(__name__)

_POLL_S = 2.0  # between looks at other workers' trials, when there is nothing else to do
_STOP_TIMEOUT_S = 90.0  # for stopped trials to write their checkpoints
_MAX_FIRST_FAILURES = 3


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a study share.

    Attributes:
        space: The search space.
        first: Words of the command line before a trial's own.
        last: Words after them.
        paths: Where the runs keep their files.
        program: The start of the command line.
    """

    space: tuple[SearchDimension, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]
    paths: StudyPaths
    program: tuple[str, ...] = (*child_command(), "train")

    def command(self, trial: optuna.trial.BaseTrial) -> list[str]:
        """Return the command line of one trial; it resumes from its newest checkpoint where there is one."""
        resume: list[str] = []
        if trial.user_attrs["attempts"] > 1:
            resume = ["resume=last" if self.paths.has_checkpoint(trial.number) else "overwrite=true"]
        name = f"name={self.paths.name(trial.number)}"
        return [*self.program, *self.first, *self.overrides(trial), *self.last, name, *resume]

    def overrides(self, trial: optuna.trial.BaseTrial) -> list[str]:
        """Return the trial's values as overrides."""
        return [dimension.override(trial.params[dimension.key]) for dimension in self.space]


class Workers:
    """All workers of this process.

    Args:
        trials: The study.
        settings: The keys of `tune`.
        plan: What its trials share.
        owner: This process.
    """

    def __init__(self, trials: Trials, settings: TuneSettings, plan: TrialPlan, owner: Owner) -> None:
        self.trials = trials
        self.settings = settings
        self.plan = plan
        self.owner = owner
        self._running: dict[int, TrialProcess] = {}
        self._is_ending = threading.Event()
        self._num_failures = 0

    def run(self) -> None:
        """Run trials until the budget is used up, and wait for those of other workers.

        On Ctrl-C, an error or the end of `max_time` all trials are stopped and requeued.

        Raises:
            TrainingError: The first trials all failed.
            StorageError: The database does not answer.
        """
        deadline = time.monotonic() + (self.settings.max_seconds or math.inf)
        with ThreadPoolExecutor(self.settings.workers) as pool:
            futures = [pool.submit(self._work, worker) for worker in range(self.settings.workers)]
            try:
                self._wait(futures, deadline)
            finally:
                self._stop(futures)
        for future in futures:
            future.result()

    def _wait(self, futures: Sequence[Future[None]], deadline: float) -> None:
        while not all(future.done() for future in futures):
            done, _ = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                return
            if time.monotonic() > deadline:
                log.info("tune.max_time is over; run the same command to continue the unfinished trials")
                return

    def _stop(self, futures: Sequence[Future[None]]) -> None:
        """Let running trials save their newest step and end; kill them after a while, or at a second Ctrl-C."""
        self._is_ending.set()
        try:
            for process in list(self._running.values()):
                process.stop()
            wait(futures, timeout=_STOP_TIMEOUT_S)
        finally:
            for process in list(self._running.values()):
                process.stop(at_once=True)

    def _work(self, worker: int) -> None:
        try:
            self._claim_and_run(worker)
        except TROUBLE as error:
            raise StorageError(
                f"the database tune.storage does not answer ({one_line(error)})",
                "nothing is lost: run the same command when it does",
            ) from error

    def _claim_and_run(self, worker: int) -> None:
        space = {dimension.key: dimension.distribution for dimension in self.plan.space}
        has_waited = False
        while not self._is_ending.is_set():
            # Trials of dead workers come first: they are in the queue for the claim.
            alive = self.trials.requeue_dead(self.owner)
            trial = self.trials.claim(space, self.settings.num_trials, self.owner)
            if trial is not None:
                self._run_trial(trial, worker)
            elif alive:
                # The budget is used up, but a worker that runs one of its trials may still die.
                if not has_waited:
                    log.info("waiting for other workers: %s", ", ".join(f"trial {number}" for number in alive))
                has_waited = True
                self._is_ending.wait(_POLL_S)
            else:
                return

    def _run_trial(self, trial: optuna.Trial, worker: int) -> None:
        number = trial.number
        paths = self.plan.paths
        start = time.monotonic()
        with self.trials.heartbeat(number):
            # The run of an earlier attempt, whose worker was killed, may still be writing its checkpoint.
            with file_lock(paths.lock(number)):
                earlier = self.trials.one(number).intermediate_values
            if paths.bundle(number).exists() and earlier:
                # The run had ended; only the study does not know it.
                outcome, values = TrialOutcome(), dict(earlier)
            else:
                values = dict(earlier) if paths.has_checkpoint(number) else {}
                outcome = self._train(trial, worker, values, set(earlier))
        trial.set_user_attr("seconds", round(trial.user_attrs.get("seconds", 0.0) + time.monotonic() - start, 1))
        self._record(trial, outcome, values)
        remove_losing_runs(self.trials.trials(), self.settings, paths)

    def _train(self, trial: optuna.Trial, worker: int, values: dict[int, float], known: set[int]) -> TrialOutcome:
        """Run the trial's process; add its validations to `values`, and report those that are not `known`."""
        environment = share(worker, self.settings.workers)
        process = TrialProcess(self.plan.command(trial), self.plan.paths.log(trial.number), environment)
        self._running[trial.number] = process
        if self._is_ending.is_set():
            process.stop()
        log.info("trial %d: %s", trial.number, "  ".join(self.plan.overrides(trial)))
        try:
            return process.run(lambda step, value: self._report(trial, step, value, values, known))
        finally:
            del self._running[trial.number]

    def _report(self, trial: optuna.Trial, step: int, value: float, values: dict[int, float], known: set[int]) -> bool:
        """Record one validation; return whether the trial is to be pruned."""
        values[step] = value
        try:
            if step not in known:
                trial.report(value, step)
            return trial.should_prune()
        except TROUBLE as error:
            message = "trial %d continues, though the study's database does not answer (%s)"
            log.warning(message, trial.number, one_line(error))
            return False

    def _record(self, trial: optuna.Trial, outcome: TrialOutcome, values: dict[int, float]) -> None:
        number = trial.number
        if outcome.interrupted:
            log.info("trial %d: interrupted; it continues later", number)
            self.trials.requeue(number, stopped_by_us=self._is_ending.is_set())
        elif outcome.pruned:
            self.trials.prune(number)
            log.info("trial %d: pruned at %.4f (validation %d)", number, values[max(values)], max(values))
        elif outcome.reason:
            self._fail(number, outcome.reason)
        else:
            self._complete(trial, values)

    def _complete(self, trial: optuna.Trial, values: dict[int, float]) -> None:
        """Record the best validation as the trial's value: the run has kept the weights of that epoch."""
        metric = self.settings.metric
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if not finite:
            self._fail(trial.number, f"it reported no {metric}")
            return
        best = max if self.settings.maximise else min
        step = best(finite, key=lambda step: finite[step])
        trial.set_user_attr("validation", step)
        self.trials.complete(trial.number, finite[step])
        log.info("trial %d: %s %.4f (validation %d of %d)", trial.number, metric, finite[step], step, max(values))

    def _fail(self, number: int, reason: str) -> None:
        self.trials.fail(number, reason)
        log.warning("trial %d failed: %s", number, reason)
        self._num_failures += 1
        has_success = bool(self.trials.trials(TrialState.COMPLETE, TrialState.PRUNED))
        if self._num_failures >= _MAX_FIRST_FAILURES and not has_success:
            raise TrainingError(
                f"the first {self._num_failures} trials all failed, the last with: {reason}",
                f"see {self.plan.paths.folder}/",
            )
