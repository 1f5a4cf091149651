"""Leases as they are given, extended, taken away and released: changes the board, says what is to be done."""

from __future__ import annotations

from tuner_core.leases import awaiting, placement
from tuner_core.leases import messages as m
from tuner_core.leases.state import EPOCH_BITS, Board, Lease, Phase
from tuner_core.model import TaskState


def find(board: Board, instance: str, task: str, token: int) -> Lease | None:
    """A lease that runs; None when it is over, or never was."""
    one = board.instances.get(instance)
    lease = one.leases.get(task) if one is not None else None
    return lease if lease is not None and lease.token == token else None


def place(board: Board, step: placement.Place, out: list[m.Instruction]) -> None:
    """Lease a task; its records go first where the instance may not have them."""
    task, one = step.task, step.instance
    foreign = task.foreign(one.name)
    warm = foreign != task.seen.get(one.name, 0)
    task.last_token += 2 if warm else 1  # an instance that misses a token looks up the task's records anew
    token = (board.epoch << EPOCH_BITS) | task.last_token
    lease = Lease(task.plan.name, token, one.name, step.trials, step.conclude, board.now_s, foreign=foreign)
    lease.take_over = not task.counted and not task.settled  # nothing is published, as far as we know
    shared = bool(task.leases)
    task.leases[one.name] = one.leases[lease.task] = lease
    task.orphaned = False
    task.new_trials += step.trials
    awaiting.pay(board, task, step.trials)
    if not step.trials and not step.conclude:
        task.baseline_attempts += 1
    elif task.home != one.name and not shared:
        task.home, task.moved_s = one.name, board.now_s
    if task.plan.tunable:
        task.state = TaskState.RUNNING
    if warm:
        out.append(m.Warm(one.name, lease.task, token))
    else:
        grant(board, lease, out)


def grant(board: Board, lease: Lease, out: list[m.Instruction]) -> None:
    """Tell the instance."""
    lease.phase, lease.changed_s = Phase.GRANTING, board.now_s
    board.tasks[lease.task].holder = lease.instance
    lease.told = lease.trials
    out.append(m.Grant(lease.instance, lease.task, lease.token, lease.trials, lease.conclude, lease.take_over))


def extend(board: Board, step: placement.Extend) -> None:
    """Add trials to a lease; :func:`tell` says so."""
    lease = step.lease
    lease.trials += step.trials
    board.tasks[lease.task].new_trials += step.trials
    board.unassigned -= step.trials


def tell(board: Board, out: list[m.Instruction]) -> None:
    """Tell the instances what was added to the leases that they have taken: once each, however often it was."""
    for one in board.instances.values():
        for lease in one.leases.values():
            if lease.phase is Phase.LIVE and lease.trials > lease.told:
                lease.told = lease.trials
                out.append(m.Grant(lease.instance, lease.task, lease.token, lease.trials))


def warmed(board: Board, event: m.Warmed, out: list[m.Instruction]) -> None:
    """The records are there: the lease can be given."""
    lease = find(board, event.instance, event.task, event.token)
    if lease is not None and lease.phase is Phase.WARMING:
        board.tasks[lease.task].seen[lease.instance] = lease.foreign
        grant(board, lease, out)


def revoke(board: Board, lease: Lease, out: list[m.Instruction]) -> None:
    """Ask for a lease back; one that was not given yet is over at once."""
    if lease.phase is Phase.WARMING:
        release(board, lease)
    elif lease.phase is not Phase.REVOKING:
        lease.phase, lease.changed_s = Phase.REVOKING, board.now_s
        out.append(m.Revoke(lease.instance, lease.task, lease.token))


def release(board: Board, lease: Lease, *, ended: bool = False) -> None:
    """The lease is over here: what it did not measure goes back into the budget."""
    task, one = board.tasks[lease.task], board.instances[lease.instance]
    del task.leases[lease.instance]
    del one.leases[lease.task]
    left = lease.outstanding
    task.new_trials -= left
    awaiting.pay(board, task, -left)
    if not ended:
        task.orphaned = lease.phase is Phase.LIVE and left > 0 and not task.leases
        one.stale.add((lease.task, lease.token))


def revoke_all(board: Board, out: list[m.Instruction]) -> None:
    """End everything, without waiting for answers."""
    for one in board.instances.values():
        for lease in one.leases.values():
            out.append(m.Revoke(lease.instance, lease.task, lease.token))
