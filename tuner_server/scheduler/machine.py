"""The scheduler of one job as a pure state machine: events in, instructions out, no input or output of its own.

A job goes through its tasks like this: every task's fallback schedule is measured (the baseline); tunable tasks are
searched, several at once and two batches in flight each, the trials going where they shorten the model most; when a
task's trials are over its best candidates are measured again alone, checked against a reference and published; at the
end the whole model is measured.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from tuner_core.allocation.budget import (
    MIN_TRIALS,
    TaskHistory,
    negligible_line,
    negligible_reason,
    negligible_tasks,
    new_trials,
    tasks_worth_trials,
)
from tuner_core.allocation.gradient import gain_per_trial
from tuner_core.allocation.stopping import EarlyStopping, weighted_latency_us
from tuner_core.model import JobState, TaskState
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import promotion, searching
from tuner_server.scheduler.progress import Limits as Limits
from tuner_server.scheduler.progress import TaskPlan as TaskPlan
from tuner_server.scheduler.progress import TaskProgress

WORTH_WAITING_FOR = 0.25
"""A free task that gains less than this share of what a busy one gains does not get its batch now."""


class JobMachine:
    """State of one job.

    Args:
        tasks: The job's tasks.
        trials: The whole job's trial budget.
        limits: How much is in flight.
        stopping: When a task gets no more trials.
        negligible_share: Tasks that together take less than this share of the untuned model get none at all.
    """

    def __init__(
        self,
        tasks: Sequence[TaskPlan],
        trials: int,
        limits: Limits,
        stopping: EarlyStopping | None = None,
        negligible_share: float = 0.0,
    ) -> None:
        self.tasks = [TaskProgress(index, plan) for index, plan in enumerate(tasks)]
        self.limits = limits
        self.trials = trials
        self.unassigned = 0
        self.phase = "starting"
        self.finished: m.Finish | None = None
        self.model: m.ModelMeasured | None = None
        self._baselines_missing: set[int] = set()
        self._batch_ids = itertools.count()
        self._preparing_model = False
        self._measuring_model = False
        self._warned_budget = False
        self._stopping = stopping or EarlyStopping()
        self._negligible_share = negligible_share
        self._weighed = negligible_share <= 0

    # Entry point

    def handle(self, event: m.Event) -> list[m.Instruction]:
        """Take in one event; what is to be done now comes out. Events after the end are ignored."""
        if self.finished is not None:
            return []
        out: list[m.Instruction] = []
        match event:
            case m.Started():
                self._start(event, out)
            case m.ClaimTaken():
                self._claim_taken(event, out)
            case m.BaselineMeasured():
                self._baseline(event.task, m.KnownTrial(event.trace, event.median_us))
            case m.BaselineFailed():
                self.tasks[event.task].error = f"the fallback schedule failed: {event.message}"
                self._baselines_missing.discard(event.task)
            case m.CandidatesReady():
                task = self.tasks[event.task]
                self.unassigned += searching.take_candidates(task, event.batch, event.traces, out, more=event.more)
            case m.CannotSample():
                self.unassigned += searching.cannot_sample(self.tasks[event.task], event, out)
            case m.SessionLost():
                self.unassigned += searching.session_lost(self.tasks[event.task], event, out)
            case m.TrialMeasured():
                self._trial(event, event.median_us, out)
            case m.TrialFailed():
                self.tasks[event.task].failures[event.kind] += 1
                self._trial(event, None, out)
            case m.Promoted():
                promotion.take_promoted(self.tasks[event.task], event, out)
            case m.Checked():
                promotion.take_checked(self.tasks[event.task], event, out)
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

    def _start(self, event: m.Started, out: list[m.Instruction]) -> None:
        self.phase = "baseline"
        histories = []
        for index, task in enumerate(self.tasks):
            have = event.known.get(index, m.Known())
            if have.baseline is not None:
                self._baseline(index, have.baseline)
            else:
                self._baselines_missing.add(index)
                out.append(m.MeasureBaseline(index))
            if task.plan.tunable:
                self._know(task, have)
                histories.append(TaskHistory(len(have.trials), have.best_verified is not None))
        self.unassigned = new_trials(self.trials, histories)
        reused = sum(task.reused for task in self.tasks)
        if reused:
            out.append(m.Say(f"the store holds {reused} trials of these operators; {self.unassigned} new ones follow"))
        self._set_aside(event.held, len(histories), out)

    def _know(self, task: TaskProgress, have: m.Known) -> None:
        task.known = have.trials
        task.results = {trial.trace: trial.median_us for trial in have.trials if trial.median_us is not None}
        task.kept = set(task.ranked()[: self.limits.top_k])
        task.measured = have.own
        task.failures = Counter(have.own_failed)
        task.reused = len(have.trials) - have.own
        task.published = have.best_verified
        task.published_is_fallback = have.best_is_fallback
        task.best_trial_id = have.best_trial_id
        task.best_us = min(task.results.values(), default=None)
        if have.best_verified is not None:
            task.best_us = have.best_verified.median_us

    # Tasks that another job tunes

    def _set_aside(self, held: Mapping[int, str], tunable: int, out: list[m.Instruction]) -> None:
        """Keep the fair share of tasks that are being tuned elsewhere, for the case that nothing comes of that."""
        held = {index: holder for index, holder in held.items() if self.tasks[index].published is None}
        if not held or not self.unassigned:
            return
        for index, holder in held.items():
            task = self.tasks[index]
            task.waiting_for = holder
            task.set_aside = min(self.unassigned, max(0, max(MIN_TRIALS, self.trials // tunable) - len(task.known)))
            self.unassigned -= task.set_aside
        holders = ", ".join(sorted(set(held.values())))
        what = "1 operator is" if len(held) == 1 else f"{len(held)} operators are"
        out.append(m.Say(f"{what} being tuned by {holders} at this moment: the records will be taken from there"))

    def _claim_taken(self, event: m.ClaimTaken, out: list[m.Instruction]) -> None:
        task = self.tasks[event.task]
        holder, task.waiting_for = task.waiting_for, ""
        if not holder:
            return
        aside, task.set_aside = task.set_aside, 0
        self._know(task, event.known)
        if event.known.baseline is not None and event.task in self._baselines_missing:
            self._baseline(event.task, event.known.baseline)
        if task.published is not None:
            out.append(m.Say(f"{task.plan.name}: taken from {holder}, {task.reused} trials"))
            return
        out.append(m.Say(f"{task.plan.name}: {holder} left it without a result; it is tuned here"))
        task.chosen = aside > 0
        self.unassigned += aside

    def _baseline(self, index: int, trial: m.KnownTrial) -> None:
        searching.take_baseline(self.tasks[index], trial)
        self._baselines_missing.discard(index)

    def _trial(self, event: m.TrialMeasured | m.TrialFailed, median_us: float | None, out: list[m.Instruction]) -> None:
        trial = m.KnownTrial(event.trace, median_us)
        task = self.tasks[event.task]
        searching.take_trial(task, event.batch, trial, self.limits.top_k, out)
        if not task.exhausted:
            model_us = weighted_latency_us((t.plan.weight, t.best_us or t.baseline_us) for t in self.tasks)
            searching.stop_if_still(task, self._stopping, model_us, out)

    def _choose(self, out: list[m.Instruction]) -> bool:
        """Decide which tasks get trials; False while that still waits for baselines."""
        open_tasks = {i: t for i, t in enumerate(self.tasks) if t.plan.tunable and t.state is TaskState.PENDING}
        undecided = {i: t for i, t in open_tasks.items() if not t.chosen and not t.waiting_for}
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
            keep = "1 operator keeps" if len(left_out) == 1 else f"{len(left_out)} operators keep"
            out.append(m.Say(f"{self.unassigned} trials are too few: {keep} the fallback schedule"))
        return True

    def _drop_negligible(self, out: list[m.Instruction]) -> None:
        """Once all baselines are known: tasks that have had no trials and are not worth any get none."""
        if self._weighed or self._baselines_missing:
            return
        self._weighed = True
        light = {
            i: t.plan.weight * t.baseline_us
            for i, t in enumerate(self.tasks)
            if t.chosen and not t.new_trials and not t.known and t.baseline_us is not None
        }
        others = weighted_latency_us((t.plan.weight, t.baseline_us) for i, t in enumerate(self.tasks) if i not in light)
        dropped = [self.tasks[index] for index in negligible_tasks(light, others, self._negligible_share)]
        for task in dropped:
            task.chosen = False
            task.error = negligible_reason(self._negligible_share)
        if dropped:
            out.append(m.Say(negligible_line(len(dropped), self._negligible_share)))
            tuned = [t for t in self.tasks if t.plan.tunable and t not in dropped]
            allowed = new_trials(self.trials, [TaskHistory(len(t.known), t.published is not None) for t in tuned])
            given = sum(task.new_trials + task.set_aside for task in self.tasks)
            self.unassigned = min(self.unassigned, max(0, allowed - given))  # a repeated job still measures nothing

    # Search

    def _advance(self, out: list[m.Instruction]) -> None:
        if self.phase == "starting":
            return
        if self._choose(out):
            self._drop_negligible(out)
            self._settle_unchosen()
            self._fill(out)
            if not self._preparing_model and not self._takers():
                self._preparing_model = True
                out.append(m.PrepareModel())
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
            settled = task.published is not None or task.known or task.waiting_for
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
            count = min(self.limits.batch, self.unassigned - self._reserved(index))
            self.tasks[index].state = TaskState.RUNNING
            searching.ask(self.tasks[index], next(self._batch_ids), count, out)
            self.unassigned -= count

    def _next_task(self) -> int | None:
        """The task that gets the next batch: first those that have none yet, then by the gradient.

        A task that would gain far less than one that has as much in flight as it may waits, so that a full pipeline
        does not spend the budget on tasks that hardly matter. Where the stages have little to do, tasks may have twice
        as much in flight: to know less when proposing costs less than to stand idle.
        """
        open_tasks = [
            index
            for index, task in enumerate(self.tasks)
            if task.chosen and not task.exhausted and not task.promoting and not task.state.final
        ]
        batch = self.limits.batch
        outstanding = {index: self.tasks[index].outstanding for index in open_tasks}
        in_flight = sum(outstanding.values())
        each = batch * self.limits.batches_per_task
        everything = batch * self.limits.batches_at_once
        if in_flight + batch > everything:
            return None
        # Until it is known which tasks are worth trials, what keeps the processes at work bridges the time.
        if not self._weighed:
            given = sum(self.tasks[index].new_trials for index in open_tasks)
            if given >= each and not self.limits.little(given):
                return None
        little = self._weighed and self.limits.little(in_flight)
        gains = {index: self.gain(index) for index in open_tasks}
        free = [
            index
            for index in open_tasks
            if outstanding[index] + batch <= each * (1 + little) and self.unassigned > self._reserved(index)
        ]
        if not free:
            return None
        best = max(free, key=lambda index: (gains[index], not outstanding[index], self._heaviness(index), -index))
        finite = [gain for gain in gains.values() if gain != float("inf")]
        hardly_matters = gains[best] < WORTH_WAITING_FOR * max(finite, default=0.0)
        if hardly_matters and not little:
            return None
        return best

    def _reserved(self, index: int) -> int:
        """Trials that stay reserved for the other tasks that have had none yet, so that each gets its minimum."""
        return sum(
            max(0, MIN_TRIALS - len(task.known))
            for other, task in enumerate(self.tasks)
            if other != index and task.chosen and task.new_trials == 0 and not task.exhausted and not task.state.final
        )

    def _heaviness(self, index: int) -> float:
        """How much of the untuned model a task takes: by its baseline, once all of these are known."""
        task = self.tasks[index]
        return task.plan.weight * (task.plan.cost if self._baselines_missing else task.baseline_us or 0.0)

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

    # Promotion

    def _end_tasks(self, out: list[m.Instruction]) -> None:
        may_get_more = self._takers()
        for index, task in enumerate(self.tasks):
            busy = task.batches or task.promoting or task.state.final or task.waiting_for
            if not task.plan.tunable or busy or index in self._baselines_missing:
                continue
            if index in may_get_more:
                continue
            searching.close_session(task, out)
            self._conclude(task, out)

    def _takers(self) -> set[int]:
        """Tasks that may get more trials.

        When the rest of the budget is no more than what is in flight, those that gain most share it, as many as keep
        the stages busy. The others are promoted meanwhile, and not one after the other when all is over.
        """
        if self.unassigned == 0:
            return set()
        takers = [
            index
            for index, task in enumerate(self.tasks)
            if task.chosen and not task.exhausted and not task.promoting and not task.state.final
        ]
        limits = self.limits
        if self.unassigned > limits.batch * limits.batches_at_once:
            return set(takers)
        enough = math.ceil(limits.batches_at_once / limits.batches_per_task)
        takers.sort(key=self.gain, reverse=True)
        return {index for place, index in enumerate(takers) if place < enough or self.tasks[index].new_trials == 0}

    def _conclude(self, task: TaskProgress, out: list[m.Instruction]) -> None:
        if task.published is None or task.new_trials:
            promotion.begin(task, self.limits.top_k, out)
            return
        task.state = TaskState.FALLBACK if task.published_is_fallback else TaskState.REUSED
        task.best_us, task.best_trace, task.verified = task.published.median_us, task.published.trace, True

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
