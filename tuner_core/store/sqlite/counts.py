"""The counts of :meth:`RecordStore.stats`, from groups and indexes: no record is read."""

from __future__ import annotations

import sqlite3
from typing import Any

from tuner_core.store.counts import DAY_S, GROWTH_DAYS, coverage, growth


def read_stats(connection: sqlite3.Connection, now: float) -> dict[str, Any]:
    """All counts, read in the caller's transaction. ``now``: seconds since the epoch."""
    counts = connection.execute(
        "SELECT group_id, count(*), total(sort_us < 9e999) FROM records INDEXED BY records_group_latency "
        "GROUP BY group_id"
    ).fetchall()
    groups = {
        row[0]: row[1:]
        for row in connection.execute(
            "SELECT g.id, k.device_model, g.model, g.team, k.workload_id, g.sm_percent, k.sm_count "
            "FROM groups g JOIN keys k ON k.id = g.key_id"
        )
    }
    records = sum(count for _, count, _ in counts)
    valid = sum(int(good) for _, _, good in counts)
    found: dict[str, Any] = {
        "records": records,
        "valid": valid,
        "failed": records - valid,
        "verified": connection.execute("SELECT count(*) FROM records WHERE verified = 1").fetchone()[0],
        "workloads": connection.execute("SELECT count(*) FROM workloads").fetchone()[0],
    }
    for position, name in enumerate(("by_device", "by_model", "by_team")):
        tally: dict[str, int] = {}
        for group, count, _ in counts:
            value = groups[group][position]
            tally[value] = tally.get(value, 0) + count
        found[name] = tally
    operators: dict[str, set[int]] = {}
    for group, _, _ in counts:
        operators.setdefault(groups[group][1], set()).add(groups[group][3])
    verified = connection.execute(
        "SELECT DISTINCT group_id FROM records INDEXED BY records_verified "
        "WHERE verified = 1 AND failure IS NULL AND condemned_by IS NULL"
    )
    found["coverage"] = coverage(
        operators, ((groups[group][3], groups[group][0], *groups[group][4:]) for (group,) in verified)
    )
    today = int(now // DAY_S)
    by_day = connection.execute(
        "SELECT CAST(created_at AS INTEGER) / ? AS day, count(*) FROM records INDEXED BY records_time "
        "WHERE created_at >= ? AND created_at < ? GROUP BY day",
        (DAY_S, (today - GROWTH_DAYS + 1) * DAY_S, (today + 1) * DAY_S),
    )
    found["growth"] = growth(dict(by_day.fetchall()), now)
    return found
