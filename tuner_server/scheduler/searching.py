"""How a task is searched: sessions, batches and their trials. Pure steps of the state machines."""

from __future__ import annotations

from tuner_core.allocation.stopping import EarlyStopping
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.progress import Batch, TaskProgress

MAX_SESSION_LOSSES = 3


def take_baseline(task: TaskProgress, baseline: m.KnownTrial) -> None:
    """The fallback schedule's latency is known."""
    task.baseline_us = baseline.median_us
    task.baseline_trace = baseline.trace


def ask(task: TaskProgress, batch_id: int, count: int, out: m.Sink, lease: int = 0) -> None:
    """Ask for a batch of candidates, from a session that is opened at need and knows all that is known by now."""
    unreported = tuple(trial for batch in task.batches.values() for trial in batch.results)
    for batch in task.batches.values():
        batch.results = []
    if not task.session_open:
        task.session_open = True
        task.sessions += 1
        out.append(m.OpenSession(task.index, task.all_known()))
    elif unreported:
        out.append(m.Report(task.index, unreported))
    task.batches[batch_id] = Batch(count, lease, task.sessions)
    task.new_trials += count
    out.append(m.Generate(task.index, batch_id, count))


def take_candidates(
    task: TaskProgress, batch_id: int, traces: tuple[str, ...], out: m.Sink, *, more: bool = False
) -> int:
    """Have candidates of a batch built and measured.

    Returns:
        Trials that were asked for in vain, once no more will come.
    """
    batch = task.batches[batch_id]
    batch.come += len(traces)
    batch.waiting.update(traces)
    out.extend(m.RunTrial(task.index, batch_id, trace) for trace in traces)
    if more:
        return 0
    task.exhausted = task.exhausted or not batch.come
    return complete(task, batch_id, out)


def complete(task: TaskProgress, batch_id: int, out: m.Sink) -> int:
    """No more candidates of a batch will come. Returns: trials that were asked for in vain."""
    batch = task.batches[batch_id]
    missing = batch.asked - batch.come
    task.new_trials -= missing
    batch.asked = batch.come
    report_if_complete(task, batch_id, out)
    return missing


def cannot_sample(task: TaskProgress, event: m.CannotSample, out: m.Sink) -> int:
    """The space holds nothing more. Returns: trials that were asked for in vain."""
    task.exhausted = True
    if not task.results:
        task.error = f"cannot sample: {event.reason}"
    out.append(m.Say(f"{task.plan.name}: {event.reason}; it takes the best schedule known so far"))
    return complete(task, event.batch, out)


def session_lost(task: TaskProgress, event: m.SessionLost, out: m.Sink) -> int:
    """The search's process ended; it is opened again a few times. Returns: trials that were asked for in vain."""
    lost = 0
    batch = task.batches.get(event.batch) if event.batch is not None else None
    if task.session_open and (batch is None or batch.session == task.sessions):  # else it was noticed before
        task.session_open = False
        task.session_losses += 1
    if batch is not None and event.batch is not None and not batch.generated:
        lost = complete(task, event.batch, out)
    if task.session_losses >= MAX_SESSION_LOSSES:
        task.exhausted = True
        task.error = f"its search process ended {task.session_losses} times: {event.reason}"
        out.append(m.Say(f"{task.plan.name}: {task.error}"))
    return lost


def take_trial(task: TaskProgress, batch_id: int, trial: m.KnownTrial, top_k: int, out: m.Sink) -> None:
    """A trial was measured, or failed; the search learns of it when its batch is complete, or asked for another."""
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
        out.append(m.Forget(task.index, (trial.trace,)))
    else:
        task.results[trial.trace] = trial.median_us
        if task.best_us is None or trial.median_us < task.best_us:
            task.best_us = trial.median_us
        _keep_best(task, trial.trace, top_k, out)
    if task.history_us:
        best = task.history_us[-1]
        task.history_us.append(best if trial.median_us is None else min(best, trial.median_us))
    report_if_complete(task, batch_id, out)


def stop_if_still(task: TaskProgress, stopping: EarlyStopping, model_us: float, out: m.Sink) -> None:
    """Give a task no more trials when its last ones hardly shortened the model."""
    if stopping.stands_still(task.plan.weight, task.history_us, task.fresh, model_us):
        task.exhausted = task.stopped_early = True
        out.append(m.Say(f"{task.plan.name}: {stopping.line()}"))


def report_if_complete(task: TaskProgress, batch_id: int, out: m.Sink) -> None:
    """Tell the search how a batch came out, once nothing of it is under way any more."""
    batch = task.batches[batch_id]
    if batch.generated and not batch.waiting:
        del task.batches[batch_id]
        if task.session_open and batch.results:
            out.append(m.Report(task.index, tuple(batch.results)))


def close_session(task: TaskProgress, out: m.Sink) -> None:
    """End the task's search, if there is one."""
    if task.session_open:
        task.session_open = False
        out.append(m.CloseSession(task.index))


def _keep_best(task: TaskProgress, newest: str, top_k: int, out: m.Sink) -> None:
    task.kept.add(newest)
    if len(task.kept) > top_k:
        worst = max(task.kept, key=lambda trace: (task.results[trace], trace))
        task.kept.discard(worst)
        out.append(m.Forget(task.index, (worst,)))
