"""What following the commits of every store promises: nothing skipped, nothing twice, in the order of commits."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.contract.record_values import make_record, make_workload
from tuner_core.errors import StoreError, UsageError
from tuner_core.model import FailureKind, Record
from tuner_core.store.interface import RecordFilter, RecordStore

MATMUL = make_workload("matmul 64x64x64")
CONV = make_workload("conv 3x3", op="conv2d", dtype="float16")
EVERYTHING = RecordFilter(include_failed=True)


def drain(store: RecordStore, cursor: str, where: RecordFilter = EVERYTHING, limit: int = 1_000) -> list[Record]:
    """Everything behind a cursor."""
    found: list[Record] = []
    while True:
        followed = store.follow(where, cursor, limit=limit)
        assert len(followed.records) <= limit
        if not followed.records:
            return found
        found += followed.records
        cursor = followed.cursor


def test_a_follower_that_begins_now_sees_only_what_is_committed_later_in_that_order(store: RecordStore) -> None:
    store.commit([make_record(MATMUL, 0)], [MATMUL, CONV])
    begun = store.follow(EVERYTHING)
    assert begun.records == ()
    # neither the latency nor the time of a record, but its commit counts
    later = [
        make_record(MATMUL, 9, created_at=1.0),
        make_record(CONV, 5, median_us=7.0),
        make_record(MATMUL, 7, failure=FailureKind.BUILD_ERROR),
        make_record(MATMUL, 3, created_at=2e9),
    ]
    for record in later:
        store.commit([record])
    assert drain(store, begun.cursor) == later
    assert drain(store, begun.cursor, limit=1) == later


def test_records_of_one_commit_are_cut_anywhere_and_none_is_lost(store: RecordStore) -> None:
    cursor = store.follow(EVERYTHING).cursor
    records = [make_record(MATMUL, number) for number in range(23)]
    store.commit(records, [MATMUL])
    for limit in (1, 4, 23, 24):
        found = drain(store, cursor, limit=limit)
        assert {record.trial_id for record in found} == {record.trial_id for record in records}
        assert len(found) == 23


def test_filters_apply_and_the_cursor_moves_past_what_does_not_match(store: RecordStore) -> None:
    store.commit([], [MATMUL, CONV])
    begun = store.follow(EVERYTHING).cursor
    store.commit([make_record(MATMUL, number) for number in range(5)])
    wanted = make_record(CONV, 1, team="speech", tags={"night": "yes"})
    store.commit([wanted, make_record(CONV, 2), make_record(CONV, 3, failure=FailureKind.RUN_ERROR)])
    for where in (
        RecordFilter(op="conv2d", team="speech"),
        RecordFilter(tags={"night": "yes"}),
        RecordFilter(dtype="float16", team="speech"),
    ):
        assert drain(store, begun, where) == [wanted]
    assert len(drain(store, begun, RecordFilter(op="conv2d"))) == 2
    nothing = store.follow(RecordFilter(op="pool"), begun)
    assert nothing.records == ()
    # an idle follower need not look at the same records again; another filter may go on from there too
    assert drain(store, nothing.cursor) == []
    store.commit([make_record(MATMUL, 50)])
    assert drain(store, nothing.cursor) == [make_record(MATMUL, 50)]


def test_a_known_record_does_not_come_again_and_neither_does_a_tagged_one(store: RecordStore) -> None:
    record = make_record(MATMUL, 1)
    store.commit([record], [MATMUL])
    cursor = store.follow(EVERYTHING).cursor
    assert store.commit([record]).known == 1
    store.tag(record.trial_id, {"seen": "yes"})
    assert drain(store, cursor) == []


def test_a_waiting_follower_is_answered_when_a_matching_record_is_committed(store: RecordStore) -> None:
    store.commit([], [MATMUL, CONV])
    cursor = store.follow(EVERYTHING).cursor
    wanted = make_record(CONV, 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.follow, RecordFilter(op="conv2d"), cursor, wait_s=30.0)
        store.commit([make_record(MATMUL, 1)])
        time.sleep(0.3)
        assert not waiting.done()
        store.commit([wanted])
        begun = time.monotonic()
        assert waiting.result(30).records == (wanted,)
        assert time.monotonic() - begun < 20, "it was told, not woken by its own time limit"


def test_waiting_ends_when_the_time_is_up(store: RecordStore) -> None:
    store.commit([make_record(MATMUL, 1)], [MATMUL])
    cursor = store.follow(EVERYTHING).cursor
    begun = time.monotonic()
    assert store.follow(EVERYTHING, cursor, wait_s=0.3).records == ()
    assert time.monotonic() - begun >= 0.3


@pytest.mark.parametrize("followers", [2])
def test_followers_see_every_record_once_while_many_commit(store: RecordStore, followers: int) -> None:
    store.commit([], [MATMUL])
    begun = store.follow(EVERYTHING).cursor
    done = threading.Event()
    count, writers = 240, 6

    def write(writer: int) -> None:
        mine = [make_record(MATMUL, number) for number in range(count) if number % writers == writer]
        pieces = random.Random(writer)
        while mine:
            size = pieces.randint(1, 9)
            store.commit(mine[:size])
            mine = mine[size:]

    def follow(limit: int) -> list[str]:
        found: list[str] = []
        cursor = begun
        while True:
            last = done.is_set()
            followed = store.follow(EVERYTHING, cursor, limit=limit, wait_s=0.05)
            found += [record.trial_id for record in followed.records]
            cursor = followed.cursor
            if last and not followed.records:
                return found

    with ThreadPoolExecutor(writers + followers) as pool:
        following = [pool.submit(follow, limit) for limit in (3, 1_000)[:followers]]
        for writing in [pool.submit(write, writer) for writer in range(writers)]:
            writing.result(60)
        done.set()
        seen = [future.result(60) for future in following]
    assert len(seen[0]) == count
    assert sorted(seen[0]) == sorted(make_record(MATMUL, number).trial_id for number in range(count))
    assert seen[0] == seen[1], "all followers see the same order"


def test_a_deleted_record_does_not_come_and_the_rest_does(store: RecordStore) -> None:
    cursor = store.follow(EVERYTHING).cursor
    old = [make_record(MATMUL, number, created_at=100.0) for number in range(4)]
    new = make_record(MATMUL, 9)
    store.commit([*old, new], [MATMUL])
    assert store.prune(200.0) == 3
    assert [record.trial_id for record in drain(store, cursor)] == [old[0].trial_id, new.trial_id]
    store.commit([make_record(MATMUL, 20)])
    assert drain(store, store.follow(EVERYTHING, cursor, limit=2).cursor) == [make_record(MATMUL, 20)]


def test_bad_arguments_are_usage_errors(store: RecordStore) -> None:
    store.commit([make_record(MATMUL)], [MATMUL])
    page = store.query(EVERYTHING, limit=1)
    for cursor in ("rubbish", page.next_cursor or "-1", "sqlite-9999999", "redis-", "99999999999999-0"):
        with pytest.raises(UsageError, match="cursor"):
            store.follow(EVERYTHING, cursor)
    for where, limit in ((EVERYTHING, 0), (EVERYTHING, 10_001), (RecordFilter(nearest_sm_percent=30), 1)):
        with pytest.raises(UsageError):
            store.follow(where, limit=limit)


def test_a_closed_store_refuses(store: RecordStore) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.follow(EVERYTHING)
