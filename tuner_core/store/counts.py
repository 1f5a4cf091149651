"""Coverage and growth as :meth:`RecordStore.stats` gives them, from what a backend counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from datetime import UTC, datetime, timedelta
from typing import Any

DAY_S = 86_400
GROWTH_DAYS = 30


def growth(by_day: Mapping[int, int], now: float) -> list[dict[str, Any]]:
    """Records of each of the last 30 days, oldest first.

    Args:
        by_day: How many records by day since the epoch (``created_at // DAY_S``, UTC).
        now: Seconds since the epoch.
    """
    today = int(now // DAY_S)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return [
        {"day": (epoch + timedelta(days=day)).strftime("%Y-%m-%d"), "records": by_day.get(day, 0)}
        for day in range(today - GROWTH_DAYS + 1, today + 1)
    ]


def coverage(operators: Mapping[str, Set[Any]], verified: Iterable[tuple[Any, str, int, int]]) -> list[dict[str, Any]]:
    """How many operators of each model have a verified record, by device, share and SM count.

    Args:
        operators: Workloads (any hashable) of each model of which there is a record.
        verified: ``(workload, device_model, sm_percent, sm_count)`` of every verified valid record, repeats allowed.
    """
    places: dict[tuple[str, int, int], set[Any]] = {}
    for workload, device_model, sm_percent, sm_count in verified:
        places.setdefault((device_model, sm_percent, sm_count), set()).add(workload)
    rows = []
    for model in sorted(operators):
        for (device_model, sm_percent, sm_count), workloads in sorted(places.items()):
            if count := len(operators[model] & workloads):
                rows.append(
                    {
                        "model": model,
                        "device_model": device_model,
                        "sm_percent": sm_percent,
                        "sm_count": sm_count,
                        "operators": len(operators[model]),
                        "verified": count,
                    }
                )
    return rows
