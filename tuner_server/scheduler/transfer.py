"""What past records give to a new task: schedules that were good at another share, lessons of other operators."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection

from tuner_core.errors import TunerError
from tuner_core.model import Origin, Record, RecordKey
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_server.search.messages import Lesson

log = logging.getLogger(__name__)

MAX_SEEDS = 8
MAX_LESSONS = 1000
MAX_LESSONS_OF_TASK = 48
_LOOKED_AT = 4000


def seeds(store: RecordStore, key: RecordKey, limit: int = MAX_SEEDS) -> list[str]:
    """Traces of the same workload that were best at other SM counts of the same device model, nearest share first.

    Args:
        store: The record store; the call blocks.
        key: The task's strict key; records under it are no seeds, they are known.
        limit: How many at most.

    Returns:
        Distinct traces. They are starting points only: what they are worth here is measured here.
    """
    where = RecordFilter(
        workload_digest=key.workload_digest, device_model=key.device_model, tvm_version=key.tvm_version
    )
    page = store.query(where, limit=_LOOKED_AT, top_per_key=limit + 1)  # the fallback schedule may be among them
    elsewhere = [
        record for record in page.records if record.sm_count != key.sm_count and record.origin is not Origin.FALLBACK
    ]

    def rank(record: Record) -> tuple[float, bool, float]:
        octaves = abs(math.log2(max(1, record.sm_count) / max(1, key.sm_count)))
        return octaves, not record.verified, record.median_us or math.inf

    return list(dict.fromkeys(record.trace for record in sorted(elsewhere, key=rank)))[:limit]


def lessons(store: RecordStore, key: RecordKey, own: Collection[str], limit: int = MAX_LESSONS) -> list[Lesson]:
    """Trials of other operators on the same target at the same share: first the operators that were tuned last.

    Of each operator its first trials: those were drawn at random, while later ones are all alike.

    Args:
        store: The record store; the call blocks.
        key: Key of any task of the job: all have target, device, SM count and TVM version in common.
        own: Digests of the job's own workloads: what is known of them reaches their own searches.
        limit: How many at most; no operator gives more than :data:`MAX_LESSONS_OF_TASK`.
    """
    where = RecordFilter(
        target_digest=key.target_digest,
        device_model=key.device_model,
        sm_count=key.sm_count,
        tvm_version=key.tvm_version,
        include_failed=True,
    )
    by_task: dict[str, list[Lesson]] = {}
    for record in store.query(where, limit=_LOOKED_AT, order="newest").records:
        if record.workload_digest in own or record.verified or record.origin is not Origin.SEARCH:
            continue
        of_task = by_task.setdefault(record.workload_digest, [])
        of_task.append(Lesson(record.workload_digest, record.trace, record.median_us))
    return [lesson for of_task in by_task.values() for lesson in of_task[: -MAX_LESSONS_OF_TASK - 1 : -1]][:limit]


class Transfer:
    """What the store gives to the tasks of one job. Nothing is worth failing for: a store out of reach gives nothing.

    Args:
        store: The record store.
        own: Digests of the job's workloads.
    """

    def __init__(self, store: RecordStore, own: Collection[str]) -> None:
        self._store = store
        self._own = frozenset(own)
        self._lessons: asyncio.Task[list[Lesson]] | None = None

    async def seeds(self, key: RecordKey) -> list[str]:
        """See :func:`seeds`."""
        try:
            return await asyncio.to_thread(seeds, self._store, key)
        except TunerError as error:
            log.warning("no schedules of other shares: %s", error)
            return []

    async def lessons(self, key: RecordKey) -> list[Lesson]:
        """See :func:`lessons`; looked up once for the whole job."""
        if self._lessons is None:
            self._lessons = asyncio.create_task(asyncio.to_thread(lessons, self._store, key, self._own))
        try:
            return await asyncio.shield(self._lessons)
        except TunerError as error:
            log.warning("no lessons of other operators: %s", error)
            return []
