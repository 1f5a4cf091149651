"""How a run's weighted best latency falls with time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One valid trial: its task, when it was known (seconds since tuning began), its latency."""

    task: str
    at_s: float
    latency_us: float


def weighted_curve(samples: Iterable[Sample], weights: Mapping[str, int]) -> list[tuple[float, float]]:
    """The weighted sum of the tasks' best latencies, from when every task has one.

    Args:
        samples: Valid trials of all tasks.
        weights: How often the model calls each task.

    Returns:
        (seconds, microseconds), falling, one entry per improvement.
    """
    best: dict[str, float] = {}
    curve: list[tuple[float, float]] = []
    for sample in sorted(samples, key=lambda sample: sample.at_s):
        if sample.latency_us >= best.get(sample.task, float("inf")):
            continue
        best[sample.task] = sample.latency_us
        if len(best) == len(weights):
            curve.append((sample.at_s, sum(weights[task] * latency for task, latency in best.items())))
    return curve


def time_to_settle(curve: Sequence[tuple[float, float]], share: float) -> float:
    """Seconds until a curve is within a share of its own end.

    Raises:
        ValueError: The curve is empty.
    """
    if not curve:
        raise ValueError("the curve is empty")
    reached = time_to_reach(curve, (1 + share) * curve[-1][1])
    assert reached is not None
    return reached


def time_to_reach(curve: Iterable[tuple[float, float]], latency_us: float) -> float | None:
    """Seconds until a curve is at or below a latency, None when it never is."""
    return next((at_s for at_s, value in curve if value <= latency_us), None)
