"""Instances as they come, go, drain, and are heard from."""

from __future__ import annotations

from tuner_core.leases import holding
from tuner_core.leases import messages as m
from tuner_core.leases.state import Board, InstanceState, Phase


def join(board: Board, event: m.InstanceJoined, out: list[m.Instruction]) -> None:
    """An instance takes part, for the first time or again; what it held before a restart is free."""
    one = board.instances.setdefault(event.instance, InstanceState(event.instance))
    if one.incarnation != event.incarnation:
        for lease in list(one.leases.values()):
            holding.release(board, lease)
        if one.incarnation:
            out.append(m.Say(f"{one.name} was restarted; what it held is leased again"))
        one.stale.clear()
        if board.model_at == one.name:
            board.model_at = None
        for ledger in board.tasks.values():  # its store may have begun anew, too
            ledger.seen.pop(one.name, None)
            ledger.produced[""] += ledger.produced.pop(one.name, 0)
    elif not one.alive:
        out.append(m.Say(f"{one.name} is back"))
    if not one.alive or one.incarnation != event.incarnation:
        one.window_since_s, one.slow_until_s, one.backoff_until_s, one.refusals = None, float("-inf"), 0.0, 0
    one.incarnation, one.workers, one.batch = event.incarnation, event.workers, max(1, event.batch)
    one.in_flight = event.in_flight
    one.alive, one.suspect, one.draining, one.reason = True, False, False, ""
    one.heard_s = board.now_s
    for task, token in sorted(one.stale):  # it may still hold what it lost while nobody heard from it
        out.append(m.Revoke(one.name, task, token))
    one.stale.clear()
    board.joined = True
    if event.draining:
        drain(board, one.name, out)


def hear(board: Board, name: str) -> bool:
    """Note a sign of life; whether that changes who may get leases."""
    one = board.instances.get(name)
    if one is None or not one.alive:
        return False
    one.heard_s = board.now_s
    changed, one.suspect = one.suspect, False
    return changed


def drain(board: Board, name: str, out: list[m.Instruction]) -> bool:
    """An instance takes no more; whether that is new."""
    one = board.instances.get(name)
    if one is None or one.draining:
        return False
    one.draining = True
    out.append(m.Say(f"{name} is draining: it finishes what it measures, its leases move"))
    clear(board, one, out)
    return True


def clear(board: Board, one: InstanceState, out: list[m.Instruction]) -> None:
    """Take an instance's leases away in good order; a promotion that runs may end."""
    for lease in list(one.leases.values()):
        if not lease.conclude or lease.phase is not Phase.LIVE:
            holding.revoke(board, lease, out)


def lose_instance(board: Board, one: InstanceState, reason: str, out: list[m.Instruction]) -> None:
    """An instance is gone: its leases are free at once."""
    held = len(one.leases)
    one.alive, one.suspect, one.reason = False, False, reason
    for lease in list(one.leases.values()):
        holding.release(board, lease)
    if board.model_at == one.name:
        board.model_at = None
    for task in board.tasks.values():
        if task.home == one.name:
            task.home = None
    moves = f"; its {held} leases move" if held > 1 else "; its lease moves" if held else ""
    out.append(m.Say(f"{one.name} {reason}{moves}"))
