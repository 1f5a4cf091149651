"""What a new task takes over from records of other shares and of other operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.record_values import make_record, make_trace, make_workload
from tuner_core.model import FailureKind, Origin, RecordKey
from tuner_core.store.interface import RecordStore
from tuner_core.store.open import open_store
from tuner_server.scheduler.transfer import MAX_LESSONS_OF_TASK, lessons, seeds

MINE = make_workload("mine")
KEY: RecordKey = make_record(MINE, sm_count=32, median_us=1.0).key


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    opened = open_store(f"sqlite:///{tmp_path / 'records.sqlite'}")
    yield opened
    opened.close()


def test_seeds_are_the_best_of_other_shares_the_nearest_first(store: RecordStore) -> None:
    def record(number: int, us: float, **fields: Any) -> Any:
        return make_record(MINE, number, median_us=us, **fields)

    store.commit(
        [
            record(1, 5.0, sm_count=132),
            record(2, 9.0, sm_count=30),
            record(3, 8.0, sm_count=30),
            record(4, 1.0, sm_count=32),  # the same key: known, not a seed
            record(5, 1.0, sm_count=30, device_model="another GPU"),
            record(6, 1.0, sm_count=30, origin=Origin.FALLBACK),
            record(7, 1.0, sm_count=30, failure=FailureKind.RUN_ERROR),
            make_record(make_workload("other"), 8, sm_count=30, median_us=1.0),
            record(3, 7.0, sm_count=132),  # seen at the nearer share already
        ],
        [MINE, make_workload("other")],
    )
    assert seeds(store, KEY) == [make_trace(3), make_trace(2), make_trace(1)]
    assert seeds(store, KEY, limit=2) == [make_trace(3), make_trace(2)]


def test_lessons_come_from_other_operators_under_the_same_conditions(store: RecordStore) -> None:
    other, third = make_workload("other"), make_workload("third")
    store.commit(
        [
            make_record(other, 1, sm_count=32, median_us=3.0),
            make_record(other, 2, sm_count=32, failure=FailureKind.RUN_TIMEOUT),
            make_record(other, 3, sm_count=30, median_us=1.0),
            make_record(other, 4, sm_count=32, median_us=1.0, verified=True),
            make_record(MINE, 5, sm_count=32, median_us=1.0),
            *(make_record(third, number, sm_count=32) for number in range(10, 10 + MAX_LESSONS_OF_TASK + 20)),
        ],
        [MINE, other, third],
    )
    taken = lessons(store, KEY, {MINE.digest})
    first = range(10, 10 + MAX_LESSONS_OF_TASK)  # the ones after them are alike
    assert {lesson.trace for lesson in taken if lesson.task == third.digest} == {make_trace(n) for n in first}
    assert sorted(lesson.trace for lesson in taken if lesson.task == third.digest) == sorted(map(make_trace, first))
    assert {(lesson.trace, lesson.median_us) for lesson in taken if lesson.task == other.digest} == {
        (make_trace(2), None),
        (make_trace(1), 3.0),
    }
    assert len(lessons(store, KEY, set(), limit=5)) == 5
