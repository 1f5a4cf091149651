"""Tasks that another job tunes at the moment: their part of the budget is set aside until it is known how that ends."""

from __future__ import annotations

from tuner_core.leases import messages as m
from tuner_core.leases.state import Awaited, Board, TaskLedger
from tuner_core.model import TaskState

ASK_HEARTBEATS = 1.0
"""How often it is asked whether the other job is done."""


def held(board: Board, task: TaskLedger, holder: str, out: list[m.Instruction]) -> None:
    """An instance says that another job has claimed the task."""
    if task.settled:  # there is a published best already: the other job may go on with it
        task.exhausted = True
        if not task.counted:
            task.state, task.verified = _state(task.settled_fallback), True
        return
    task.state, task.home = TaskState.PENDING, None
    ask_s = board.now_s + ASK_HEARTBEATS * board.settings.heartbeat_s
    if task.awaited is not None:
        task.awaited.holder, task.awaited.ask_s = holder, ask_s
        return
    if not any(one.awaited is not None and one.awaited.holder == holder for one in board.tasks.values()):
        out.append(m.Say(f"{holder} tunes operators of this model at this moment: their records are taken from there"))
    aside = _fair_share(board, task)
    board.unassigned -= aside
    task.awaited = Awaited(holder, aside, ask_s)


def published(board: Board, task: TaskLedger, event: m.LeaseEnded, out: list[m.Instruction]) -> None:
    """Another job is done with the task, and its best is this job's, too; its share of the budget is saved."""
    if task.awaited is None:
        board.unassigned -= _fair_share(board, task)
    holder, task.awaited = task.awaited.holder if task.awaited is not None else "another job", None
    task.state, task.verified = _state(event.fallback), True
    task.best_us, task.best_trial_id, task.reused = event.best_latency_us, event.best_trial_id, event.reused
    task.baseline_us = event.baseline_us if event.baseline_us is not None else task.baseline_us
    task.baseline_known = True
    out.append(m.Say(f"{task.plan.name}: taken from {holder}, {task.reused} trials"))


def taken(board: Board, task: TaskLedger, out: list[m.Instruction]) -> bool:
    """The other job is gone without a result: the task is tuned here, with what was set aside; whether that is new."""
    if task.awaited is None:
        return False
    awaited, task.awaited = task.awaited, None
    board.unassigned += awaited.set_aside
    out.append(m.Say(f"{task.plan.name}: {awaited.holder} left it without a result; it is tuned here"))
    return True


def pay(board: Board, task: TaskLedger, trials: int) -> None:
    """Take the trials of a lease from the budget; a negative number gives them back."""
    if task.awaited is not None:
        task.awaited.set_aside -= trials
    else:
        board.unassigned -= trials


def _fair_share(board: Board, task: TaskLedger) -> int:
    """Trials that would be the task's, as far as they are there and others do not need them to be tuned at all."""
    return max(0, min(board.unassigned - board.reserved(besides=task), board.fair_trials - task.known))


def _state(fallback: bool) -> TaskState:
    return TaskState.FALLBACK if fallback else TaskState.REUSED
