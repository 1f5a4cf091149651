"""Which lease is given next, and to whom. Pure: looks at the board, proposes one step."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from tuner_core.leases import liveness
from tuner_core.leases.state import Board, InstanceState, Lease, Phase, TaskLedger

WORTH_TAKING = 0.25
"""An instance whose own tasks gain less than this share of what the best one gains looks at those of others first."""
BUSY_BATCHES = 2
PART = 0.9
"""Of what is left and would be an instance's part, by its speed, so much is leased to it at most."""
LAST_SHARE = 1 / 3
"""Towards the end, an instance that builds for long still has so many of the candidates that keep it busy."""
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
    return (
        _baseline(board, usable)
        or _ask_again(board, usable)
        or _search(board, usable)
        or _conclusion(board, usable)
        or _rebalance(board, usable)
    )


def _baseline(board: Board, usable: list[InstanceState]) -> Step | None:
    """Baselines of tasks that get no trials (yet), spread over all."""
    waiting = [
        task
        for task in board.tasks.values()
        if not task.baseline_known and not task.leases and not task.state.final and (not task.chosen or task.reusable)
    ]
    if not waiting:
        return None
    instance = min(usable, key=lambda one: (one.baselines, one.outstanding, one.name))
    if instance.baselines >= board.settings.baselines_at_once:
        return None
    return Place(max(waiting, key=_expected), instance, 0)


def _ask_again(board: Board, usable: list[InstanceState]) -> Step | None:
    """A lease of a task that another job tunes: it ends with that job's result, or goes on after it."""
    for task in board.tasks.values():
        awaited = task.awaited
        if awaited is not None and not task.leases and board.now_s >= awaited.ask_s:
            one = min(usable, key=lambda one: (one.outstanding, one.name))
            trials = min(one.batch, awaited.set_aside)
            return Place(task, one, trials, conclude=not trials)
    return None


def _expected(task: TaskLedger) -> tuple[float, int]:
    return (task.plan.weight * task.plan.cost, -task.index)


