"""Query arguments and page cursors, the same for every backend."""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass

from tuner_core.errors import UsageError
from tuner_core.model import canonical_json, sha256_hex
from tuner_core.store.interface import RecordFilter
from tuner_core.store.shapes import parse_shape

MAX_LIMIT = 10_000
ORDERS = ("latency", "newest")


@dataclass(frozen=True)
class Cursor:
    """Where the next page begins.

    Attributes:
        snapshot: The store's sequence number at the first page; what was stored later is not on later pages.
        sort_value: Sort value of the last record shown: median in microseconds (inf: failed), or minus its time.
        trial_id: Its id, which breaks ties.
    """

    snapshot: int
    sort_value: float
    trial_id: str


@dataclass(frozen=True)
class QueryArguments:
    """A checked query. ``fingerprint`` ties a cursor to the query that made it."""

    where: RecordFilter
    limit: int
    order: str
    top_per_key: int
    cursor: Cursor | None
    fingerprint: str

    def next_cursor(self, cursor: Cursor) -> str:
        """The text form of a cursor for this query."""
        body = json.dumps([1, self.fingerprint, cursor.snapshot, cursor.sort_value.hex(), cursor.trial_id])
        return base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")


def check_query(where: RecordFilter, limit: int, cursor: str | None, order: str, top_per_key: int) -> QueryArguments:
    """Check the arguments of ``RecordStore.query``.

    Raises:
        UsageError: An unknown order, a cursor that is not one or belongs to another query, or a limit out of range.
    """
    if order not in ORDERS:
        raise UsageError(f"unknown order {order!r}: use one of {', '.join(ORDERS)}")
    check_limit(limit)
    _check_filter(where)
    if top_per_key < 0:
        raise UsageError(f"top_per_key {top_per_key} is negative")
    facts = dataclasses.asdict(where) | {"tags": dict(where.tags)}
    fingerprint = sha256_hex(canonical_json([facts, order, top_per_key]))[:16]
    parsed = _parse(cursor, fingerprint) if cursor else None
    return QueryArguments(where, limit, order, top_per_key, parsed, fingerprint)


def check_limit(limit: int) -> None:
    """Raise UsageError unless a page of that many records may be asked for."""
    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"limit {limit} is not in 1..{MAX_LIMIT}")


def check_follow(where: RecordFilter, limit: int) -> None:
    """Check the arguments of ``RecordStore.follow``.

    Raises:
        UsageError: A limit out of range, or a filter that needs to know all records.
    """
    check_limit(limit)
    _check_filter(where)
    if where.nearest_sm_percent is not None:
        raise UsageError("the nearest share is known of stored records only: follow with an exact share or a range")


def _check_filter(where: RecordFilter) -> None:
    if where.shape:
        parse_shape(where.shape)
    nearest = where.nearest_sm_percent
    if nearest is not None and not 1 <= nearest <= 100:
        raise UsageError(f"nearest_sm_percent {nearest} is not in 1..100")


def _parse(text: str, fingerprint: str) -> Cursor:
    try:
        version, made_for, snapshot, sort_value, trial_id = json.loads(
            base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        )
        parsed = Cursor(int(snapshot), float.fromhex(sort_value), bytes.fromhex(trial_id).hex())
    except (ValueError, TypeError, OverflowError):
        raise UsageError("this is not a cursor: give the one that came with the page before") from None
    if version != 1 or made_for != fingerprint:
        raise UsageError("this cursor belongs to another query: repeat the same filter and order with it")
    return parsed
