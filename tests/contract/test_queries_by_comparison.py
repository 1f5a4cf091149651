"""Every query against the same question asked of a plain list, while two processes' stores change the records."""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import redis_server
from tests.contract.record_values import make_record, make_workload
from tuner_core.model import FailureKind, Record
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import open_store
from tuner_core.store.shapes import parse_shape, shape_matches

WORKLOADS = [
    make_workload("a", op="dense", description="dense 8x8 -> 4"),
    make_workload("b", op="conv2d", description="conv2d 1x8x8x4, 3x3", dtype="float16"),
    make_workload("c", op="conv2d", description="conv2d 1x4x4x4, 1x1"),
]
START = 1_790_000_000.0


@pytest.fixture(params=["sqlite", "redis"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], RecordStore]]:
    """Opens one store as another process would: with a catalogue of its own."""
    url = f"sqlite://{tmp_path / 'records.db'}"
    if request.param == "redis":
        url = f"{redis_server().url}?prefix={secrets.token_hex(8)}"
    opened: list[RecordStore] = []

    def again() -> RecordStore:
        opened.append(open_store(url))
        return opened[-1]

    yield again
    for store in opened:
        store.close()


class Model:
    """All records in a dict, and what a store promises about them."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.wrong: set[tuple[Any, str]] = set()

    def add(self, record: Record) -> None:
        if record.trial_id in self.records:
            return
        self.records[record.trial_id] = record
        if record.failure is FailureKind.WRONG_RESULT:
            self.wrong.add((record.key, record.trace))

    def prune(self, older_than: float) -> None:
        best: dict[Any, Record] = {}
        for record in sorted(self.records.values(), key=rank, reverse=True):
            if record.valid and (record.key, record.trace) not in self.wrong:
                best[record.key] = record
        for record in list(self.records.values()):
            if record.created_at < older_than and not record.verified and best.get(record.key) != record:
                del self.records[record.trial_id]

    def query(self, where: RecordFilter, order: str, top_per_key: int) -> list[str]:
        found = [record for record in self.records.values() if self._matches(where, record)]
        if where.nearest_sm_percent is not None:
            wanted = where.nearest_sm_percent
            nearest: dict[Any, tuple[int, int]] = {}
            for record in found:
                place = (record.workload_digest, record.device_model)
                distance = (abs(record.sm_percent - wanted), record.sm_percent)
                nearest[place] = min(nearest.get(place, distance), distance)
            found = [r for r in found if nearest[r.workload_digest, r.device_model][1] == r.sm_percent]
        if top_per_key:
            of_key: dict[Any, list[Record]] = {}
            for record in sorted(found, key=rank):
                of_key.setdefault(record.key, []).append(record)
            found = [record for records in of_key.values() for record in records[:top_per_key]]
        found.sort(key=lambda r: (microseconds(r) if order == "latency" else -r.created_at, r.trial_id))
        return [record.trial_id for record in found]

    def _matches(self, where: RecordFilter, record: Record) -> bool:
        workload = next(w for w in WORKLOADS if w.digest == record.workload_digest)
        exact = ("op", "model", "device_model", "sm_percent", "team", "job", "workload_digest")
        bad = not record.valid or (record.key, record.trace) in self.wrong
        return (
            all(getattr(where, name) in ("", None, getattr(record, name)) for name in exact)
            and (where.min_sm_percent or 0) <= record.sm_percent <= (where.max_sm_percent or 100)
            and where.text in record.description
            and (not where.dtype or any(dtype == where.dtype for _, dtype, _ in workload.args_info))
            and (not where.shape or shape_matches(parse_shape(where.shape), workload.args_info, record.description))
            and all(record.tags.get(name) == value for name, value in where.tags.items())
            and (where.include_failed or not bad)
            and (not where.verified_only or record.verified)
            and (where.since is None or record.created_at >= where.since)
        )


def microseconds(record: Record) -> float:
    return float("inf") if record.median_us is None else record.median_us


def rank(record: Record) -> tuple[bool, float, str]:
    return not record.verified, microseconds(record), record.trial_id


def some_record(chance: random.Random) -> Record:
    workload = chance.choice(WORKLOADS)
    share = chance.choice((20, 25, 50, 100))
    return make_record(
        workload,
        chance.randrange(12),
        median_us=float(chance.randrange(1, 30)),
        created_at=START + chance.randrange(100),
        failure=chance.choice((None,) * 8 + (FailureKind.RUN_ERROR, FailureKind.WRONG_RESULT)),
        verified=chance.random() < 0.1,
        sm_percent=share,
        sm_count=share,
        device_model=chance.choice(("H200", "EPYC")),
        team=chance.choice(("vision", "speech")),
        job=f"job-{chance.randrange(6)}",
        tags=chance.choice(({}, {"branch": "main"}, {"branch": "dev"})),
    )


def some_filter(chance: random.Random) -> RecordFilter:
    choices: dict[str, Any] = {
        "op": "conv2d",
        "text": "3x3",
        "dtype": "float16",
        "shape": "8x8",
        "device_model": "H200",
        "sm_percent": 25,
        "min_sm_percent": 25,
        "max_sm_percent": 50,
        "team": "speech",
        "job": "job-1",
        "workload_digest": WORKLOADS[0].digest,
        "verified_only": True,
        "include_failed": True,
        "since": START + chance.randrange(100),
        "tags": {"branch": "dev"},
        "nearest_sm_percent": chance.choice((22, 60, 100)),
    }
    return RecordFilter(**{name: choices[name] for name in chance.sample(sorted(choices), chance.randrange(4))})


def pages(store: RecordStore, where: RecordFilter, limit: int, order: str, top_per_key: int) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        page = store.query(where, limit=limit, cursor=cursor, order=order, top_per_key=top_per_key)
        found += [record.trial_id for record in page.records]
        cursor = page.next_cursor
        if cursor is None:
            return found


@pytest.mark.parametrize("seed", range(2))
def test_every_query_finds_what_the_same_question_finds_in_a_list(
    open_again: Callable[[], RecordStore], seed: int
) -> None:
    chance = random.Random(seed)
    stores = [open_again(), open_again()]
    model = Model()
    stores[0].commit([], WORKLOADS)
    for step in range(40):
        store = chance.choice(stores)
        action = chance.random()
        if action < 0.7:
            # now and then a batch that is accounted for in the bounds of its groups at once
            batch = [some_record(chance) for _ in range(chance.choice((1, 5, 400)) if step % 20 == 9 else 5)]
            store.commit(batch)
            for record in batch:
                model.add(record)
        elif action < 0.9 and model.records:
            record = model.records[chance.choice(sorted(model.records))]
            branch = chance.choice(("main", "dev", None))
            model.records[record.trial_id] = store.tag(record.trial_id, {"branch": branch})
            tags = {} if branch is None else {"branch": branch}
            assert model.records[record.trial_id] == dataclasses.replace(record, tags=tags)
        else:
            older_than = START + chance.randrange(60)
            store.prune(older_than)
            model.prune(older_than)
        for reader in (*stores, open_again()) if step % 20 == 19 else [chance.choice(stores)]:
            for _ in range(3):
                where, order = some_filter(chance), chance.choice(("latency", "newest"))
                top_per_key, limit = chance.choice((0, 0, 1, 3)), chance.choice((5, 20, 1_000))
                found = pages(reader, where, limit, order, top_per_key)
                assert found == model.query(where, order, top_per_key), (where, order, top_per_key, limit)
