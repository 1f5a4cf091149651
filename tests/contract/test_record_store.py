"""What every record store promises, whatever keeps the records and wherever it runs."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.contract.record_values import TARGET, make_record, make_trace, make_workload
from tuner_core.errors import InvalidRecordError, StoreError, UsageError
from tuner_core.model import EvaluatorSettings, FailureKind, Origin, PartitionKind, Record, RecordKey
from tuner_core.store.interface import RecordFilter, RecordStore

MATMUL = make_workload("matmul 64x64x64")
CONV = make_workload("conv 3x3", op="conv2d", description="conv2d 1x56x56x64 -> 64, 3x3, fp16, NHWC", dtype="float16")


def ids(records: list[Record] | tuple[Record, ...]) -> list[str]:
    return [record.trial_id for record in records]


def all_pages(store: RecordStore, where: RecordFilter, limit: int, **options: Any) -> list[Record]:
    found: list[Record] = []
    cursor = None
    while True:
        page = store.query(where, limit=limit, cursor=cursor, **options)
        assert len(page.records) <= limit
        found += page.records
        cursor = page.next_cursor
        if cursor is None:
            return found


class TestCommit:
    def test_a_record_comes_back_with_every_field(self, store: RecordStore) -> None:
        record = make_record(
            MATMUL,
            3,
            neighbours=2,
            verified=True,
            latencies_us=(0.1, 1e-7, 12345.678901234567),
            median_us=0.1,
            ci_low_us=1e-7,
            ci_high_us=None,
            evaluator=EvaluatorSettings(7, 8, 9),
            partition_kind=PartitionKind.MPS,
            cuda_version="12.9",
            driver_version="575.57",
            origin=Origin.FALLBACK,
            affinity=(0, 3),
            tags={"branch": "main", "ünïcode": "✓ 'quoted'"},
            created_at=1_790_000_000.1234567,
            target_json='{"arch": "sm_90", "kind": "cuda"}',
        )
        assert store.commit([record], [MATMUL]).stored == 1
        assert store.get(record.trial_id) == record

    def test_a_failed_trial_keeps_its_kind_and_message(self, store: RecordStore) -> None:
        records = [
            make_record(MATMUL, number, failure=kind, failure_message=f"line one\nline two of {kind}")
            for number, kind in enumerate(FailureKind)
        ]
        store.commit(records, [MATMUL])
        assert [store.get(record.trial_id) for record in records] == records

    def test_a_workload_comes_back_with_every_field(self, store: RecordStore) -> None:
        store.commit([], [CONV])
        assert store.get_workload(CONV.digest) == CONV

    def test_operator_and_description_come_from_the_workload_where_the_record_has_none(
        self, store: RecordStore
    ) -> None:
        record = make_record(CONV, op="", description="")
        store.commit([record], [CONV])
        assert store.get(record.trial_id) == dataclasses.replace(record, op=CONV.op, description=CONV.description)

    def test_the_same_trial_twice_is_one_record_and_the_first_stays(self, store: RecordStore) -> None:
        first = make_record(MATMUL, 1, median_us=10.0)
        again = make_record(MATMUL, 1, median_us=20.0)
        other = make_record(MATMUL, 2)
        assert first.trial_id == again.trial_id
        result = store.commit([first, again], [MATMUL])
        assert (result.stored, result.known) == (1, 1)
        result = store.commit([again, other], [MATMUL])
        assert (result.stored, result.known) == (1, 1)
        assert store.get(first.trial_id) == first
        assert store.stats()["records"] == 2

    def test_a_record_without_its_workload_stores_nothing_of_the_call(self, store: RecordStore) -> None:
        with pytest.raises(InvalidRecordError, match=CONV.digest[:12]):
            store.commit([make_record(MATMUL), make_record(CONV)], [MATMUL])
        assert store.stats()["records"] == 0
        assert store.get_workload(MATMUL.digest) is None

    def test_a_workload_of_an_earlier_commit_serves_later_records(self, store: RecordStore) -> None:
        store.commit([], [MATMUL])
        assert store.commit([make_record(MATMUL)]).stored == 1

    def test_nothing_to_commit_is_fine(self, store: RecordStore) -> None:
        result = store.commit([])
        assert (result.stored, result.known) == (0, 0)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"trial_id": "0" * 64}, "trial_id is not the address"),
            ({"trial_id": "x"}, "lower-case hex"),
            ({"target_digest": "0" * 64}, "target digest"),
            ({"trace": "[[]"}, "trace is not JSON"),
            ({"target_json": "{"}, "target is not JSON"),
            ({"median_us": None}, "neither a latency nor a failure"),
            ({"median_us": float("nan")}, "not a positive number"),
            ({"median_us": 0.0}, "not a positive number"),
            ({"failure": FailureKind.RUN_ERROR}, "has no latency"),
            ({"sm_percent": 101}, "not in 1..100"),
            ({"sm_percent": 0}, "not in 1..100"),
        ],
    )
    def test_a_record_that_lies_about_itself_is_refused(
        self, store: RecordStore, changes: dict[str, Any], says: str
    ) -> None:
        record = dataclasses.replace(make_record(MATMUL), **changes)
        with pytest.raises(InvalidRecordError, match=says):
            store.commit([record], [MATMUL])
        assert store.stats()["records"] == 0

    def test_a_workload_under_a_false_digest_is_refused(self, store: RecordStore) -> None:
        with pytest.raises(InvalidRecordError, match="sha256 of its body"):
            store.commit([], [dataclasses.replace(MATMUL, body="{}")])

    def test_concurrent_commits_of_overlapping_records_store_each_once(self, store: RecordStore) -> None:
        records = [make_record(MATMUL, number) for number in range(60)]
        start = threading.Barrier(6)

        def commit(worker: int) -> int:
            start.wait()
            mine = records[worker * 10 :] + records[: worker * 10]
            return sum(store.commit(mine[at : at + 7], [MATMUL]).stored for at in range(0, 60, 7))

        with ThreadPoolExecutor(6) as pool:
            stored = sum(pool.map(commit, range(6)))
        assert stored == 60
        assert sorted(ids(all_pages(store, RecordFilter(), 100))) == sorted(ids(records))

    def test_one_bad_commit_among_concurrent_ones_fails_alone(self, store: RecordStore) -> None:
        start = threading.Barrier(8)

        def commit(number: int) -> str:
            start.wait()
            try:
                store.commit([make_record(MATMUL, number)], [MATMUL] if number % 2 else [])
            except InvalidRecordError:
                return "refused"
            return "stored"

        store.commit([make_record(CONV)], [CONV])
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(commit, range(8)))
        stored = {record.trial_id for record in all_pages(store, RecordFilter(workload_digest=MATMUL.digest), 100)}
        for number, outcome in enumerate(outcomes):
            assert (make_record(MATMUL, number).trial_id in stored) == (outcome == "stored")
        assert outcomes[1::2] == ["stored"] * 4


class TestLookUp:
    def test_what_is_not_there_is_none(self, store: RecordStore) -> None:
        assert store.get("0" * 64) is None
        assert store.get("not hex") is None
        assert store.get_workload("0" * 64) is None
        assert store.top(make_record(MATMUL).key) == []

    def test_every_part_of_the_key_is_strict(self, store: RecordStore) -> None:
        record = make_record(MATMUL)
        near = [
            make_record(CONV),
            make_record(MATMUL, target_json='{"kind":"llvm","mcpu":"znver4","num-cores":1}'),
            make_record(MATMUL, device_model="Intel Xeon"),
            make_record(MATMUL, sm_count=2),
            make_record(MATMUL, tvm_version="0.26.0"),
        ]
        store.commit([record, *near], [MATMUL, CONV])
        assert ids(store.top(record.key, 10)) == [record.trial_id]
        for other in near:
            assert ids(store.top(other.key, 10)) == [other.trial_id]

    def test_the_spelling_of_a_target_does_not_matter(self, store: RecordStore) -> None:
        spaced = make_record(MATMUL, target_json=' {"num-cores": 2, "mcpu": "znver4", "kind": "llvm"} ')
        store.commit([spaced], [MATMUL])
        assert ids(store.top(make_record(MATMUL, target_json=TARGET).key)) == [spaced.trial_id]

    def test_verified_stands_before_faster_shared_and_then_latency_counts(self, store: RecordStore) -> None:
        shared = [make_record(MATMUL, number, median_us=latency) for number, latency in enumerate((7.0, 5.0, 6.0))]
        verified = [
            make_record(MATMUL, number, median_us=latency, verified=True) for number, latency in ((1, 9.0), (2, 8.0))
        ]
        store.commit([*shared, *verified], [MATMUL])
        ranked = [verified[1], verified[0], shared[1], shared[2], shared[0]]
        assert store.top(shared[0].key, 10) == ranked
        assert store.top(shared[0].key) == ranked[:1]
        assert store.top(shared[0].key, 4) == ranked[:4]
        assert store.top(shared[0].key, 10, verified_only=True) == ranked[:2]

    def test_equal_latencies_stand_by_trial_id(self, store: RecordStore) -> None:
        records = [make_record(MATMUL, number, median_us=5.0) for number in range(12)]
        store.commit(records, [MATMUL])
        assert ids(store.top(records[0].key, 20)) == sorted(ids(records))

    def test_failed_trials_are_never_the_best(self, store: RecordStore) -> None:
        failed = make_record(MATMUL, 1, failure=FailureKind.BUILD_ERROR)
        store.commit([failed], [MATMUL])
        assert store.top(failed.key, 10) == []

    @pytest.mark.parametrize("wrong_first", [True, False])
    def test_a_schedule_once_found_wrong_is_never_returned(self, store: RecordStore, wrong_first: bool) -> None:
        fast = [make_record(MATMUL, 1, median_us=1.0, job=job, verified=flag) for job in "ab" for flag in (True, False)]
        wrong = make_record(MATMUL, 1, failure=FailureKind.WRONG_RESULT, job="c", verified=True)
        right = make_record(MATMUL, 2, median_us=50.0)
        for record in [wrong, *fast, right] if wrong_first else [*fast, right, wrong]:
            store.commit([record], [MATMUL])
        assert store.top(right.key, 10) == [right]
        assert ids(store.query(RecordFilter()).records) == [right.trial_id]
        assert ids(store.query(RecordFilter(), top_per_key=5).records) == [right.trial_id]
        assert len(store.query(RecordFilter(include_failed=True)).records) == 6

    def test_the_trace_of_a_wrong_schedule_is_known_however_it_is_spelt(self, store: RecordStore) -> None:
        spaced = make_record(MATMUL, 1, median_us=1.0, trace=make_trace(1).replace(",", ", "), job="b")
        wrong = make_record(MATMUL, 1, failure=FailureKind.WRONG_RESULT, verified=True)
        store.commit([wrong, spaced], [MATMUL])
        assert store.top(wrong.key, 10) == []

    def test_a_schedule_wrong_on_one_key_may_be_right_on_another(self, store: RecordStore) -> None:
        elsewhere = make_record(MATMUL, 1, sm_count=2)
        store.commit([make_record(MATMUL, 1, failure=FailureKind.WRONG_RESULT), elsewhere], [MATMUL])
        assert store.top(elsewhere.key) == [elsewhere]

    def test_a_limit_out_of_range_is_a_usage_error(self, store: RecordStore) -> None:
        with pytest.raises(UsageError, match="limit"):
            store.top(make_record(MATMUL).key, 10_001)


class TestQuery:
    def fill(self, store: RecordStore) -> dict[str, Record]:
        records = {
            "plain": make_record(MATMUL, 0),
            "conv": make_record(CONV, 1),
            "model": make_record(MATMUL, 2, model="resnet50"),
            "device": make_record(MATMUL, 3, device_model="NVIDIA H200", sm_count=32, sm_percent=25),
            "team": make_record(MATMUL, 4, team="speech"),
            "job": make_record(MATMUL, 5, job="job-2"),
            "target": make_record(MATMUL, 6, target_json='{"kind":"cuda"}'),
            "version": make_record(MATMUL, 7, tvm_version="0.26.0"),
            "verified": make_record(MATMUL, 8, verified=True),
            "failed": make_record(MATMUL, 9, failure=FailureKind.RUN_TIMEOUT),
            "tagged": make_record(MATMUL, 10, tags={"branch": "dev", "night": "yes"}),
        }
        store.commit(list(records.values()), [MATMUL, CONV])
        return records

    @pytest.mark.parametrize(
        ("where", "names"),
        [
            (RecordFilter(op="conv2d"), {"conv"}),
            (RecordFilter(text="56X56"), {"conv"}),
            (RecordFilter(text="100%_"), set()),
            (RecordFilter(dtype="float16"), {"conv"}),
            (RecordFilter(model="resnet50"), {"model"}),
            (RecordFilter(device_model="NVIDIA H200"), {"device"}),
            (RecordFilter(sm_percent=25), {"device"}),
            (RecordFilter(max_sm_percent=49), {"device"}),
            (RecordFilter(min_sm_percent=25, max_sm_percent=25), {"device"}),
            (RecordFilter(min_sm_percent=51), set()),
            (RecordFilter(sm_count=32), {"device"}),
            (RecordFilter(team="speech"), {"team"}),
            (RecordFilter(job="job-2"), {"job"}),
            (RecordFilter(workload_digest=CONV.digest), {"conv"}),
            (RecordFilter(workload_digest="no digest"), set()),
            (RecordFilter(target_digest=make_record(MATMUL, target_json='{"kind":"cuda"}').target_digest), {"target"}),
            (RecordFilter(tvm_version="0.26.0"), {"version"}),
            (RecordFilter(verified_only=True), {"verified"}),
            (RecordFilter(since=1_790_000_010.0), {"tagged"}),
            (RecordFilter(tags={"branch": "dev"}), {"tagged"}),
            (RecordFilter(tags={"branch": "dev", "night": "no"}), set()),
            (RecordFilter(op="dense", team="speech"), {"team"}),
            (RecordFilter(op="conv2d", team="speech"), set()),
            (RecordFilter(since=1_790_000_009.0, include_failed=True), {"failed", "tagged"}),
            (RecordFilter(shape="64x64", dtype="float16"), {"conv"}),
            (RecordFilter(shape="1x56x56x64"), {"conv"}),
            (RecordFilter(shape="1x?x?x64"), {"conv"}),
            (RecordFilter(shape="3x3"), {"conv"}),
            (RecordFilter(shape="56x56"), set()),
            (RecordFilter(shape="1x56x56x6"), set()),
            (RecordFilter(shape="64", team="speech"), {"team"}),
            (RecordFilter(shape="63", team="speech"), set()),
            (RecordFilter(nearest_sm_percent=30, device_model="NVIDIA H200"), {"device"}),
            (RecordFilter(nearest_sm_percent=100, op="conv2d"), {"conv"}),
        ],
    )
    def test_each_filter_keeps_what_matches(self, store: RecordStore, where: RecordFilter, names: set[str]) -> None:
        records = self.fill(store)
        assert set(ids(store.query(where).records)) == {records[name].trial_id for name in names}

    def test_the_nearest_share_is_chosen_for_each_workload_and_device_among_what_matches(
        self, store: RecordStore
    ) -> None:
        def at(share: int, number: int, workload: Any = MATMUL, **changes: Any) -> Record:
            # on a CPU the target differs with the share
            target = f'{{"kind":"llvm","num-cores":{share}}}'
            return make_record(workload, number, sm_percent=share, sm_count=share, target_json=target, **changes)

        records = {
            "matmul 25": at(25, 1),
            "matmul 25 again": at(25, 2, job="job-2"),
            "matmul 35": at(35, 3),
            "matmul 30, failed": at(30, 4, failure=FailureKind.RUN_ERROR),
            "conv 100": at(100, 5, CONV),
            "conv 100, verified": at(100, 6, CONV, verified=True),
            "conv 29, another team": at(29, 7, CONV, team="speech"),
            "matmul 50, another device": at(50, 8, device_model="NVIDIA H200"),
        }
        store.commit(list(records.values()), [MATMUL, CONV])

        def names(where: RecordFilter, **options: Any) -> set[str]:
            by_id = {record.trial_id: name for name, record in records.items()}
            return {by_id[record.trial_id] for record in all_pages(store, where, 2, **options)}

        # 25 and 35 are equally near to 30: the lower
        assert names(RecordFilter(nearest_sm_percent=30)) == {
            "matmul 25",
            "matmul 25 again",
            "conv 29, another team",
            "matmul 50, another device",
        }
        assert names(RecordFilter(nearest_sm_percent=31, op="dense", device_model="AMD EPYC 9B14")) == {"matmul 35"}
        assert names(RecordFilter(nearest_sm_percent=30, team="vision", op="conv2d")) == {
            "conv 100",
            "conv 100, verified",
        }
        assert names(RecordFilter(nearest_sm_percent=30, verified_only=True)) == {"conv 100, verified"}
        assert names(RecordFilter(nearest_sm_percent=30, include_failed=True, op="dense", min_sm_percent=26)) == {
            "matmul 30, failed",
            "matmul 50, another device",
        }
        assert names(RecordFilter(nearest_sm_percent=30, op="dense"), top_per_key=1) == {
            "matmul 25",
            "matmul 50, another device",
        }
        assert names(RecordFilter(nearest_sm_percent=30, op="pool")) == set()

    def test_without_a_filter_every_valid_record_comes(self, store: RecordStore) -> None:
        records = self.fill(store)
        assert ids(store.query(RecordFilter()).records) == [r.trial_id for n, r in records.items() if n != "failed"]

    def test_latency_order_has_failed_last_and_newest_order_is_by_time(self, store: RecordStore) -> None:
        by_time = list(self.fill(store).values())
        by_latency = [record for record in by_time if record.valid] + [record for record in by_time if not record.valid]
        everything = RecordFilter(include_failed=True)
        assert store.query(everything).records == tuple(by_latency)
        assert store.query(everything, order="newest").records == tuple(reversed(by_time))

    @pytest.mark.parametrize("order", ["latency", "newest"])
    @pytest.mark.parametrize(
        "where", [RecordFilter(include_failed=True), RecordFilter(op="dense", include_failed=True)]
    )
    @pytest.mark.parametrize("limit", [1, 3, 7])
    def test_pages_neither_repeat_nor_skip(
        self, store: RecordStore, order: str, where: RecordFilter, limit: int
    ) -> None:
        records = []
        for number in range(23):
            failure = FailureKind.RUN_ERROR if number % 5 == 0 else None
            records.append(
                make_record(
                    MATMUL,
                    number,
                    median_us=float(1 + number % 3),  # ties
                    created_at=1_790_000_000.0 + number % 4,
                    failure=failure,
                    job=f"job-{number % 6}",
                )
            )
        store.commit(records, [MATMUL])
        found = all_pages(store, where, limit, order=order)
        if order == "latency":
            expected = sorted(records, key=lambda r: (r.median_us or float("inf"), r.trial_id))
        else:
            expected = sorted(records, key=lambda r: (-r.created_at, r.trial_id))
        assert ids(found) == ids(expected)

    @pytest.mark.parametrize("order", ["latency", "newest"])
    @pytest.mark.parametrize("top_per_key", [0, 3])
    @pytest.mark.parametrize("where", [RecordFilter(), RecordFilter(op="dense")])
    def test_pages_show_what_stood_at_the_first_page_whatever_is_committed_meanwhile(
        self, store: RecordStore, order: str, top_per_key: int, where: RecordFilter
    ) -> None:
        keys = [{"sm_count": count} for count in (1, 2, 3, 4)]
        old = [make_record(MATMUL, number, **keys[number % 4]) for number in range(20)]
        store.commit(old, [MATMUL])
        expected = ids(store.query(where, limit=100, order=order, top_per_key=top_per_key).records)
        assert len(expected) == (12 if top_per_key else 20)
        found: list[str] = []
        cursor = None
        for step in itertools.count():
            page = store.query(where, limit=3, cursor=cursor, order=order, top_per_key=top_per_key)
            found += ids(page.records)
            cursor = page.next_cursor
            if cursor is None:
                break
            # faster and slower, older and newer ones, and one that condemns a schedule of a later page
            store.commit(
                [
                    make_record(MATMUL, 100 + step, median_us=1.0, created_at=1.0, **keys[step % 4]),
                    make_record(MATMUL, 200 + step, median_us=1e9, created_at=2e9, **keys[step % 4]),
                    make_record(MATMUL, step, failure=FailureKind.WRONG_RESULT, job="check", **keys[step % 4]),
                ]
            )
        assert found == expected

    def test_the_best_few_of_each_key_are_ranked_as_top_ranks_them(self, store: RecordStore) -> None:
        records = [make_record(MATMUL, number, sm_count=1 + number % 2) for number in range(10)]
        verified = make_record(MATMUL, 8, sm_count=1, median_us=500.0, verified=True)
        store.commit([*records, verified], [MATMUL])
        found = store.query(RecordFilter(), top_per_key=2).records
        expected = [top for count in (1, 2) for top in store.top(dataclasses.replace(verified.key, sm_count=count), 2)]
        assert sorted(ids(found)) == sorted(ids(expected))
        assert verified in found
        assert [record.median_us for record in found] == sorted(record.median_us or 0 for record in found)

    def test_the_best_few_of_each_key_are_taken_among_what_matches(self, store: RecordStore) -> None:
        slow = make_record(MATMUL, 1, median_us=9.0, team="speech")
        store.commit([make_record(MATMUL, 2, median_us=3.0), slow], [MATMUL])
        assert store.query(RecordFilter(team="speech"), top_per_key=1).records == (slow,)

    def test_an_empty_store_answers_with_an_empty_page(self, store: RecordStore) -> None:
        page = store.query(RecordFilter())
        assert (page.records, page.next_cursor) == ((), None)

    def test_bad_arguments_are_usage_errors(self, store: RecordStore) -> None:
        self.fill(store)
        bad_arguments: list[dict[str, Any]] = [
            {"limit": 0},
            {"limit": 10_001},
            {"order": "random"},
            {"cursor": "rubbish"},
            {"top_per_key": -1},
        ]
        for bad in bad_arguments:
            with pytest.raises(UsageError):
                store.query(RecordFilter(), **bad)
        for where in (RecordFilter(shape="1x"), RecordFilter(shape="56*56"), RecordFilter(nearest_sm_percent=101)):
            with pytest.raises(UsageError):
                store.query(where)
        cursor = store.query(RecordFilter(), limit=1).next_cursor
        with pytest.raises(UsageError, match="another query"):
            store.query(RecordFilter(op="conv2d"), limit=1, cursor=cursor)
        with pytest.raises(UsageError, match="another query"):
            store.query(RecordFilter(), limit=1, cursor=cursor, order="newest")

    def test_a_page_too_large_for_one_message_comes_whole(self, store: RecordStore) -> None:
        records = [make_record(MATMUL, number) for number in range(1_203)]
        store.commit(records, [MATMUL])
        page = store.query(RecordFilter(), limit=1_201)
        assert ids(page.records) == ids(records[:1_201])
        assert ids(store.query(RecordFilter(), limit=5, cursor=page.next_cursor).records) == ids(records[1_201:])


class TestStatsAndRetention:
    def test_counts(self, store: RecordStore) -> None:
        store.commit(
            [
                make_record(MATMUL, 0),
                make_record(MATMUL, 1, failure=FailureKind.OUT_OF_MEMORY, team="speech"),
                make_record(MATMUL, 0, verified=True),
                make_record(CONV, 3, device_model="NVIDIA H200", model="resnet50"),
            ],
            [MATMUL, CONV],
        )
        stats = store.stats()
        assert {name: stats[name] for name in ("records", "valid", "failed", "verified", "workloads")} == {
            "records": 4,
            "valid": 3,
            "failed": 1,
            "verified": 1,
            "workloads": 2,
        }
        assert stats["by_device"] == {"AMD EPYC 9B14": 3, "NVIDIA H200": 1}
        assert stats["by_model"] == {"squeezenet": 3, "resnet50": 1}
        assert stats["by_team"] == {"vision": 3, "speech": 1}

    def test_an_empty_store_counts_nothing(self, store: RecordStore) -> None:
        stats = store.stats()
        assert stats["records"] == stats["workloads"] == 0
        assert stats["by_device"] == {}
        assert stats["coverage"] == []
        assert [day["records"] for day in stats["growth"]] == [0] * 30

    def test_coverage_counts_operators_of_each_model_with_a_verified_record_by_device_and_share(
        self, store: RecordStore
    ) -> None:
        gpu: dict[str, Any] = {"device_model": "NVIDIA H200", "sm_percent": 25, "sm_count": 32}
        store.commit(
            [
                make_record(MATMUL, 0, model="a"),
                make_record(MATMUL, 0, model="a", verified=True),
                make_record(MATMUL, 1, model="a", verified=True),
                make_record(CONV, 2, model="a"),
                make_record(CONV, 3, model="b", **gpu),
                make_record(CONV, 3, model="b", verified=True, **gpu),
                # verified once, but the schedule was found wrong since; and a check that failed
                make_record(CONV, 4, model="a", verified=True, sm_count=9),
                make_record(CONV, 4, model="a", job="check", failure=FailureKind.WRONG_RESULT, sm_count=9),
                make_record(CONV, 5, model="c", verified=True, failure=FailureKind.RUN_ERROR, sm_count=7),
            ],
            [MATMUL, CONV],
        )
        here = {"device_model": "AMD EPYC 9B14", "sm_percent": 50, "sm_count": 1}
        # what another model's job verified serves this one too
        assert store.stats()["coverage"] == [
            {"model": "a", **here, "operators": 2, "verified": 1},
            {"model": "a", **gpu, "operators": 2, "verified": 1},
            {"model": "b", **gpu, "operators": 1, "verified": 1},
            {"model": "c", **gpu, "operators": 1, "verified": 1},
        ]

    def test_growth_counts_the_records_of_each_of_the_last_thirty_days(self, store: RecordStore) -> None:
        today = time.time() // 86400 * 86400
        times = [today + 1, today - 1, today - 2, today - 29 * 86400, today - 29 * 86400 - 1]
        store.commit([make_record(MATMUL, n, created_at=created_at) for n, created_at in enumerate(times)], [MATMUL])
        growth = store.stats()["growth"]
        if time.time() // 86400 * 86400 != today:
            pytest.skip("midnight passed meanwhile")
        assert [day["records"] for day in growth] == [1, *[0] * 27, 2, 1]
        assert growth[-1]["day"] == time.strftime("%Y-%m-%d", time.gmtime(today))

    def test_a_rehearsal_of_retention_counts_and_deletes_nothing(self, store: RecordStore) -> None:
        mine = [make_record(MATMUL, number, created_at=100.0) for number in range(5)]
        theirs = [make_record(MATMUL, 10 + number, created_at=100.0, team="speech") for number in range(3)]
        store.commit([*mine, *theirs], [MATMUL])
        assert store.prune(200.0, dry_run=True) == 7
        assert store.prune(200.0, "speech", dry_run=True) == 3
        assert store.prune(50.0, dry_run=True) == 0
        assert store.stats()["records"] == 8
        assert store.prune(200.0) == 7

    def test_retention_deletes_the_old_but_keeps_bests_and_verified(self, store: RecordStore) -> None:
        old = [make_record(MATMUL, number, created_at=100.0) for number in range(5)]
        verified = make_record(MATMUL, 3, created_at=100.0, verified=True, sm_count=2)
        best = make_record(MATMUL, 4, created_at=100.0, sm_count=2, median_us=1.0)
        new = make_record(MATMUL, 9, created_at=300.0)
        failed = make_record(MATMUL, 7, created_at=100.0, failure=FailureKind.BUILD_ERROR)
        store.commit([*old, verified, best, new, failed], [MATMUL])
        # old[0] is the best of its key; at the other key the verified one is, the shared one goes
        assert store.prune(200.0) == 6
        assert set(ids(store.query(RecordFilter(include_failed=True)).records)) == set(ids([old[0], verified, new]))
        assert store.prune(200.0) == 0

    def test_retention_of_one_team_leaves_the_others_alone(self, store: RecordStore) -> None:
        mine = [make_record(MATMUL, number, created_at=100.0) for number in range(3)]
        theirs = [make_record(MATMUL, 10 + number, created_at=100.0, team="speech") for number in range(3)]
        store.commit([*mine, *theirs], [MATMUL])
        assert store.prune(200.0, team="speech") == 3
        assert set(ids(store.query(RecordFilter()).records)) == set(ids(mine))

    def test_a_wrong_schedule_stays_wrong_after_its_evidence_was_deleted(self, store: RecordStore) -> None:
        wrong = make_record(MATMUL, 1, failure=FailureKind.WRONG_RESULT, created_at=100.0)
        store.commit([wrong], [MATMUL])
        assert store.prune(200.0) == 1
        again = make_record(MATMUL, 1, job="another", created_at=300.0)
        store.commit([again])
        assert store.top(again.key) == []

    def test_a_pruned_trial_may_be_stored_again(self, store: RecordStore) -> None:
        records = [make_record(MATMUL, number, created_at=100.0) for number in range(2)]
        store.commit(records, [MATMUL])
        store.prune(200.0)
        assert store.commit(records).stored == 1
        assert store.get(records[1].trial_id) == records[1]


class TestClose:
    def test_a_closed_store_refuses(self, store: RecordStore) -> None:
        store.commit([make_record(MATMUL)], [MATMUL])
        store.close()
        store.close()
        for call in (
            lambda: store.commit([make_record(MATMUL, 1)]),
            lambda: store.get("0" * 64),
            lambda: store.top(RecordKey("0" * 64, "0" * 64, "x", 1)),
            lambda: store.query(RecordFilter()),
            store.stats,
        ):
            with pytest.raises(StoreError, match="closed"):
                call()
