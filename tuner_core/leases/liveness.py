"""Which instances are silent, and which are far slower than the others."""

from __future__ import annotations

import statistics

from tuner_core.leases.state import Board, InstanceState, Lease, Phase

GRACE_HEARTBEATS = 6
"""An instance that has just got work is not judged: the first trials of a task take longest."""
JUDGED_TRIALS = 40
WINDOW_TRIALS = 160
PROBATION_HEARTBEATS = 12
MAX_STRIKES = 6
ANSWER_HEARTBEATS = 12
"""A lease that is neither taken nor refused for so long, or not given back, is lost."""


def silent(board: Board) -> list[InstanceState]:
    """Instances that have been silent for too long; those that are about to be are marked as suspect."""
    limit_s = board.settings.silent_heartbeats * board.settings.heartbeat_s
    found = []
    for one in board.instances.values():
        if one.alive:
            silence_s = board.now_s - one.heard_s
            one.suspect = silence_s > 2 / 3 * limit_s
            if silence_s >= limit_s:
                found.append(one)
    return found


def measure_rates(board: Board) -> None:
    """Open, extend and close the windows in which trials per second are counted.

    A window runs while an instance has trials to measure and nothing to promote, which would take its device.
    """
    for one in board.instances.values():
        searching = one.alive and one.outstanding > 0 and one.conclusions == 0
        if not searching:
            _close_window(one, board.now_s)
        elif one.window_since_s is None:
            one.window_since_s, one.window_trials = board.now_s, 0
        elif one.window_trials >= WINDOW_TRIALS:
            _close_window(one, board.now_s)
            one.window_since_s = board.now_s


def _close_window(one: InstanceState, now_s: float) -> None:
    if one.window_since_s is not None and one.window_trials >= JUDGED_TRIALS // 2 and now_s > one.window_since_s:
        one.rate = one.window_trials / (now_s - one.window_since_s)
    one.window_since_s, one.window_trials = None, 0


def slow(board: Board) -> list[InstanceState]:
    """Instances that measure ``slow_factor`` times slower than the median of the others, now found."""
    grace_s = GRACE_HEARTBEATS * board.settings.heartbeat_s
    found = []
    for one in board.instances.values():
        if one.window_since_s is None or one.slow(board.now_s) or not one.alive:
            continue
        elapsed_s = board.now_s - one.window_since_s
        if elapsed_s < grace_s:
            continue
        others = [
            speed for other in board.instances.values() if other is not one and (speed := rate(other, board.now_s))
        ]
        if not others:
            continue
        expected = statistics.median(others) * elapsed_s
        if expected >= JUDGED_TRIALS and one.window_trials * board.settings.slow_factor < expected:
            one.rate = max(one.window_trials, 1) / elapsed_s
            one.slow_until_s = board.now_s + PROBATION_HEARTBEATS * board.settings.heartbeat_s * 2 ** min(
                one.slow_strikes, MAX_STRIKES
            )
            one.slow_strikes += 1
            one.window_since_s = None
            found.append(one)
    return found


def rate(one: InstanceState, now_s: float) -> float | None:
    """Trials per second of an instance, measured lately; None when it has not had enough of them."""
    if one.rate is not None:
        return one.rate
    if one.window_since_s is not None and one.window_trials >= JUDGED_TRIALS // 2 and now_s > one.window_since_s:
        return one.window_trials / (now_s - one.window_since_s)
    return None


def unanswered(board: Board) -> list[Lease]:
    """Leases that were never taken, or were revoked and never given back."""
    limit_s = ANSWER_HEARTBEATS * board.settings.heartbeat_s
    return [
        lease
        for one in board.instances.values()
        for lease in one.leases.values()
        if lease.phase is not Phase.LIVE and board.now_s - lease.changed_s > limit_s
    ]


def stuck(board: Board) -> list[Lease]:
    """Leases that run without giving any result."""
    return [
        lease
        for one in board.instances.values()
        for lease in one.leases.values()
        if lease.phase is Phase.LIVE and board.now_s - lease.changed_s > board.settings.stuck_s
    ]
