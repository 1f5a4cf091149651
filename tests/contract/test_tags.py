"""What tagging a record of any store promises."""

from __future__ import annotations

import dataclasses

import pytest

from tests.contract.record_values import make_record, make_workload
from tuner_core.errors import NotFoundError, UsageError
from tuner_core.store.interface import RecordFilter, RecordStore

MATMUL = make_workload("matmul 64x64x64")


def test_tags_are_added_changed_and_removed_and_nothing_else_changes(store: RecordStore) -> None:
    record = make_record(MATMUL, 1, tags={"branch": "main", "old": "yes"})
    other = make_record(MATMUL, 2, tags={"branch": "main", "old": "yes"})
    store.commit([record, other], [MATMUL])
    tagged = store.tag(record.trial_id, {"branch": "dev", "ünïcode": "✓ 'quoted'", "old": None, "absent": None})
    assert tagged == dataclasses.replace(record, tags={"branch": "dev", "ünïcode": "✓ 'quoted'"})
    assert store.get(record.trial_id) == tagged
    assert store.get(other.trial_id) == other
    assert store.top(record.key, 2) == [tagged, other]


def test_queries_find_a_record_by_the_tags_that_it_has_now(store: RecordStore) -> None:
    records = [make_record(MATMUL, number) for number in range(3)]
    store.commit(records, [MATMUL])
    for number in (0, 1):
        store.tag(records[number].trial_id, {"release": "1.0"})

    def found(**tags: str) -> list[str]:
        return [record.trial_id for record in store.query(RecordFilter(tags=tags)).records]

    assert found(release="1.0") == [record.trial_id for record in records[:2]]
    assert found(release="1.0", branch="main") == [record.trial_id for record in records[:2]]
    store.tag(records[0].trial_id, {"release": None})
    store.tag(records[1].trial_id, {"branch": None})
    assert found(release="1.0") == [records[1].trial_id]
    assert found(branch="main") == [records[0].trial_id, records[2].trial_id]
    assert store.stats()["records"] == 3


def test_a_record_keeps_its_tags_when_it_is_committed_again(store: RecordStore) -> None:
    record = make_record(MATMUL, 1)
    store.commit([record], [MATMUL])
    tagged = store.tag(record.trial_id, {"release": "1.0"})
    assert store.commit([record]).known == 1
    assert store.get(record.trial_id) == tagged


def test_retention_and_coverage_treat_a_tagged_record_as_before(store: RecordStore) -> None:
    records = [make_record(MATMUL, number, created_at=100.0) for number in range(3)]
    store.commit([*records, make_record(MATMUL, 0, created_at=100.0, verified=True)], [MATMUL])
    before = store.stats()
    for record in records:
        store.tag(record.trial_id, {"release": "1.0"})
    assert store.stats() == before
    assert store.prune(200.0, "vision") == 3


@pytest.mark.parametrize("trial_id", ["0" * 64, "not hex", ""])
def test_tags_for_a_record_that_is_not_there_are_refused(store: RecordStore, trial_id: str) -> None:
    with pytest.raises(NotFoundError, match="no record"):
        store.tag(trial_id, {"a": "b"})


@pytest.mark.parametrize("tags", [{}, {"": "x"}, {"two\nlines": "x"}, {"a": "two\nlines"}, {"a": "x" * 500}])
def test_malformed_tags_are_refused(store: RecordStore, tags: dict[str, str | None]) -> None:
    record = make_record(MATMUL, 1)
    store.commit([record], [MATMUL])
    with pytest.raises(UsageError, match="tag"):
        store.tag(record.trial_id, tags)
    assert store.get(record.trial_id) == record
