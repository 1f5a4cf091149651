"""Which records of a store apply on one device, SM count and target; every builder of models asks here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuner_core.compiler.target import expanded_target
from tuner_core.errors import UsageError
from tuner_core.model import TVM_VERSION, Record, RecordKey, target_digest
from tuner_core.store.interface import RecordFilter, RecordStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """What a model is built for.

    Attributes:
        device_model: As records hold it, e.g. ``NVIDIA H200``.
        sm_count: SMs (or cores) that it will run on.
        target_json: TVM target.
    """

    device_model: str
    sm_count: int
    target_json: str

    def key(self, workload_digest: str) -> RecordKey:
        """The strict look-up key of an operator here."""
        return RecordKey(workload_digest, target_digest(self.target_json), self.device_model, self.sm_count)

    def exact(self, record: Record) -> bool:
        """Whether a record was measured on such a device with so many SMs, by this version of TVM."""
        found = (record.device_model, record.sm_count, record.tvm_version)
        return found == (self.device_model, self.sm_count, TVM_VERSION)


class Selection:
    """The records of a store that apply at a place, best first.

    Args:
        store: The store.
        place: What is built for.
        strict: Require device, SM count and TVM version to be the same. When False, an operator without such a record
            gets those of the nearest SM count, the same version and device preferred, and the log says so.

    Raises:
        UsageError: TVM does not know the target.
    """

    def __init__(self, store: RecordStore, place: Place, *, strict: bool = True) -> None:
        self.store = store
        self.place = place
        self._strict = strict
        self._target_digest = target_digest(place.target_json)
        self.expanded_target = expanded_target(place.target_json)
        self.target_kind = str(json.loads(self.expanded_target).get("kind"))

    def best(self, workload_digest: str, limit: int) -> list[Record]:
        """The best records of an operator, as the store ranks them."""
        found = self.store.top(self.place.key(workload_digest), limit)
        if not found:  # the same target in another spelling has another digest
            page = self.store.query(self._filter(workload_digest=workload_digest), limit=1_000, top_per_key=limit)
            found = sorted(filter(self._same_target, page.records), key=_rank)[:limit]
        if not found and not self._strict:
            found = self._near(workload_digest, limit)
        return found

    def all(self) -> Iterator[Record]:
        """All valid records of exactly this place."""
        cursor: str | None = None
        while True:
            page = self.store.query(self._filter(), limit=1_000, cursor=cursor)
            yield from filter(self._same_target, page.records)
            cursor = page.next_cursor
            if cursor is None:
                return

    def _filter(self, **changes: Any) -> RecordFilter:
        place = self.place
        strict = RecordFilter(device_model=place.device_model, sm_count=place.sm_count, tvm_version=TVM_VERSION)
        return dataclasses.replace(strict, **changes)

    def _same_target(self, record: Record) -> bool:
        if record.target_digest == self._target_digest:
            return True
        with contextlib.suppress(UsageError):
            return expanded_target(record.target_json) == self.expanded_target
        return False

    def _near(self, workload_digest: str, limit: int) -> list[Record]:
        page = self.store.query(RecordFilter(workload_digest=workload_digest), limit=1_000, top_per_key=limit)
        found = [record for record in page.records if json.loads(record.target_json).get("kind") == self.target_kind]
        place = self.place

        def distance(record: Record) -> tuple[Any, ...]:
            return (
                record.tvm_version != TVM_VERSION,
                record.device_model != place.device_model,
                abs(record.sm_count - place.sm_count),
                _rank(record),
            )

        found.sort(key=distance)
        if found:
            log.warning("%s", describe_looser(found[0], place))
        return found[:limit]


def describe_looser(record: Record, place: Place) -> str:
    """One line on a record that stands in for one of the place itself."""
    return (
        f"{record.description}: no record for {place.device_model} with {place.sm_count} SMs; nearest: "
        f"{record.device_model} with {record.sm_count} SMs, TVM {record.tvm_version}"
    )


def _rank(record: Record) -> tuple[Any, ...]:
    return (not record.verified, record.median_us, record.trial_id)
