"""The scheduler of one job as a pure state machine: events in, instructions out, no input or output of its own.

A job goes through its tasks like this: every task's fallback schedule is measured (the baseline); tunable tasks are
searched, several at once and two batches in flight each, the trials going where they shorten the model most; when a
task's trials are over its best candidates are measured again alone, checked against a reference and published; at the
end the whole model is measured.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tuner_core.allocation.budget import MIN_TRIALS, TaskHistory, new_trials, tasks_worth_trials
from tuner_core.allocation.gradient import gain_per_trial
from tuner_core.model import FailureKind, JobState, TaskState
from tuner_server.scheduler import messages as m

HOPELESS_FACTOR = 1.5
"""A candidate whose first sample is slower than this many times the best gets no more samples."""
MAX_SESSION_LOSSES = 3
WORTH_WAITING_FOR = 0.25
"""A free task that gains less than this share of what a busy one gains does not get its batch now."""


@dataclass(frozen=True)
class TaskPlan:
    """A task as the job describes it."""

    name: str
    weight: int
    tunable: bool


@dataclass(frozen=True)
class Limits:
    """How much is in flight.

    Attributes:
        batch: Candidates per batch.
        batches_per_task: Batches in flight per task: generated, building or being measured.
        batches_at_once: Batches in flight of all tasks together.
        top_k: Candidates measured again at the end of a task.
    """

    batch: int = 16
    batches_per_task: int = 2
    batches_at_once: int = 4
    top_k: int = 8


@dataclass
class _Batch:
    asked: int
    waiting: set[str] = field(default_factory=set)
    results: list[m.KnownTrial] = field(default_factory=list)
    generated: bool = False


@dataclass
class TaskProgress:
    """What is known of one task; read by the status report, written by the machine only."""

    plan: TaskPlan
    state: TaskState = TaskState.PENDING
    baseline_us: float | None = None
    baseline_trace: str | None = None
    best_us: float | None = None
    best_trace: str | None = None
    best_trial_id: str = ""
    verified: bool = False
    measured: int = 0
    reused: int = 0
    failures: Counter[FailureKind] = field(default_factory=Counter)
    error: str = ""

    results: dict[str, float] = field(default_factory=dict)
    known: tuple[m.KnownTrial, ...] = ()
    history_us: list[float] = field(default_factory=list)
    batches: dict[int, _Batch] = field(default_factory=dict)
    session_open: bool = False
    session_losses: int = 0
    exhausted: bool = False
    new_trials: int = 0
    chosen: bool = False
    promoting: bool = False
    promoted: list[m.KnownTrial] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    published: m.KnownTrial | None = None
    published_is_fallback: bool = False

    @property
    def failed(self) -> int:
        """Trials of this job that failed."""
        return sum(self.failures.values())


class JobMachine:
    """State of one job.

    Args:
        tasks: The job's tasks.
        trials: The whole job's trial budget.
        limits: How much is in flight.
    """

    def __init__(self, tasks: Sequence[TaskPlan], trials: int, limits: Limits) -> None:
        self.tasks = [TaskProgress(plan) for plan in tasks]
        self.limits = limits
        self.trials = trials
        self.unassigned = 0
        self.phase = "starting"
        self.finished: m.Finish | None = None
        self.model: m.ModelMeasured | None = None
        self._baselines_missing: set[int] = set()
        self._batch_ids = itertools.count()
        self._measuring_model = False
        self._warned_budget = False

    # Entry point

    def handle(self, event: m.Event) -> list[m.Instruction]:
        """Take in one event; what is to be done now comes out. Events after the end are ignored."""
        if self.finished is not None:
            return []
        out: list[m.Instruction] = []
        match event:
            case m.Started():
                self._start(event.known, out)
            case m.BaselineMeasured():
                self._baseline(event.task, m.KnownTrial(event.trace, event.median_us))
            case m.BaselineFailed():
                self.tasks[event.task].error = f"the fallback schedule failed: {event.message}"
                self._baselines_missing.discard(event.task)
            case m.CandidatesReady():
                self._candidates(event, out)
            case m.CannotSample():
                self._cannot_sample(event, out)
            case m.SessionLost():
                self._session_lost(event, out)
            case m.TrialMeasured():
                self._trial(event.task, event.batch, m.KnownTrial(event.trace, event.median_us), out)
            case m.TrialFailed():
                self.tasks[event.task].failures[event.kind] += 1
                self._trial(event.task, event.batch, m.KnownTrial(event.trace, None), out)
            case m.Promoted():
                self._promoted(event, out)
            case m.Checked():
                self._checked(event, out)
            case m.ModelMeasured():
                self.model = event
                self._finish(out)
                return out
            case m.CancelRequested():
                self.phase = "cancelled"
                self.finished = m.Finish(JobState.CANCELLED)
                out.append(self.finished)
                return out
        self._advance(out)
        return out

    # Start and baselines

    def _start(self, known: Mapping[int, m.Known], out: list[m.Instruction]) -> None:
        self.phase = "baseline"
        histories = []
        for index, task in enumerate(self.tasks):
            have = known.get(index, m.Known())
            if have.baseline is not None:
                self._baseline(index, have.baseline)
            else:
                self._baselines_missing.add(index)
                out.append(m.MeasureBaseline(index))
            if not task.plan.tunable:
                continue
            task.known = have.trials
            task.results = {trial.trace: trial.median_us for trial in have.trials if trial.median_us is not None}
            task.kept = set(self._ranked(task)[: self.limits.top_k])
            task.measured = have.own
            task.failures = Counter(have.own_failed)
            task.reused = len(have.trials) - have.own
            task.published = have.best_verified
            task.published_is_fallback = have.best_is_fallback
            task.best_trial_id = have.best_trial_id
            task.best_us = min(task.results.values(), default=None)
            if have.best_verified is not None:
                task.best_us = have.best_verified.median_us
            histories.append(TaskHistory(len(have.trials), have.best_verified is not None))
        self.unassigned = new_trials(self.trials, histories)
        reused = sum(task.reused for task in self.tasks)
        if reused:
            out.append(m.Say(f"the store holds {reused} trials of these operators; {self.unassigned} new ones follow"))

    def _baseline(self, index: int, trial: m.KnownTrial) -> None:
        task = self.tasks[index]
        task.baseline_us = trial.median_us
        task.baseline_trace = trial.trace
        self._baselines_missing.discard(index)

    def _choose(self, out: list[m.Instruction]) -> bool:
        """Decide which tasks get trials; False while that still waits for baselines."""
        open_tasks = {i: t for i, t in enumerate(self.tasks) if t.plan.tunable and t.state is TaskState.PENDING}
        undecided = {i: t for i, t in open_tasks.items() if not t.chosen}
        if not undecided or self._warned_budget:
            return True
        need = sum(max(0, MIN_TRIALS - len(t.known)) for t in undecided.values())
        if self.unassigned >= need:
            for task in undecided.values():
                task.chosen = True
            return True
        if self._baselines_missing:
            return False
        weighted = {i: t.plan.weight * (t.baseline_us or 0.0) for i, t in undecided.items()}
        chosen = tasks_worth_trials(
            self.unassigned, weighted, already_known={i: len(t.known) for i, t in undecided.items()}
        )
        for index in chosen:
            self.tasks[index].chosen = True
        self._warned_budget = True
        left_out = [t for t in undecided.values() if not t.chosen and not t.known]
        for task in left_out:
            task.error = "the trial budget is too small for this operator"
        if left_out:
            count = len(left_out)
            out.append(m.Say(f"{self.unassigned} trials are too few: {count} operators keep the fallback schedule"))
        return True

    # Search

    def _advance(self, out: list[m.Instruction]) -> None:
        if self.phase == "starting":
            return
        if self._choose(out):
            self._settle_unchosen()
            self._fill(out)
            self._end_tasks(out)
        if self.phase == "baseline" and not self._baselines_missing:
            self.phase = "search"
        self._settle_untunable()
        if all(task.state.final for task in self.tasks) and not self._baselines_missing and not self._measuring_model:
            self._measuring_model = True
            self.phase = "model"
            traces = {
                index: task.best_trace
                for index, task in enumerate(self.tasks)
                if task.best_trace is not None and task.state in (TaskState.TUNED, TaskState.REUSED)
            }
            out.append(m.MeasureModel(traces))

    def _settle_untunable(self) -> None:
        for index, task in enumerate(self.tasks):
            if task.plan.tunable or task.state.final or index in self._baselines_missing:
                continue
            if task.baseline_us is None:
                task.state = TaskState.FAILED
            else:
                task.state = TaskState.SKIPPED
                task.best_us = task.baseline_us

    def _settle_unchosen(self) -> None:
        for index, task in enumerate(self.tasks):
            settled = task.published is not None or task.known
            if task.plan.tunable and not task.state.final and not task.chosen and not settled:
                if index in self._baselines_missing:
                    continue
                task.state = TaskState.SKIPPED if task.baseline_us is not None else TaskState.FAILED
                task.best_us = task.baseline_us

    def _fill(self, out: list[m.Instruction]) -> None:
        while self.unassigned > 0:
            index = self._next_task()
            if index is None:
                return
            task = self.tasks[index]
            if not task.session_open:
                task.session_open = True
                task.state = TaskState.RUNNING
                out.append(m.OpenSession(index, self._all_known(task)))
            count = min(self.limits.batch, self.unassigned - self._reserved(index))
            batch = next(self._batch_ids)
            task.batches[batch] = _Batch(count)
            task.new_trials += count
            self.unassigned -= count
            out.append(m.Generate(index, batch, count))

    def _next_task(self) -> int | None:
        """The task that gets the next batch: first those that have none yet, then by the gradient.

        A task that would gain far less than one whose batches are all in flight waits, so that a full pipeline does
        not spend the budget on tasks that hardly matter; unless nothing else keeps the stages busy.
        """
        open_tasks = [
            index
            for index, task in enumerate(self.tasks)
            if task.chosen and not task.exhausted and not task.promoting and not task.state.final
        ]
        in_flight = sum(len(self.tasks[index].batches) for index in open_tasks)
        if in_flight >= self.limits.batches_at_once:
            return None
        gains = {index: self.gain(index) for index in open_tasks}
        free = [
            index
            for index in open_tasks
            if len(self.tasks[index].batches) < self.limits.batches_per_task and self.unassigned > self._reserved(index)
        ]
        if not free:
            return None
        best = max(free, key=lambda index: (gains[index], -index))
        finite = [gain for gain in gains.values() if gain != float("inf")]
        hardly_matters = gains[best] < WORTH_WAITING_FOR * max(finite, default=0.0)
        if hardly_matters and in_flight >= self.limits.batches_per_task:
            return None
        return best

    def _reserved(self, index: int) -> int:
        """Trials that stay reserved for the other tasks that have had none yet, so that each gets its minimum."""
        return sum(
            max(0, MIN_TRIALS - len(task.known))
            for other, task in enumerate(self.tasks)
            if other != index and task.chosen and task.new_trials == 0 and not task.exhausted and not task.state.final
        )

    def gain(self, index: int) -> float:
        """Expected reduction of the model's latency by the task's next trial, in microseconds.

        Infinite for a task that has had no trial at all. While its first ones are out, the optimistic guess from the
        baseline stands in for what they will say.
        """
        task = self.tasks[index]
        if task.new_trials == 0 and not task.known:
            return float("inf")
        history = task.history_us
        if len(history) < 2:
            start = task.best_us if task.best_us is not None else task.baseline_us
            if start is None:  # nothing is known yet
                return float("inf")
            history = [start] * (len(task.known) + task.new_trials + 1)
        return gain_per_trial(task.plan.weight, history)

    def _all_known(self, task: TaskProgress) -> tuple[m.KnownTrial, ...]:
        fresh = {trial.trace for trial in task.known}
        return task.known + tuple(m.KnownTrial(t, us) for t, us in task.results.items() if t not in fresh)

    def _candidates(self, event: m.CandidatesReady, out: list[m.Instruction]) -> None:
        task = self.tasks[event.task]
        batch = task.batches[event.batch]
        batch.generated = True
        batch.waiting = set(event.traces)
        missing = batch.asked - len(batch.waiting)
        self.unassigned += missing
        task.new_trials -= missing
        if not event.traces:
            task.exhausted = True
            del task.batches[event.batch]
            return
        give_up = HOPELESS_FACTOR * task.best_us if task.best_us is not None and len(task.results) >= 8 else None
        out.extend(m.RunTrial(event.task, event.batch, trace, give_up) for trace in event.traces)

    def _cannot_sample(self, event: m.CannotSample, out: list[m.Instruction]) -> None:
        task = self.tasks[event.task]
        batch = task.batches.pop(event.batch)
        self.unassigned += batch.asked
        task.new_trials -= batch.asked
        task.exhausted = True
        if not task.results:
            task.error = f"cannot sample: {event.reason}"
        out.append(m.Say(f"{task.plan.name}: {event.reason}; it takes the best schedule known so far"))

    def _session_lost(self, event: m.SessionLost, out: list[m.Instruction]) -> None:
        task = self.tasks[event.task]
        task.session_open = False
        task.session_losses += 1
        if event.batch is not None and event.batch in task.batches and not task.batches[event.batch].generated:
            batch = task.batches.pop(event.batch)
            self.unassigned += batch.asked
            task.new_trials -= batch.asked
        if task.session_losses >= MAX_SESSION_LOSSES:
            task.exhausted = True
            task.error = f"its search process ended {task.session_losses} times: {event.reason}"
            out.append(m.Say(f"{task.plan.name}: {task.error}"))

    def _trial(self, index: int, batch_id: int, trial: m.KnownTrial, out: list[m.Instruction]) -> None:
        task = self.tasks[index]
        batch = task.batches[batch_id]
        batch.waiting.discard(trial.trace)
        batch.results.append(trial)
        task.measured += 1
        if not task.history_us:
            before = task.baseline_us if task.baseline_us is not None else trial.median_us
            if task.known and task.best_us is not None:
                task.history_us = [task.best_us] * (len(task.known) + 1)
            elif before is not None:
                task.history_us = [before]
        if trial.median_us is None:
            out.append(m.Forget(index, (trial.trace,)))
        else:
            task.results[trial.trace] = trial.median_us
            if task.best_us is None or trial.median_us < task.best_us:
                task.best_us = trial.median_us
            self._keep_best(index, trial.trace, out)
        if task.history_us:
            best = task.history_us[-1]
            task.history_us.append(best if trial.median_us is None else min(best, trial.median_us))
        if batch.generated and not batch.waiting:
            del task.batches[batch_id]
            if task.session_open:
                out.append(m.Report(index, tuple(batch.results)))

    def _ranked(self, task: TaskProgress) -> list[str]:
        return sorted(task.results, key=lambda trace: (task.results[trace], trace))

    def _keep_best(self, index: int, newest: str, out: list[m.Instruction]) -> None:
        task = self.tasks[index]
        task.kept.add(newest)
        if len(task.kept) > self.limits.top_k:
            worst = max(task.kept, key=lambda trace: (task.results[trace], trace))
            task.kept.discard(worst)
            out.append(m.Forget(index, (worst,)))

    # Promotion

    def _end_tasks(self, out: list[m.Instruction]) -> None:
        for index, task in enumerate(self.tasks):
            busy = task.batches or task.promoting or task.state.final
            if not task.plan.tunable or busy or index in self._baselines_missing:
                continue
            if self.unassigned > 0 and task.chosen and not task.exhausted:
                continue  # it may get more
            if task.session_open:
                task.session_open = False
                out.append(m.CloseSession(index))
            self._promote(index, out)

    def _promote(self, index: int, out: list[m.Instruction]) -> None:
        task = self.tasks[index]
        if task.published is not None and task.new_trials == 0:
            task.state = TaskState.FALLBACK if task.published_is_fallback else TaskState.REUSED
            task.best_us, task.best_trace, task.verified = task.published.median_us, task.published.trace, True
            return
        candidates = self._ranked(task)[: self.limits.top_k]
        if not candidates:
            self._without_candidate(task)
            return
        if task.published is not None and task.published.trace not in candidates:
            candidates.append(task.published.trace)
        if task.baseline_trace is not None:
            candidates.append(task.baseline_trace)
        task.promoting = True
        task.state = TaskState.RUNNING
        out.append(m.Promote(index, tuple(candidates)))

    def _without_candidate(self, task: TaskProgress) -> None:
        task.best_us = task.baseline_us
        if task.failed >= MIN_TRIALS or task.baseline_us is None:
            task.state = TaskState.FAILED
            kinds = ", ".join(f"{count} {kind}" for kind, count in task.failures.most_common())
            task.error = task.error or f"no valid candidate in {task.measured} trials ({kinds or 'none measured'})"
        else:
            task.state = TaskState.FALLBACK
            task.error = task.error or f"no valid candidate in {task.measured} trials"

    def _promoted(self, event: m.Promoted, out: list[m.Instruction]) -> None:
        task = self.tasks[event.task]
        for trial in event.results:
            if trial.trace == task.baseline_trace and trial.median_us is not None:
                task.baseline_us = trial.median_us
        measured = [trial for trial in event.results if trial.median_us is not None]
        task.promoted = sorted(measured, key=lambda trial: trial.median_us or 0.0)
        self._check_next(event.task, out)

    def _check_next(self, index: int, out: list[m.Instruction]) -> None:
        task = self.tasks[index]
        if not task.promoted:
            task.state = TaskState.FAILED
            task.best_us = task.baseline_us
            task.promoting = False
            task.error = task.error or "no candidate passed promotion"
            self._drop_artifacts(index, out)
            return
        best = task.promoted[0]
        out.append(m.Check(index, best.trace, best.median_us or 0.0, fallback=best.trace == task.baseline_trace))

    def _checked(self, event: m.Checked, out: list[m.Instruction]) -> None:
        task = self.tasks[event.task]
        winner = task.promoted.pop(0)
        if event.verdict == "ok":
            task.best_us, task.best_trace, task.verified = winner.median_us, winner.trace, True
            task.best_trial_id = event.trial_id
            task.state = TaskState.FALLBACK if winner.trace == task.baseline_trace else TaskState.TUNED
            task.error = ""
        elif event.verdict == "inconclusive":
            task.state = TaskState.FALLBACK
            task.best_us = task.baseline_us
            task.error = f"correctness is inconclusive, so nothing was published: {event.message}"
            out.append(m.Say(f"{task.plan.name}: {task.error}"))
        else:
            if event.verdict == "wrong_result":
                task.failures[FailureKind.WRONG_RESULT] += 1
            task.error = event.message
            out.append(m.Say(f"{task.plan.name}: a candidate was rejected: {event.message}"))
            self._check_next(event.task, out)
            return
        task.promoting = False
        self._drop_artifacts(event.task, out)

    def _drop_artifacts(self, index: int, out: list[m.Instruction]) -> None:
        task = self.tasks[index]
        traces = tuple(task.kept) + ((task.baseline_trace,) if task.baseline_trace is not None else ())
        task.kept = set()
        out.append(m.Forget(index, traces))

    # End

    def _finish(self, out: list[m.Instruction]) -> None:
        assert self.model is not None
        failed = [task for task in self.tasks if task.state is TaskState.FAILED]
        error = self.model.message
        if failed:
            names = ", ".join(task.plan.name for task in failed)
            error = f"{len(failed)} of {len(self.tasks)} operators failed: {names}"
        if self.model.outputs_match is False:
            error = "the tuned model's output differs from the untuned one's"
        if failed and len(failed) == len(self.tasks):
            state = JobState.FAILED
        elif failed or self.model.outputs_match is False:
            state = JobState.PARTLY
        else:
            state = JobState.DONE
        self.phase = "ended"
        self.finished = m.Finish(state, error)
        out.append(self.finished)
