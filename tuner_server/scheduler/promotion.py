"""How a task ends: its best candidates are measured again alone, checked, and one is published. Pure steps."""

from __future__ import annotations

from tuner_core.allocation.budget import MIN_TRIALS
from tuner_core.model import FailureKind, TaskState
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.progress import TaskProgress


def begin(task: TaskProgress, top_k: int, out: m.Sink) -> None:
    """Have the best candidates and the fallback schedule measured again, or settle without any."""
    candidates = task.ranked()[:top_k]
    if not candidates:
        _settle_without_candidate(task)
        return
    if task.published is not None and task.published.trace not in candidates:
        candidates.append(task.published.trace)
    if task.baseline_trace is not None:
        candidates.append(task.baseline_trace)
    task.promoting = True
    task.state = TaskState.RUNNING
    out.append(m.Promote(task.index, tuple(candidates)))


def _settle_without_candidate(task: TaskProgress) -> None:
    task.best_us = task.baseline_us
    if task.failed >= MIN_TRIALS or task.baseline_us is None:
        task.state = TaskState.FAILED
        kinds = ", ".join(f"{count} {kind}" for kind, count in task.failures.most_common())
        task.error = task.error or f"no valid candidate in {task.measured} trials ({kinds or 'none measured'})"
    else:
        task.state = TaskState.FALLBACK
        task.error = task.error or f"no valid candidate in {task.measured} trials"


def take_promoted(task: TaskProgress, event: m.Promoted, out: m.Sink) -> None:
    """The candidates were measured; the fastest is checked first."""
    for trial in event.results:
        if trial.trace == task.baseline_trace and trial.median_us is not None:
            task.baseline_us = trial.median_us
    measured = [trial for trial in event.results if trial.median_us is not None]
    task.promoted = sorted(measured, key=lambda trial: trial.median_us or 0.0)
    _check_next(task, out)


def _check_next(task: TaskProgress, out: m.Sink) -> None:
    if not task.promoted:
        task.state = TaskState.FAILED
        task.best_us = task.baseline_us
        task.promoting = False
        task.error = task.error or "no candidate passed promotion"
        drop_artifacts(task, out)
        return
    best = task.promoted[0]
    out.append(m.Check(task.index, best.trace, best.median_us or 0.0, fallback=best.trace == task.baseline_trace))


def take_checked(task: TaskProgress, event: m.Checked, out: m.Sink) -> None:
    """A candidate was compared with the reference: it is published, or the next one is checked."""
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
        _check_next(task, out)
        return
    task.promoting = False
    drop_artifacts(task, out)


def drop_artifacts(task: TaskProgress, out: m.Sink) -> None:
    """What was built of the task is not needed any more."""
    traces = tuple(task.kept) + ((task.baseline_trace,) if task.baseline_trace is not None else ())
    task.kept = set()
    out.append(m.Forget(task.index, traces))
