"""Records and stock TVM: JSONDatabase folders both ways, and the store as a database of TVM's own passes."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.conftest import serving
from tests.contract.record_values import make_record
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import UnavailableError, UsageError
from tuner_core.model import (
    DeviceInfo,
    FailureKind,
    Origin,
    PartitionKind,
    target_digest,
)
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import open_store
from tuner_core.store.tvm_folder import export_folder, import_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEVICE = DeviceInfo("cpu", "AMD EPYC 9B14", "znver4", "cpu-0", 2)
SHORT_TARGET = '{"kind": "llvm", "num-cores": 1}'
SIZE = 32


@dataclasses.dataclass
class Stock:
    """A small model, and a folder in which stock TVM recorded schedules of its one operator."""

    model: Any
    function: Any
    target: Any
    folder: Path
    traces: list[Any]


def trace_of(record: Any) -> Any:
    """A record's trace as plain JSON values."""
    return json.loads(json.dumps(record.as_json()[0]))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    load_tvm(intrinsics=True)
    from tvm import relax
    from tvm.s_tir import meta_schedule as ms
    from tvm.target import Target

    target = Target(json.loads(SHORT_TARGET))
    builder = relax.BlockBuilder()
    x, y = (relax.Var(name, relax.TensorType((SIZE, SIZE), "float32")) for name in "xy")
    with builder.function("main", [x, y]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, y))
            result = builder.emit_output(relax.op.nn.relu(product))
        builder.emit_func_output(result)
    with target:
        model = relax.get_pipeline("zero")(builder.get())
    (task,) = ms.relax_integration.extract_tasks(model, target)
    function = task.dispatched[0]

    folder = tmp_path_factory.mktemp("stock")
    database = ms.database.JSONDatabase(work_dir=str(folder))
    workload = database.commit_workload(function)
    context = ms.TuneContext(
        function, target=target, space_generator="post-order-apply", search_strategy="replay-trace"
    )
    context.pre_tuning(8, 8, context.generate_design_space(), database, ms.cost_model.RandomModel())
    candidates = list(context.generate_measure_candidates())[:4]
    assert len(candidates) == 4
    traces = []
    for number, candidate in enumerate(candidates):
        runs = [1e10] if number == 3 else [(3 - number) * 1e-5, (3 - number) * 1e-5 + 2e-6]
        record = ms.database.TuningRecord(candidate.sch.trace, workload, runs, target, candidate.args_info)
        database.commit_tuning_record(record)
        traces.append(trace_of(record))
    return Stock(model, function, target, folder, traces)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RecordStore]:
    opened = open_store(f"sqlite://{tmp_path / 'records.db'}")
    yield opened
    opened.close()


def bring_in(stock: Stock, store: RecordStore, **changes: Any) -> Any:
    options: dict[str, Any] = {"device": DEVICE, "sm_percent": 50, "sm_count": 1, "team": "vision", **changes}
    return import_folder(stock.folder, store, **options)


def database_of(store: RecordStore | str, **changes: Any) -> Any:
    from tuner_client.records import RecordDatabase

    options: dict[str, Any] = {"device_model": DEVICE.model, "sm_count": 1, "target": SHORT_TARGET, **changes}
    return RecordDatabase(store, **options)


def apply(model: Any, target: Any, database: Any) -> Any:
    """What a user of stock TVM does with a database."""
    from tvm import relax

    with target, database:
        return relax.transform.MetaScheduleApplyDatabase()(model)


def scheduled(model: Any) -> list[str]:
    """Names of the functions that a database gave a schedule."""
    return [
        var.name_hint
        for var, function in model.functions.items()
        if function.attrs and function.attrs.get("tirx.is_scheduled")
    ]