@dataclass(frozen=True)
class _Rooms:
    """How many trials the instances that take leases have, and may have, ahead of their results."""

    outstanding: dict[str, int]
    ahead: dict[str, int]

    def room(self, one: InstanceState) -> int:
        """Trials that the instance may get now."""
        return self.ahead[one.name] - self.outstanding[one.name]

    def grain(self, one: InstanceState) -> int:
        """The fewest trials worth a message: half a batch, towards the end one trial for each worker."""
        half = max(1, one.batch // 2)
        return half if self.ahead[one.name] >= one.batch * BUSY_BATCHES else min(half, one.workers)

    def enough(self, one: InstanceState) -> bool:
        """Whether there is room for a lease, or for an extension that is worth it."""
        room = self.room(one)
        return room > 0 and (not self.outstanding[one.name] or room >= self.grain(one))


@dataclass(frozen=True)
class _Outlook:
    """What one decision about trials looks at, worked out once.

    Attributes:
        tasks: Those that may get trials.
        gains: Of these, by index; ``top`` is the best that is known.
        rooms: Of the instances.
        reserved: Trials that must stay for tasks that have not had their least.
        crowded: An instance holds several searches, of which another could have one.
    """

    tasks: list[TaskLedger]
    gains: dict[int, float]
    top: float
    rooms: _Rooms
    reserved: int
    crowded: bool


def _outlook(board: Board, usable: list[InstanceState], rooms: _Rooms) -> _Outlook:
    tasks = board.open_tasks()
    gains = {task.index: task.gain() for task in tasks}
    searches = (sum(lease.trials > 0 for lease in one.leases.values()) for one in usable)
    return _Outlook(
        tasks=tasks,
        gains=gains,
        top=max((gain for gain in gains.values() if gain != math.inf), default=0.0),
        rooms=rooms,
        reserved=board.reserved() if board.leased() else board.undecided(),
        crowded=any(count > 1 for count in searches),
    )


def _ahead(board: Board, usable: list[InstanceState], left: int) -> dict[str, int]:
    """Trials that may be leased to each instance ahead of its results.

    As many as keep an instance busy, and a batch more: the next slice is there before the last one drains. Where an
    instance does not say how many these are, the fastest have ``ahead_batches``, the others what they measure in the
    same time, and little until their speed is known. Towards the end no more than ``PART`` of an instance's part of the
    ``left`` ones, by its speed: slices shrink, and all end together (guided self-scheduling, Polychronopoulos and Kuck
    1987).
    """
    rates = {one.name: liveness.rate(one, board.now_s) for one in usable}
    known = [rate for rate in rates.values() if rate is not None]
    typical = statistics.fmean(known) if known else 1.0
    speeds = {name: typical if rate is None else rate for name, rate in rates.items()}
    fastest, total = max(speeds.values()), sum(speeds.values())
    found = {}
    for one in usable:
        speed = speeds[one.name]
        least = max(min(one.batch, one.workers), math.ceil(LAST_SHARE * one.in_flight))
        part = PART * left * speed / total
        if one.in_flight:
            usual = float(one.in_flight + one.batch)
        elif rates[one.name] is None:
            usual = float(BUSY_BATCHES * one.batch)
        else:
            usual = max(one.batch, board.settings.ahead_batches * one.batch * speed / fastest)
        found[one.name] = max(least, math.ceil(min(part, usual)))
    return found


def _orphan(board: Board, usable: list[InstanceState]) -> Step | None:
    """A task whose lease was lost goes on at the instance that has least to do, though that has enough."""
    orphans = [task for task in board.tasks.values() if task.orphaned and task.open and not task.leases]
    if not orphans:
        return None
    rates = {one.name: liveness.rate(one, board.now_s) for one in usable}
    fastest = max((rate for rate in rates.values() if rate), default=1.0)
    one = min(usable, key=lambda one: (one.outstanding / (rates[one.name] or fastest), one.name))
    reserved = board.reserved()
    for task in orphans:
        if (count := min(one.batch, board.unassigned - reserved + task.missing)) > 0:
            return Place(task, one, count)
    return None


def _search(board: Board, usable: list[InstanceState]) -> Step | None:
    if board.unassigned <= 0:
        return None
    if (step := _orphan(board, usable)) is not None:
        return step
    outstanding = {one.name: one.outstanding for one in board.instances.values()}
    rooms = _Rooms(outstanding, _ahead(board, usable, board.unassigned + sum(outstanding.values())))
    ready = [one for one in usable if rooms.enough(one)]
    if not ready:
        return None
    outlook = _outlook(board, usable, rooms)
    homed = {one.name: 0.0 for one in usable}
    for task in outlook.tasks:
        if task.home in homed:
            homed[task.home] += _expected(task)[0]
    for one in sorted(ready, key=lambda one: (outstanding[one.name] / one.batch, homed[one.name], one.name)):
        if (step := _trials_for(board, one, outlook)) is not None:
            return step
    return None


def _trials_for(board: Board, instance: InstanceState, outlook: _Outlook) -> Step | None:
    """The best task for an instance with room.

    Its own or one without a home; else another's that it has no time for; else one that others are at, together.
    """
    batch = instance.batch
    rooms = outlook.rooms
    full = {name for name, ahead in rooms.ahead.items() if ahead - rooms.outstanding[name] < batch // 2}
    worth_opening = not outlook.crowded and rooms.room(instance) >= batch // 2  # one more search of the same task
    each = math.ceil(rooms.ahead[instance.name] * len(rooms.ahead) / max(1, len(outlook.tasks)))
    most = max(board.settings.task_ahead_batches * batch, each + batch)
    mine: list[TaskLedger] = []
    others: list[TaskLedger] = []
    together: list[TaskLedger] = []
    for task in outlook.tasks:
        if board.unassigned <= max(0, outlook.reserved - task.missing):
            continue
        if (lease := task.leases.get(instance.name)) is not None:
            if lease.extensible and lease.outstanding <= most - batch:
                mine.append(task)
        elif task.leases:
            if worth_opening and all(lease.extensible for lease in task.leases.values()):
                together.append(task)
        elif task.home == instance.name or not _is_home(board, task):
            mine.append(task)
        elif task.home in full and board.now_s - task.moved_s > SETTLED_HEARTBEATS * board.settings.heartbeat_s:
            others.append(task)
    gains = outlook.gains
    best = max(mine, key=lambda task: (gains[task.index], *_expected(task)), default=None)
    if best is None and rooms.outstanding[instance.name] >= BUSY_BATCHES * batch:
        return None
    if best is None or gains[best.index] < WORTH_TAKING * outlook.top:
        floor = gains[best.index] / WORTH_TAKING if best is not None else 0.0
        if better := [task for task in others if gains[task.index] > floor]:
            best = max(better, key=lambda task: (gains[task.index], *_expected(task)))
        elif better := [task for task in together if gains[task.index] / (len(task.leases) + 1) > floor]:
            best = max(better, key=lambda task: (gains[task.index] / (len(task.leases) + 1), *_expected(task)))
    if best is None:
        return None
    grain = rooms.grain(instance)
    count = min(batch, max(grain, rooms.room(instance)), board.unassigned - max(0, outlook.reserved - best.missing))
    if (held := best.leases.get(instance.name)) is not None:
        return Extend(held, count)
    return Place(best, instance, count)


def _is_home(board: Board, task: TaskLedger) -> bool:
    """Whether the task has a home that can still work on it."""
    home = board.instances.get(task.home) if task.home is not None else None
    return home is not None and home.alive and not home.draining and not home.slow(board.now_s)


def _conclusion(board: Board, usable: list[InstanceState]) -> Step | None:
    """Promotion where the task was tuned.

    Where nothing else is left to do, another takes it when that one has enough to promote; any, when it is far slower.
    """
    waiting = [
        task
        for task in board.tasks.values()
        if task.plan.tunable
        and task.chosen
        and not task.leases
        and not task.state.final
        and not task.reusable
        and task.awaited is None
    ]
    if board.unassigned > 0:
        # As many as there are batches left may still get one; the others can be promoted while the search goes on.
        slices = math.ceil(board.unassigned / max(one.batch for one in usable))
        by_gain = sorted((task for task in waiting if task.open), key=TaskLedger.gain, reverse=True)
        stay = {task.index for task in by_gain[:slices]} | {task.index for task in by_gain if task.missing}
        waiting = [task for task in waiting if task.index not in stay]
    speeds = {one.name: liveness.rate(one, board.now_s) or math.inf for one in usable}
    fastest = max((speed for speed in speeds.values() if speed != math.inf), default=0.0)
    ready = {
        one.name: one
        for one in usable
        if one.conclusions < board.settings.conclusions_at_once and speeds[one.name] * SLOWER_BY >= fastest
    }
    for task in sorted(waiting, key=_expected, reverse=True):
        if task.home in ready:
            return Place(task, ready[task.home], 0, conclude=True)
        away = not _is_home(board, task) or speeds.get(task.home or "", math.inf) * SLOWER_BY < fastest
        if free := [one for one in ready.values() if away or len(one.leases) == one.conclusions]:
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
