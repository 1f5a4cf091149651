"""How a job's trial budget is shared out before the first measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_TRIALS = 8
"""Trials that a task needs at least, so that one valid candidate can be promoted."""

DEFAULT_NEGLIGIBLE_SHARE = 0.005
"""Operators that together take less of the untuned model keep the fallback schedule."""


@dataclass(frozen=True)
class TaskHistory:
    """What is known of a task: how many trials, and whether a verified record is published."""

    known: int
    settled: bool


def new_trials(budget: int, histories: Sequence[TaskHistory]) -> int:
    """Trials to measure in this job, after what the store already holds.

    Known trials count towards the budget, so that a repeated job measures nothing; but a task without a published
    record gets its fair share even when others have been tuned far beyond theirs.

    Args:
        budget: The whole job's trials.
        histories: One entry per tunable task.
    """
    if not histories:
        return 0
    fair = max(MIN_TRIALS, budget // len(histories))
    left = max(0, budget - sum(history.known for history in histories))
    owed = sum(max(0, fair - history.known) for history in histories if not history.settled)
    return min(budget, max(left, owed))


def tasks_worth_trials(
    trials: int, weighted_latency_us: Mapping[int, float], *, already_known: Mapping[int, int]
) -> list[int]:
    """The tasks that get trials when there are not enough for all: those that the model spends most time in.

    A task gets :data:`MIN_TRIALS` or none; when not even one task can have that many, the first gets them all.

    Args:
        trials: New trials to share out.
        weighted_latency_us: Task index to weight times baseline latency.
        already_known: Trials that a task has already; they count towards its minimum.

    Returns:
        Task indices, the most expensive first.
    """
    chosen: list[int] = []
    left = trials
    for task in sorted(weighted_latency_us, key=lambda index: (-weighted_latency_us[index], index)):
        need = max(0, MIN_TRIALS - already_known.get(task, 0))
        if need <= left and left > 0:
            chosen.append(task)
            left -= need
    if not chosen and trials > 0 and weighted_latency_us:
        chosen = [max(weighted_latency_us, key=lambda index: (weighted_latency_us[index], -index))]
    return chosen


def negligible_tasks(weighted_latency_us: Mapping[int, float], others_us: float, share: float) -> list[int]:
    """The tasks that are not worth trials: the cheapest ones that together take less than a share of the model.

    Together, so that many small operators are not dropped one by one until a large part of the model is untuned.

    Args:
        weighted_latency_us: Task index to weight times latency of the fallback schedule.
        others_us: The same, summed over operators that are not tuned anyway.
        share: Of the whole model's time; 0: every task is worth trials.

    Returns:
        Task indices, the cheapest first.
    """
    left = share * (others_us + sum(weighted_latency_us.values()))
    dropped: list[int] = []
    for task in sorted(weighted_latency_us, key=lambda index: (weighted_latency_us[index], -index)):
        left -= weighted_latency_us[task]
        if left < 0:
            break
        dropped.append(task)
    return dropped if share > 0 else []


def negligible_reason(share: float) -> str:
    """Why a task got no trials, for people."""
    return f"not worth trials: with the other small operators less than {100 * share:g} % of the untuned model"


def negligible_line(count: int, share: float) -> str:
    """What is said when tasks get no trials."""
    keep = "1 operator keeps" if count == 1 else f"{count} operators keep"
    return f"{keep} the fallback schedule: less than {100 * share:g} % of the untuned model together"
