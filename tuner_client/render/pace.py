"""How fast a job goes now and when it will be done."""

from __future__ import annotations

import time
from collections import deque

from tuner_client.job import JobReport

_WINDOW_S = 30.0


class Pace:
    """Trials per second over the last half minute, as seen by the client.

    Args:
        clock: Monotonic seconds; for tests.
    """

    def __init__(self, clock: object = None) -> None:
        self._clock = clock if callable(clock) else time.monotonic
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, report: JobReport) -> None:
        """Take in the job's newest state."""
        now = self._clock()
        if self._seen and report.measured < self._seen[-1][1]:
            self._seen.clear()  # another job, or a server that lost its last seconds
        self._seen.append((now, report.measured))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW_S:
            self._seen.popleft()

    def trials_per_s(self, report: JobReport) -> float:
        """The present rate; the job's average until enough was seen."""
        if len(self._seen) > 1:
            (first_time, first), (_, last) = self._seen[0], self._seen[-1]
            passed_s = self._clock() - first_time
            if passed_s >= 5.0 and last > first:
                return float(last - first) / passed_s
        return report.trials_per_s

    def left_s(self, report: JobReport) -> float | None:
        """Seconds until the budget is spent, None when that cannot be said."""
        pace = self.trials_per_s(report)
        remaining = report.budget - report.measured - report.reused
        return remaining / pace if pace > 0 and remaining > 0 else None


def fraction(report: JobReport) -> float:
    """Share of the trial budget that is spent, 0 to 1. Trials from the store count, as they do on the server."""
    return min(1.0, (report.measured + report.reused) / report.budget) if report.budget else 0.0
