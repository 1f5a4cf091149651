"""Which tasks get trials, and which are over without a promotion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tuner_core.allocation import budget
from tuner_core.allocation.stopping import weighted_latency_us
from tuner_core.leases import messages as m
from tuner_core.leases.state import Board, TaskHistory, TaskLedger
from tuner_core.model import TaskState

_LIGHT = 0.5
"""A task that is guessed to take less than so many times the average waits for its baseline."""


def take_in(board: Board, trials: int, known: Mapping[str, TaskHistory]) -> None:
    """Enter what is known of the tasks, and share out the budget that is left."""
    histories = []
    for task in board.tasks.values():
        have = known.get(task.plan.name, TaskHistory())
        task.baseline_us, task.baseline_known = have.baseline_us, have.baseline_us is not None
        if not task.plan.tunable:
            continue
        task.counted = dict(have.trials)
        task.failures = Counter(have.failures)
        task.by_instance = Counter(have.by_instance)
        task.reused = have.reused
        task.produced[""] = task.known
        task.best_us = have.best_us
        if have.published_id:
            task.best_us, task.best_trial_id = have.published_us, have.published_id
            task.settled, task.settled_fallback = True, have.published_fallback
        if task.known and task.best_us is not None:
            task.history_us = [task.best_us] * (task.known + 1)
        if have.concluded:
            task.chosen, task.verified = True, True
            task.state = TaskState.FALLBACK if have.published_fallback else TaskState.TUNED
        histories.append(budget.TaskHistory(task.known, task.settled))
    board.trials = trials
    board.unassigned = budget.new_trials(trials, histories)
    board.fair_trials = max(budget.MIN_TRIALS, trials // max(1, len(histories)))


def choose(board: Board, out: list[m.Instruction]) -> None:
    """Decide which tasks get trials; when they are too few for all, that waits for the baselines."""
    if board.chosen:
        return
    undecided = [t for t in board.tasks.values() if t.plan.tunable and not t.chosen and not t.state.final]
    need = sum(max(0, budget.MIN_TRIALS - task.known) for task in undecided)
    if board.unassigned >= need:
        light = _light(board, undecided)
        tunable = [task for task in board.tasks.values() if task.plan.tunable]
        if light and any(not task.baseline_known and task.awaited is None for task in tunable):
            for task in undecided:
                task.chosen = task not in light
            return
        dropped = _negligible(board, light, out)
        chosen = [task for task in undecided if task not in dropped]
    elif any(not task.baseline_known for task in undecided):
        return
    else:
        weighted = {task.index: task.plan.weight * (task.baseline_us or 0.0) for task in undecided}
        known = {task.index: task.known for task in undecided}
        worth = set(budget.tasks_worth_trials(board.unassigned, weighted, already_known=known))
        chosen = [task for task in undecided if task.index in worth or task.known]
        left_out = [task for task in undecided if task not in chosen]
        for task in left_out:
            task.error = task.error or "the trial budget is too small for this operator"
        if left_out:
            out.append(
                m.Say(f"{board.unassigned} trials are too few: {len(left_out)} operators keep the fallback schedule")
            )
    for task in chosen:
        task.chosen = True
    board.chosen = True


def _light(board: Board, undecided: list[TaskLedger]) -> list[TaskLedger]:
    """Tasks whose baselines are worth waiting for, to see whether the tasks are worth trials; the others begin."""
    if board.settings.negligible_share <= 0:
        return []
    together = sum(task.plan.weight * task.plan.cost for task in board.tasks.values())
    return [
        task
        for task in undecided
        if not task.known and task.plan.weight * task.plan.cost < _LIGHT * together / len(board.tasks)
    ]


def _negligible(board: Board, light: list[TaskLedger], out: list[m.Instruction]) -> list[TaskLedger]:
    share = board.settings.negligible_share
    mine = {task.index: task.plan.weight * task.baseline_us for task in light if task.baseline_us is not None}
    others = weighted_latency_us((t.plan.weight, t.baseline_us) for t in board.tasks.values() if t.index not in mine)
    indices = budget.negligible_tasks(mine, others, share)
    dropped = [task for task in light if task.index in indices]
    for task in dropped:
        task.error = budget.negligible_reason(share)
    if dropped:
        out.append(m.Say(budget.negligible_line(len(dropped), share)))
        tuned = [task for task in board.tasks.values() if task.plan.tunable and task not in dropped]
        before = [budget.TaskHistory(task.produced[""], task.settled) for task in tuned]
        given = sum(task.new_trials for task in tuned)
        given += sum(task.awaited.set_aside for task in tuned if task.awaited is not None)
        allowed = budget.new_trials(board.trials, before) - given
        board.unassigned = min(board.unassigned, max(0, allowed))  # a repeated job still measures nothing
    return dropped


def settle(board: Board) -> None:
    """Tasks that need no promotion are over when their baseline is known."""
    for task in board.tasks.values():
        if task.state.final or task.leases or task.awaited is not None:
            continue
        over = board.unassigned <= 0 or task.exhausted  # it gets no trials any more
        if task.plan.tunable and task.chosen and task.reusable and task.baseline_known and over:
            task.state = TaskState.FALLBACK if task.settled_fallback else TaskState.REUSED
            task.verified = True
        elif task.baseline_known and (not task.plan.tunable or (board.chosen and not task.chosen)):
            task.state = TaskState.SKIPPED if task.baseline_us is not None else TaskState.FAILED
            task.best_us = task.baseline_us
