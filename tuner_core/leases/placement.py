"""Which lease is given next, and to whom. Pure: looks at the board, proposes one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner_core.leases.state import Board, InstanceState, Lease, Phase, TaskLedger

WORTH_TAKING = 0.25
"""A task that gains less than this share of what the best one gains waits while its instance has other work."""
BUSY_BATCHES = 2
SETTLED_HEARTBEATS = 4
"""A task that has just moved stays for so long: each move costs the warm search."""
SLOWER_BY = 3.0


@dataclass(frozen=True)
class Place:
    """A new lease."""

    task: TaskLedger
    instance: InstanceState
    trials: int
    conclude: bool = False


@dataclass(frozen=True)
class Extend:
    """More trials for a lease that runs."""

    lease: Lease
    trials: int


@dataclass(frozen=True)
class Take:
    """A lease is revoked, so that an idle instance can take its task."""

    lease: Lease
    by: InstanceState


Step = Place | Extend | Take


def next_step(board: Board) -> Step | None:
    """The next lease to give, extend or take away; None when everything is as it should be."""
    usable = board.usable()
    if not usable:
        return None
    return _baseline(board, usable) or _search(board, usable) or _conclusion(board, usable) or _rebalance(board, usable)


def _baseline(board: Board, usable: list[InstanceState]) -> Step | None:
    """Baselines of tasks that get no trials (yet), spread over all."""
    waiting = [
        task
        for task in board.tasks.values()
        if not task.baseline_known and task.lease is None and not task.chosen and not task.state.final
    ]
    if not waiting:
        return None
    instance = min(usable, key=lambda one: (one.baselines, one.outstanding, one.name))
    if instance.baselines >= board.settings.baselines_at_once:
        return None
    return Place(max(waiting, key=_expected), instance, 0)


def _expected(task: TaskLedger) -> tuple[float, int]:
    return (task.plan.weight * task.plan.cost, -task.index)


def _search(board: Board, usable: list[InstanceState]) -> Step | None:
    if board.unassigned <= 0:
        return None
    tasks = board.open_tasks()
    if not tasks:
        return None
    gains = {task.index: task.gain() for task in tasks}
    reserved = sum(task.missing for task in tasks) if board.leased() else 0
    homed = {one.name: 0.0 for one in usable}
    for task in tasks:
        if task.home in homed:
            homed[task.home] += _expected(task)[0]
    rooms = []
    for one in usable:
        room = board.ahead(one, usable) - one.outstanding
        if room > 0:
            rooms.append((one.outstanding / one.batch, homed[one.name], one.name, room, one))
    for _, _, _, room, instance in sorted(rooms, key=lambda entry: entry[:3]):
        step = _trials_for(board, instance, room, tasks, gains, reserved)
        if step is not None:
            return step
    return None


def _trials_for(
    board: Board,
    instance: InstanceState,
    room: int,
    tasks: list[TaskLedger],
    gains: dict[int, float],
    reserved: int,
) -> Step | None:
    """The best task for an instance with room: its own, one without a home, else another's that it has no time for."""
    batch = instance.batch
    usable = board.usable()
    full = {one.name for one in usable if board.ahead(one, usable) - one.outstanding < one.batch // 2}
    mine: list[TaskLedger] = []
    others: list[TaskLedger] = []
    for task in tasks:
        if board.unassigned <= max(0, reserved - task.missing):
            continue
        if task.lease is not None:
            lease = task.lease
            ahead = (board.settings.task_ahead_batches - 1) * batch
            if lease.instance == instance.name and lease.extensible and lease.outstanding <= ahead:
                mine.append(task)
        elif task.home == instance.name or not _is_home(board, task):
            mine.append(task)
        elif task.home in full and board.now_s - task.moved_s > SETTLED_HEARTBEATS * board.settings.heartbeat_s:
            others.append(task)
    top = max((gain for gain in gains.values() if gain != math.inf), default=0.0)
    best = max(mine, key=lambda task: (gains[task.index], *_expected(task)), default=None)
    if best is None or gains[best.index] < WORTH_TAKING * top:
        if instance.outstanding >= BUSY_BATCHES * batch:
            return None
        floor = gains[best.index] / WORTH_TAKING if best is not None else 0.0
        better = [task for task in others if gains[task.index] > floor]
        if better:
            best = max(better, key=lambda task: (gains[task.index], *_expected(task)))
    if best is None:
        return None
    count = min(batch, board.unassigned - max(0, reserved - best.missing))
    if best.lease is not None:
        # Less than a whole batch is not worth a message, unless it is the last.
        if room < min(count, batch // 2) and best.lease.outstanding:
            return None
        return Extend(best.lease, count)
    return Place(best, instance, count)


def _is_home(board: Board, task: TaskLedger) -> bool:
    """Whether the task has a home that can still work on it."""
    home = board.instances.get(task.home) if task.home is not None else None
    return home is not None and home.alive and not home.draining and not home.slow(board.now_s)


def _conclusion(board: Board, usable: list[InstanceState]) -> Step | None:
    """Promotion where the task was tuned; an idle instance takes it when that one has others to promote."""
    if board.unassigned > 0 and any(task.open and task.lease is None for task in board.tasks.values()):
        waiting = [task for task in board.tasks.values() if task.exhausted]
    else:
        waiting = list(board.tasks.values())
    waiting = [t for t in waiting if t.plan.tunable and t.chosen and t.lease is None and not t.state.final]
    ready = {one.name: one for one in usable if one.conclusions < board.settings.conclusions_at_once}
    for task in sorted(waiting, key=_expected, reverse=True):
        if task.home in ready:
            return Place(task, ready[task.home], 0, conclude=True)
        free = [one for one in ready.values() if not _is_home(board, task) or not one.leases]
        if free:
            return Place(task, min(free, key=lambda one: (len(one.leases), one.name)), 0, conclude=True)
    return None


def _rebalance(board: Board, usable: list[InstanceState]) -> Step | None:
    """An idle instance takes a task from one that holds several, or from one that is far slower."""
    idle = next((one for one in usable if not one.leases), None)
    if idle is None or any(lease.phase is Phase.REVOKING for one in usable for lease in one.leases.values()):
        return None
    settled = SETTLED_HEARTBEATS * board.settings.heartbeat_s
    found: list[tuple[float, Lease]] = []
    for one in board.instances.values():
        leases = [lease for lease in one.leases.values() if lease.phase is Phase.LIVE and lease.extensible]
        slower = bool(idle.rate and one.rate and one.rate * SLOWER_BY < idle.rate)
        if len(leases) < 2 and not slower:
            continue
        if one.outstanding < (1 if slower else BUSY_BATCHES) * one.batch:
            continue
        time_left = one.outstanding / one.rate if one.rate else float(one.outstanding)
        found.extend(
            (time_left + lease.outstanding / 1e6, lease)
            for lease in leases
            if lease.outstanding > one.batch // 2
            and (lease.counted == 0 or board.now_s - board.tasks[lease.task].moved_s > settled)
        )
    if not found:
        return None
    return Take(max(found, key=lambda entry: (entry[0], entry[1].task))[1], idle)
