"""Followers: the stream of commits, each with the number of the one before it."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

from tuner_core.errors import UsageError
from tuner_core.model import Record
from tuner_core.store.groups import EXACT, ArgsInfo
from tuner_core.store.interface import Followed, RecordFilter
from tuner_core.store.redis import entries
from tuner_core.store.redis.catalogue import Catalogue, read_args_info
from tuner_core.store.redis.connection import Connection
from tuner_core.store.redis.query import read_records
from tuner_core.store.shapes import parse_shape, shape_matches

_FORM = "redis-"
_EVENTS_AT_ONCE = 64
_BLOCK_S = 1.0
_CLOCKS_DIFFER_S = 86_400.0


class Follower:
    """Reads the stream of a store's commits.

    A cursor is (number of the last event that was read whole, trials read of the next one, the next one's number). A
    failover may lose events that were read: their numbers stay behind, and what comes after them is read on.

    Args:
        connection: Of the store.
        catalogue: Of the store.
    """

    def __init__(self, connection: Connection, catalogue: Catalogue) -> None:
        self._connection = connection
        self._catalogue = catalogue
        self._args_info: OrderedDict[str, ArgsInfo] = OrderedDict()

    def follow(self, where: RecordFilter, after: str | None, limit: int, wait_s: float) -> Followed:
        """See :meth:`RecordStore.follow`."""
        deadline = time.monotonic() + wait_s
        number, offset, cut = (self._end(), 0, 0) if after is None else _position(after)
        records: list[Record] = []
        while True:
            events = self._events(number, after)
            for event, digest, trials in events:
                if event != cut:
                    offset = 0
                taken = self._take(where, digest, trials[offset:], limit - len(records))
                records += taken[0]
                offset += taken[1]
                if offset < len(trials):
                    cut = event
                    break
                number, offset, cut = event, 0, 0
                if len(records) >= limit:
                    break
            left_s = deadline - time.monotonic()
            if records or (not events and left_s <= 0):
                return Followed(tuple(records), f"{_FORM}{number}" + (f".{offset}.{cut}" if offset else ".0"))
            if not events:
                self._wait(number, min(left_s, _BLOCK_S, self._connection.location.timeout_s / 2))

    def _end(self) -> int:
        return int(self._connection.one("HGET", self._connection.keys.published, "e") or 0)

    def _events(self, number: int, after: str | None) -> list[tuple[int, str, list[bytes]]]:
        """Events behind a number.

        Raises:
            UsageError: The next one was forgotten, or the number is not of this store.
        """
        keys = self._connection.keys
        found = self._connection.one("XRANGE", keys.events, f"{number + 1}-0", "+", "COUNT", _EVENTS_AT_ONCE)
        events: list[tuple[int, str, list[bytes]]] = []
        before: list[int] = []
        for name, fields in found:
            values = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
            trials = values[b"t"]
            cut = [trials[at : at + 32] for at in range(0, len(trials), 32)]
            events.append((int(name.split(b"-")[0]), values[b"w"].hex(), cut))
            before.append(int(values.get(b"p", events[-1][0] - 1)))
        if events:
            if before[0] > number:
                raise UsageError(
                    f"the cursor {after!r} is too old: the store remembers the last commits only; begin anew, without "
                    "a cursor, and query for what came meanwhile"
                )
        elif number > (time.time() + _CLOCKS_DIFFER_S) * 1e6 or (
            self._end() > number and not self._connection.one("EXISTS", keys.events)
        ):
            raise UsageError(f"the cursor {after!r} is not one of this store: begin anew, without a cursor")
        return events

    def _wait(self, number: int, wait_s: float) -> None:
        with self._connection.using() as client:
            client.xread({self._connection.keys.events: f"{number}-0"}, count=1, block=max(1, int(wait_s * 1000)))

    def _take(self, where: RecordFilter, digest: str, trials: list[bytes], limit: int) -> tuple[list[Record], int]:
        """Matching records among these, and how many trials that took."""
        stored = self._connection.one("HMGET", self._connection.keys.of(digest).records, *trials)
        by_trial = dict(zip(trials, stored, strict=True))
        records = read_records(self._catalogue, digest, by_trial.items())
        taken: list[Record] = []
        for count, trial in enumerate(trials):
            if len(taken) == limit:
                return taken, count
            record = records.get(trial)
            if record is not None and self._matches(where, record, condemned=entries.is_condemned(by_trial[trial])):
                taken.append(record)
        return taken, len(trials)

    def _matches(self, where: RecordFilter, record: Record, *, condemned: bool) -> bool:
        for name in EXACT:
            wanted = getattr(where, name)
            if wanted not in ("", None) and wanted != getattr(record, name):
                return False
        low, high = where.min_sm_percent or 0, 100 if where.max_sm_percent is None else where.max_sm_percent
        if not low <= record.sm_percent <= high or where.text.lower() not in record.description.lower():
            return False
        if not where.include_failed and (condemned or record.failure is not None):
            return False
        if where.verified_only and not record.verified:
            return False
        if where.since is not None and record.created_at < where.since:
            return False
        if any(record.tags.get(name) != value for name, value in where.tags.items()):
            return False
        if not where.dtype and not where.shape:
            return True
        args_info = self._arguments(record.workload_digest)
        if where.dtype and all(dtype != where.dtype for _, dtype, _ in args_info):
            return False
        return not where.shape or shape_matches(parse_shape(where.shape), args_info, record.description)

    def _arguments(self, digest: str) -> ArgsInfo:
        found = self._args_info.get(digest)
        if found is None:
            found = read_args_info(self._connection.one("HGET", self._connection.keys.of(digest).workload, "args_info"))
            self._args_info[digest] = found
            while len(self._args_info) > 1_000:
                self._args_info.popitem(last=False)
        return found


def _position(cursor: str) -> tuple[int, int, int]:
    parts: list[Any] = cursor.removeprefix(_FORM).split(".")
    shaped = len(parts) == 2 or (len(parts) == 3 and parts[1] != "0")
    if not cursor.startswith(_FORM) or not shaped or not all(part.isdigit() and len(part) < 19 for part in parts):
        raise UsageError(f"{cursor[:60]!r} is not a cursor of this store: begin anew, without a cursor")
    number, offset, cut = (*map(int, parts), 0)[:3]
    return number, offset, cut
