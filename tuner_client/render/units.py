"""Numbers in words, the same everywhere."""

from __future__ import annotations

import time


def latency(value_us: float | None) -> str:
    """Latency with its unit, three significant digits, e.g. ``8.12 µs``, ``231 µs``, ``1.52 ms``."""
    if value_us is None:
        return "-"
    for limit, divisor, unit in ((1e3, 1.0, "µs"), (1e6, 1e3, "ms")):
        if value_us < limit * 0.9995:
            return f"{_three_digits(value_us / divisor)} {unit}"
    return f"{_three_digits(value_us / 1e6)} s"


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def speedup(value: float | None) -> str:
    """Ratio of latencies, e.g. ``3.51x``."""
    return "-" if value is None else f"{_three_digits(value)}x"


def duration(value_s: float) -> str:
    """``45 s``, ``3:07``, ``1:02:03``."""
    seconds = max(0, round(value_s))
    if seconds < 60:
        return f"{seconds} s"
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def rate(value: float) -> str:
    """Trials per second, e.g. ``6.1/s``; below one, per minute."""
    if value <= 0:
        return "-/s"
    return f"{value:.1f}/s" if value >= 1 else f"{60 * value:.0f}/min"


def count(value: int, noun: str) -> str:
    """``1 trial``, ``1,152 trials``."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def ago(created_at: float) -> str:
    """How long ago, from seconds since the epoch."""
    passed = max(0.0, time.time() - created_at)
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if passed < limit:
            return f"{passed / divisor:.0f} {unit} ago"
    return f"{passed / 86400:.0f} days ago"
