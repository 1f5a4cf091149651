"""Summary of a handful of latency samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Median of the samples with a confidence interval for the true median, in microseconds.

    Attributes:
        coverage: Confidence that the interval has under independent samples; below what was asked for where there are
            too few samples for it.
    """

    median_us: float
    ci_low_us: float
    ci_high_us: float
    coverage: float


def summarise(samples_us: Sequence[float], confidence: float = 0.95) -> Summary:
    """Median and its distribution-free confidence interval.

    The interval lies between order statistics k and n + 1 - k; it covers the median with probability
    1 - 2 * P(Binomial(n, 1/2) < k), whatever the distribution (David & Nagaraja, Order Statistics, 3rd ed., section
    7.1). The largest k that reaches ``confidence`` is taken. With fewer than 6 samples none reaches 0.95: then the
    interval is the range of the samples, and ``coverage`` says how little that is worth (0.75 for three).

    Args:
        samples_us: At least one sample.
        confidence: Wanted coverage, between 0 and 1.

    Raises:
        ValueError: No sample.
    """
    if not samples_us:
        raise ValueError("a summary needs at least one sample")
    ordered = sorted(samples_us)
    count = len(ordered)
    rank, coverage, below = 1, 1.0 - 2.0 * 0.5**count, 0.0
    for k in range(1, count // 2 + 1):
        below += math.comb(count, k - 1) * 0.5**count
        if 1.0 - 2.0 * below < confidence:
            break
        rank, coverage = k, 1.0 - 2.0 * below
    return Summary(statistics.median(ordered), ordered[rank - 1], ordered[count - rank], max(0.0, coverage))