def output_of(model: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the built model says, and what it should say."""
    import tvm
    from tvm import relax

    with target:
        executable = tvm.compile(model, target)
    rng = np.random.default_rng(0)
    x, y = (rng.uniform(-1, 1, (SIZE, SIZE)).astype("float32") for _ in "xy")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    found = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(y)).numpy()
    return found, np.maximum(x @ y, 0)


class TestImport:
    def test_a_stock_folder_becomes_records(self, stock: Stock, store: RecordStore) -> None:
        report = bring_in(stock, store)
        assert (report.records, report.stored, report.failed, report.workloads) == (4, 4, 1, 1)
        assert report.problems == ()
        records = store.query(RecordFilter(include_failed=True)).records
        assert [json.loads(record.trace) for record in records] == [stock.traces[n] for n in (2, 1, 0, 3)]
        best = records[0]
        assert best.latencies_us == pytest.approx((10.0, 12.0))
        assert best.median_us == pytest.approx(11.0)
        assert (best.sm_percent, best.sm_count, best.team, best.origin) == (50, 1, "vision", Origin.IMPORT)
        assert (best.device_model, best.device_arch, best.partition_kind) == (DEVICE.model, "znver4", PartitionKind.CPU)
        assert not best.verified
        assert records[3].failure is FailureKind.RUN_ERROR
        workload = store.get_workload(best.workload_digest)
        assert workload is not None
        assert [dtype for _, dtype, _ in workload.args_info] == ["float32"] * 3

    def test_the_workload_is_the_one_that_the_compiler_finds_in_the_model(
        self, stock: Stock, store: RecordStore
    ) -> None:
        from tuner_core.compiler.workload import digest_of

        bring_in(stock, store)
        digest = digest_of(stock.model["fused_matmul_relu"])
        assert {record.workload_digest for record in store.query(RecordFilter()).records} == {digest}

    def test_importing_again_adds_nothing(self, stock: Stock, store: RecordStore) -> None:
        bring_in(stock, store)
        report = bring_in(stock, store)
        assert (report.records, report.stored, report.known) == (4, 0, 4)

    def test_a_target_that_means_the_same_takes_the_spelling_of_the_store(
        self, stock: Stock, store: RecordStore
    ) -> None:
        bring_in(stock, store, target_json=SHORT_TARGET)
        digests = {record.target_digest for record in store.query(RecordFilter()).records}
        assert digests == {target_digest(SHORT_TARGET)}

    def test_another_target_stays_what_it_is(self, stock: Stock, store: RecordStore) -> None:
        bring_in(stock, store, target_json='{"kind":"llvm","num-cores":2}')
        (target,) = {record.target_json for record in store.query(RecordFilter()).records}
        assert json.loads(target)["num-cores"] == 1

    def test_corrupt_lines_are_named_and_the_rest_is_imported(
        self, stock: Stock, store: RecordStore, tmp_path: Path
    ) -> None:
        folder = tmp_path / "damaged"
        folder.mkdir()
        (workload,) = (stock.folder / "database_workload.json").read_text().splitlines()
        records = (stock.folder / "database_tuning_record.json").read_text().splitlines()
        text = b'{"root_index": 0, "nodes": []}'
        no_module = base64.b64encode(len(text).to_bytes(8, "little") + text).decode()
        cut = base64.b64encode(base64.b64decode(json.loads(workload)[1])[:-50]).decode()
        (folder / "database_workload.json").write_text(
            "\n".join([workload, '["1"]', json.dumps(["1", cut]), json.dumps(["1", no_module]), "[[["])
        )
        whole = json.loads(records[0])

        def damaged(part: int, value: Any) -> str:
            row = json.loads(records[0])
            row[1][part] = value
            return json.dumps(row)

        (folder / "database_tuning_record.json").write_text(
            "\n".join(
                [
                    records[0],
                    records[1][:200],
                    "",
                    json.dumps([1, whole[1]]),
                    json.dumps([99, whole[1]]),
                    damaged(0, [[["Split"]], []]),
                    damaged(1, ["fast"]),
                    damaged(1, [-1.0]),
                    damaged(1, None),
                    damaged(2, None),
                    "\ufffd",
                    records[2],
                ]
            )
        )
        report = import_folder(folder, store, device=DEVICE, sm_percent=50, sm_count=1, team="")
        assert (report.records, report.stored) == (2, 2)
        said = {problem.split(":")[0]: problem for problem in report.problems}
        assert list(said) == [f"database_workload.json line {number}" for number in (2, 3, 4, 5)] + [
            f"database_tuning_record.json line {number}" for number in (2, 4, 5, 6, 7, 8, 9, 10, 11)
        ]
        assert "cut short" in said["database_workload.json line 3"]
        assert "line 2 of database_workload.json" in said["database_tuning_record.json line 4"]
        assert "trace" in said["database_tuning_record.json line 6"]
        assert "no target" in said["database_tuning_record.json line 10"]
        assert "13 lines left out" in report.line()

    def test_traces_are_replayed_when_they_are_applied_not_when_they_are_imported(
        self, stock: Stock, store: RecordStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "lies"
        folder.mkdir()
        (folder / "database_workload.json").write_bytes((stock.folder / "database_workload.json").read_bytes())
        line = json.loads((stock.folder / "database_tuning_record.json").read_text().splitlines()[0])
        honest = json.dumps(line)
        line[1][0] = [[["GetSBlock", [], ["no such block", "main"], ["b0"]]], []]
        line[1][1] = [1e-9]
        (folder / "database_tuning_record.json").write_text(f"{json.dumps(line)}\n{honest}\n")
        report = import_folder(
            folder, store, device=DEVICE, sm_percent=50, sm_count=1, team="", target_json=SHORT_TARGET
        )
        assert (report.stored, report.problems) == (2, ())
        lie, kept = store.query(RecordFilter()).records
        assert lie.median_us == pytest.approx(0.001)
        database = database_of(store)
        with caplog.at_level(logging.WARNING, logger="tuner_client.records"):
            assert scheduled(apply(stock.model, stock.target, database)) == ["fused_matmul_relu"]
        (said,) = {record.getMessage() for record in caplog.records if record.name == "tuner_client.records"}
        assert said.startswith(
            f"record {lie.trial_id[:12]} of dense 32x32 -> 32, fp32 + relu: the trace does not apply"
        )
        assert "Cannot find a block" in said and "\n" not in said
        workload = store.get_workload(lie.workload_digest)
        assert workload is not None
        found, passed_over = database.best_that_applies(workload.digest, workload.body)
        assert found == kept
        assert list(passed_over) == [lie.trial_id]

    def test_what_is_not_a_folder_of_tvm_says_so(self, store: RecordStore, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"database_workload\.json"):
            import_folder(tmp_path, store, device=DEVICE, sm_percent=50, sm_count=1, team="")


class TestExport:
    def test_stock_tvm_opens_and_applies_what_was_exported(
        self, stock: Stock, store: RecordStore, tmp_path: Path
    ) -> None:
        from tvm.s_tir import meta_schedule as ms

        bring_in(stock, store, target_json=SHORT_TARGET)
        report = export_folder(tmp_path / "out", store, RecordFilter())
        assert (report.records, report.workloads, report.folders) == (3, 1, (tmp_path / "out",))
        database = ms.database.JSONDatabase(work_dir=str(tmp_path / "out"), allow_missing=False)
        assert len(database) == 3
        best = database.query_tuning_record(stock.function, stock.target, "fused_matmul_relu")
        assert trace_of(best) == stock.traces[2]
        assert [float(run) for run in best.run_secs] == pytest.approx([1e-5, 1.2e-5])
        tuned = apply(stock.model, stock.target, database)
        assert scheduled(tuned) == ["fused_matmul_relu"]
        found, expected = output_of(tuned, stock.target)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_an_exported_folder_comes_back_as_the_same_records(
        self, stock: Stock, store: RecordStore, tmp_path: Path
    ) -> None:
        bring_in(stock, store)
        export_folder(tmp_path / "out", store, RecordFilter())
        other = open_store(f"sqlite://{tmp_path / 'other.db'}")
        elsewhere = DeviceInfo("cuda", "NVIDIA H200", "sm_90", "gpu", 132)
        report = import_folder(tmp_path / "out", other, device=elsewhere, sm_percent=100, sm_count=132, team="vision")
        assert report.stored == 3
        mine, theirs = (found.query(RecordFilter()).records for found in (store, other))
        assert [record.trial_id for record in theirs] == [record.trial_id for record in mine]
        assert [record.median_us for record in theirs] == pytest.approx([record.median_us for record in mine])
        other.close()

    def test_each_target_device_and_sm_count_has_its_own_folder(
        self, stock: Stock, store: RecordStore, tmp_path: Path
    ) -> None:
        from tvm.s_tir import meta_schedule as ms

        bring_in(stock, store)
        bring_in(stock, store, sm_count=2, sm_percent=100)
        bring_in(stock, store, device=dataclasses.replace(DEVICE, model="Intel Xeon"))
        bring_in(stock, store, target_json=SHORT_TARGET)
        report = export_folder(tmp_path / "out", store, RecordFilter(), split=True)
        assert report.records == 12
        assert len(report.folders) == 4
        for folder in report.folders:
            assert folder.parent == tmp_path / "out"
            assert len(ms.database.JSONDatabase(work_dir=str(folder), allow_missing=False)) == 3
        other = open_store(f"sqlite://{tmp_path / 'other.db'}")
        import_folder(tmp_path / "out", other, device=DEVICE, sm_percent=100, sm_count=64, team="")
        assert {record.key for record in other.query(RecordFilter()).records} == {
            record.key for record in store.query(RecordFilter()).records
        }
        other.close()

    def test_what_one_database_cannot_tell_apart_goes_into_one_only_on_request(
        self, stock: Stock, store: RecordStore, tmp_path: Path
    ) -> None:
        bring_in(stock, store)
        bring_in(stock, store, sm_count=2, sm_percent=100)
        with pytest.raises(UsageError, match=r"with [12] SMs .* with [12] SMs .*--split") as caught:
            export_folder(tmp_path / "out", store, RecordFilter())
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert export_folder(tmp_path / "out", store, RecordFilter(sm_count=2)).folders == (tmp_path / "out",)
        (only,) = export_folder(tmp_path / "each", store, RecordFilter(sm_count=2), split=True).folders
        assert only.parent == tmp_path / "each"

    def test_a_folder_that_holds_a_database_is_left_alone(
        self, stock: Stock, store: RecordStore, tmp_path: Path
    ) -> None:
        bring_in(stock, store)
        export_folder(tmp_path / "out", store, RecordFilter())
        before = (tmp_path / "out" / "database_tuning_record.json").read_bytes()
        with pytest.raises(UsageError, match="already"):
            export_folder(tmp_path / "out", store, RecordFilter())
        assert (tmp_path / "out" / "database_tuning_record.json").read_bytes() == before

    def test_no_match_writes_nothing(self, store: RecordStore, tmp_path: Path) -> None:
        report = export_folder(tmp_path / "out", store, RecordFilter())
        assert (report.records, report.folders) == (0, ())
        assert not (tmp_path / "out").exists()


class TestRecordDatabase:
    def test_tvm_applies_the_records_of_the_store(self, stock: Stock, store: RecordStore) -> None:
        bring_in(stock, store)
        database = database_of(store)
        tuned = apply(stock.model, stock.target, database)
        assert scheduled(tuned) == ["fused_matmul_relu"]
        found, expected = output_of(tuned, stock.target)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert len(database) == 3
        assert len(database.get_all_tuning_records()) == 3
        assert database.has_workload(stock.function)

    def test_the_best_record_is_the_one_that_the_store_ranks_first(self, stock: Stock, store: RecordStore) -> None:
        bring_in(stock, store, target_json=SHORT_TARGET)
        database = database_of(store)
        record = database.query_tuning_record(stock.function, stock.target, "main")
        assert trace_of(record) == stock.traces[2]
        from tvm.s_tir import meta_schedule as ms

        top = database.get_top_k(ms.database.Workload(stock.function), 2)
        assert [float(found.run_secs[0]) for found in top] == pytest.approx([1e-5, 2e-5])
        assert database.query_schedule(stock.function, stock.target, "main") is not None
        assert database.query_ir_module(stock.function, stock.target, "main") is not None

    @pytest.mark.parametrize(
        "changes",
        [{"sm_count": 2}, {"device_model": "Intel Xeon"}, {"target": {"kind": "llvm", "num-cores": 2}}],
    )
    def test_another_key_has_no_record(self, stock: Stock, store: RecordStore, changes: dict[str, Any]) -> None:
        bring_in(stock, store)
        database = database_of(store, **changes)
        assert scheduled(apply(stock.model, stock.target, database)) == []
        assert len(database) == 0

    def test_the_target_in_scope_must_be_that_of_the_database(self, stock: Stock, store: RecordStore) -> None:
        from tvm.target import Target

        bring_in(stock, store)
        other = Target({"kind": "llvm", "num-cores": 2})
        assert scheduled(apply(stock.model, other, database_of(store))) == []

    def test_every_spelling_of_the_target_finds_its_records(self, stock: Stock, store: RecordStore) -> None:
        bring_in(stock, store)
        for target in (SHORT_TARGET, json.loads(SHORT_TARGET), stock.target, str(stock.target)):
            assert database_of(store, target=target).has_workload(stock.function)

    def test_the_nearest_share_serves_only_on_request_and_is_named(
        self, stock: Stock, store: RecordStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        for count in (1, 3, 8):
            bring_in(stock, store, sm_count=count)
        database = database_of(store, sm_count=4, strict=False)
        with caplog.at_level(logging.WARNING, logger="tuner_client.selection"):
            assert scheduled(apply(stock.model, stock.target, database)) == ["fused_matmul_relu"]
        assert "nearest: AMD EPYC 9B14 with 3 SMs" in caplog.text
        assert scheduled(apply(stock.model, stock.target, database_of(store, sm_count=4))) == []

    def test_a_trace_that_does_not_fit_is_passed_over(
        self, stock: Stock, store: RecordStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        bring_in(stock, store, target_json=SHORT_TARGET)
        (record, *_) = store.query(RecordFilter()).records
        workload = store.get_workload(record.workload_digest)
        assert workload is not None
        lie = make_record(
            workload,
            trace='[[["GetSBlock",[],["no such block","main"],["b0"]]],[]]',
            median_us=0.001,
            target_json=SHORT_TARGET,
            device_model=DEVICE.model,
        )
        store.commit([lie])
        assert store.top(lie.key)[0].trial_id == lie.trial_id
        with caplog.at_level(logging.WARNING, logger="tuner_client.records"):
            assert scheduled(apply(stock.model, stock.target, database_of(store))) == ["fused_matmul_relu"]
        assert lie.trial_id[:12] in caplog.text

    def test_a_server_serves_as_well_as_a_store(self, stock: Stock, store: RecordStore) -> None:
        bring_in(stock, store)
        with serving(store) as address:
            database = database_of(address)
            assert scheduled(apply(stock.model, stock.target, database)) == ["fused_matmul_relu"]
            database.close()

    def test_a_store_needs_to_be_told_what_is_built_for(self, store: RecordStore) -> None:
        from tuner_client.records import RecordDatabase

        with pytest.raises(UsageError, match="device_model, sm_count and target"):
            RecordDatabase(store, sm_percent=25)

    def test_an_unreachable_server_is_one_clear_line_even_from_inside_a_pass(self, stock: Stock) -> None:
        database = database_of("127.0.0.1:9")
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
            apply(stock.model, stock.target, database)
        database.close()

    def test_stock_tuning_commits_into_the_store(self, stock: Stock, store: RecordStore) -> None:
        from tvm.s_tir import meta_schedule as ms

        source = ms.database.JSONDatabase(work_dir=str(stock.folder))
        database = database_of(store, sm_percent=50)
        for record in source.get_all_tuning_records():
            database.commit_workload(record.workload.mod)
            database.commit_tuning_record(record)
        (best, *rest) = store.query(RecordFilter()).records
        assert len(rest) == 2
        assert json.loads(best.trace) == stock.traces[2]
        assert (best.sm_percent, best.target_digest) == (50, target_digest(SHORT_TARGET))
