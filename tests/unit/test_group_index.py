"""The groups of a store in memory: order, filters, and selections that stay as they are."""

from __future__ import annotations

import random

import pytest

from tests.contract.record_values import make_record, make_workload
from tuner_core.store.groups import Change, Group, GroupIndex
from tuner_core.store.interface import RecordFilter

WORKLOAD = make_workload()


def group(name: int, job: str = "job") -> Group:
    shared = make_record(WORKLOAD, job=job)
    return Group(name, shared.key, shared, WORKLOAD.args_info)


def change(of: Group, best_us: float, newest: float = 0.0) -> Change[Group]:
    return Change(of, best_us, newest, verified=False)


def names(index: GroupIndex[Group], where: RecordFilter | None = None) -> list[object]:
    return [found.name for _, found in index.select(where or RecordFilter(), "latency")]


@pytest.mark.parametrize("at_once", [1, 100])
def test_groups_come_by_their_bounds_however_these_move(at_once: int) -> None:
    chance = random.Random(at_once)
    index: GroupIndex[Group] = GroupIndex()
    groups = {name: group(name, f"job-{name % 40}") for name in range(300)}
    bounds: dict[int, tuple[float, float]] = {}
    for step in range(400 // at_once + 4):
        chosen = chance.sample(sorted(groups), at_once)
        for name in chosen:
            bounds[name] = (float(chance.randrange(50)), float(chance.randrange(50)))
        removed = [name for name in chance.sample(sorted(groups), at_once // 4) if name not in chosen]
        index.change([change(groups[name], *bounds[name]) for name in chosen], removed)
        for name in removed:
            bounds.pop(name, None)
            groups[name] = group(name, f"job-{name % 40}")  # if it comes again, it is another one
        for order, sign in (("latency", 0), ("newest", 1)):
            values = {name: (-found[1] if sign else found[0]) for name, found in bounds.items()}
            found = [(bound, of.name) for bound, of in index.select(RecordFilter(), order)]
            assert [bound for bound, _ in found] == sorted(values.values())
            assert {name: bound for bound, name in found} == values, step
        of_job = {name for name in bounds if name % 40 == 3}
        assert set(names(index, RecordFilter(job="job-3"))) == of_job
        assert set(names(index, RecordFilter(since=25.0))) == {name for name in bounds if bounds[name][1] >= 25.0}
    assert len(index) == len(bounds)


def test_a_selection_stays_as_it_is_while_bounds_move() -> None:
    index: GroupIndex[Group] = GroupIndex()
    groups = [group(name) for name in range(4)]
    index.change([change(of, float(number)) for number, of in enumerate(groups)])
    selection = iter(index.select(RecordFilter(), "latency"))
    assert next(selection)[1].name == 0
    index.change([change(groups[3], 0.5), change(group(9), 0.1)], [1])
    assert [found.name for _, found in selection] == [1, 2, 3]
    assert names(index) == [0, 9, 3, 2]


def test_no_group_is_taken_out_while_somebody_reads_an_older_state() -> None:
    index: GroupIndex[Group] = GroupIndex()
    gone, other = group(1), group(2)
    index.change([change(gone, 1.0), change(other, 2.0)])
    with index.reading():
        selection = index.select(RecordFilter(), "latency")
        index.change([], [1])
        assert {found.name for found in selection.of_key(gone.key)} == {1, 2}
        assert {found.name for found in selection.of_place(gone.place)} == {1, 2}
        assert names(index) == [1, 2]
    index.change([])
    assert names(index) == [2]
    assert index.get(1) is None


def test_failed_groups_and_groups_without_verified_records_are_left_out_where_the_filter_says_so() -> None:
    index: GroupIndex[Group] = GroupIndex()
    failed, good = group(1), group(2)
    index.change([change(failed, float("inf")), Change(good, 1.0, 0.0, verified=True)])
    assert names(index) == [2]
    assert names(index, RecordFilter(include_failed=True)) == [2, 1]
    assert names(index, RecordFilter(include_failed=True, verified_only=True)) == [2]
