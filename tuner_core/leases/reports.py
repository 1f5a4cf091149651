"""What instances answer and report, entered into the board: leases taken, refused and ended, results."""

from __future__ import annotations

from tuner_core.allocation import budget
from tuner_core.allocation.stopping import weighted_latency_us
from tuner_core.leases import awaiting, holding, membership
from tuner_core.leases import messages as m
from tuner_core.leases.state import Board, Phase, TaskLedger
from tuner_core.model import TaskState

MAX_ATTEMPTS = 3
"""How often a baseline, a promotion or the model's measurement is tried."""


def accepted(board: Board, event: m.LeaseAccepted) -> bool:
    """The instance took a lease; whether that allows anything new."""
    membership.hear(board, event.instance)
    board.instances[event.instance].refusals = 0
    lease = holding.find(board, event.instance, event.task, event.token)
    if lease is None or lease.phase is not Phase.GRANTING:
        return False
    lease.phase, lease.changed_s = Phase.LIVE, board.now_s
    return True


def refused(board: Board, event: m.LeaseRefused, out: list[m.Instruction]) -> None:
    """The instance did not take a lease or an extension."""
    one = board.instances.get(event.instance)
    lease = holding.find(board, event.instance, event.task, event.token)
    if one is None or lease is None:
        return
    if lease.phase is Phase.LIVE:  # an extension: the lease itself goes on, or its end is on the way
        if event.unanswered:
            lease.repeat = True  # the same again does no harm
        else:
            lease.closed = True
    else:
        one.refusals += 1
        one.backoff_until_s = board.now_s + board.settings.heartbeat_s * min(4.0, 0.1 * 2**one.refusals)
        holding.release(board, lease)
        out.append(m.Revoke(lease.instance, lease.task, lease.token))
    if event.draining:
        membership.drain(board, one.name, out)


def baseline(board: Board, event: m.BaselineMeasured) -> None:
    """Note a task's baseline, once."""
    membership.hear(board, event.instance)
    task = board.tasks.get(event.task)
    if task is None or task.baseline_us is not None:
        return
    task.baseline_us = event.latency_us
    task.baseline_known = True
    task.error = f"the fallback schedule failed: {event.error}" if event.latency_us is None else ""
    if not task.plan.tunable:
        task.by_instance[event.instance] += 1


def trial(board: Board, event: m.TrialFinished, out: list[m.Instruction]) -> bool:
    """Count a trial; whether the instance now has room for more."""
    membership.hear(board, event.instance)
    task, one = board.tasks.get(event.task), board.instances.get(event.instance)
    if task is None or one is None or event.trial_id in task.counted:
        return False
    if one.window_since_s is not None:
        one.window_trials += 1
    lease = holding.find(board, event.instance, event.task, event.token)
    if lease is None:  # its record is kept, and the next holder may start from it
        if event.trial_id not in task.late:
            task.late.add(event.trial_id)
            task.produced[one.name] += 1
            one.late += 1
        return False
    taken = awaiting.taken(board, task, out)
    lease.counted += 1
    lease.changed_s = board.now_s
    one.trials += 1
    task.by_instance[one.name] += 1
    if event.trial_id not in task.late:
        task.produced[one.name] += 1
    task.counted[event.trial_id] = event.latency_us
    if event.latency_us is None:
        task.failures[event.failure or "run_error"] += 1
    elif task.best_us is None or event.latency_us < task.best_us:
        task.best_us = event.latency_us
    _note_history(task, event.latency_us)
    _stop_if_still(board, task, out)
    one.unplanned += 1
    if not taken and one.unplanned < one.batch // 2 and one.outstanding > one.batch // 2:
        return False  # nothing to decide yet, and this happens with every trial
    one.unplanned = 0
    return True


def _stop_if_still(board: Board, task: TaskLedger, out: list[m.Instruction]) -> None:
    """Lease no more trials of a task when its last ones hardly shortened the model."""
    stopping = board.settings.stopping
    if task.exhausted or not stopping.patience:
        return
    model_us = weighted_latency_us((t.plan.weight, t.best_us or t.baseline_us) for t in board.tasks.values())
    fresh = max(0, len(task.history_us) - 1 - task.produced[""])  # this client's
    if stopping.stands_still(task.plan.weight, task.history_us, fresh, model_us):
        task.exhausted = task.stopped_early = True
        out.append(m.Say(f"{task.plan.name}: {stopping.line()}"))


def _note_history(task: TaskLedger, latency_us: float | None) -> None:
    if not task.history_us:
        before = task.baseline_us if task.baseline_us is not None else latency_us
        if before is None:
            return
        task.history_us = [before]
    best = task.history_us[-1]
    task.history_us.append(best if latency_us is None else min(best, latency_us))


def ended(board: Board, event: m.LeaseEnded, out: list[m.Instruction]) -> None:
    """A lease is over, for the reason that the instance gives."""
    membership.hear(board, event.instance)
    one = board.instances.get(event.instance)
    if one is not None:
        one.stale.discard((event.task, event.token))
    lease = holding.find(board, event.instance, event.task, event.token)
    if lease is None:
        return
    task = board.tasks[event.task]
    holding.release(board, lease, ended=True)
    if event.reason in ("measured", "exhausted", "concluded", "failed"):
        awaiting.taken(board, task, out)
    if event.reason == "draining":
        membership.drain(board, event.instance, out)
    elif event.reason == "exhausted":
        task.exhausted = True
        if event.error:
            task.error = event.error
    elif event.reason == "concluded" and lease.conclude:
        _concluded(task, event)
    elif event.reason == "held":
        awaiting.held(board, task, event.holder or "another job", out)
    elif event.reason == "published":
        awaiting.published(board, task, event, out)
    elif event.reason == "failed":
        task.attempts += 1
        task.error = event.error or "the instance does not say why"
        out.append(m.Say(f"{task.plan.name} at {event.instance}: {task.error}"))
        if task.attempts >= MAX_ATTEMPTS and lease.conclude:
            _without_best(task)
        elif task.attempts >= MAX_ATTEMPTS:
            task.exhausted, task.attempts = True, 0
    if not task.baseline_known and task.baseline_attempts >= MAX_ATTEMPTS:
        task.baseline_known = True
        task.error = event.error or "the fallback schedule was not measured"


def _concluded(task: TaskLedger, event: m.LeaseEnded) -> None:
    task.by_instance.setdefault(event.instance, 0)
    if not event.verified:
        task.error = event.error or task.error
        _without_best(task)
        return
    task.verified, task.best_us, task.best_trial_id = True, event.best_latency_us, event.best_trial_id
    if event.baseline_us is not None:
        task.baseline_us = event.baseline_us
    task.state = TaskState.FALLBACK if event.fallback else TaskState.TUNED
    task.error = ""


def _without_best(task: TaskLedger) -> None:
    """Nothing could be published: the task keeps the fallback schedule, or fails."""
    valid = [value for value in task.counted.values() if value is not None]
    task.best_us = task.baseline_us
    few = len(task.counted) < budget.MIN_TRIALS
    ours = task.baseline_us is not None and (bool(valid) or few)
    task.state = TaskState.FALLBACK if ours else TaskState.FAILED
    task.error = task.error or f"no valid candidate in {len(task.counted)} trials"
