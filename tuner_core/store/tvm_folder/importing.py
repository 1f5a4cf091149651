"""A folder of stock TVM's JSONDatabase into a store."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner_core.errors import InvalidRecordError, TunerError, UsageError
from tuner_core.model import (
    TVM_VERSION,
    DeviceInfo,
    FailureKind,
    Origin,
    PartitionKind,
    Record,
    RecordKey,
    Workload,
    canonical_json,
    sha256_hex,
    target_digest,
    trial_id_of_digest,
)
from tuner_core.store.interface import RecordStore
from tuner_core.store.tvm_folder.lines import (
    FACTS_FILE,
    RECORD_FILE,
    WORKLOAD_FILE,
    StockRecord,
    parse_record,
    parse_workload,
)

_BATCH = 1_000


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        records: Lines that became records.
        stored, known: How many of them were new, and how many the store already had.
        failed: How many of them are failed trials.
        workloads: Distinct workloads in the folder.
        problems: One line of text per line that was left out: file, number of the line (from 1), reason.
    """

    records: int
    stored: int
    known: int
    failed: int
    workloads: int
    problems: tuple[str, ...]

    def line(self) -> str:
        """The report in one line."""
        left_out = f", {len(self.problems)} lines left out" if self.problems else ""
        return (
            f"imported {self.records} records of {self.workloads} operators: {self.stored} new, {self.known} known, "
            f"{self.failed} failed trials{left_out}"
        )


@dataclass(frozen=True)
class _Origin:
    """What every record of an imported folder has in common."""

    device_model: str
    device_arch: str
    partition_kind: PartitionKind
    sm_percent: int
    sm_count: int
    tvm_version: str
    driver_version: str
    cuda_version: str
    team: str


def import_folder(
    path: str | Path,
    store: RecordStore,
    *,
    device: DeviceInfo,
    sm_percent: int,
    sm_count: int,
    team: str,
    target_json: str = "",
) -> ImportReport:
    """Read a folder, or a folder of folders as :func:`export_folder` writes them. Traces are kept, not replayed.

    A folder that :func:`export_folder` wrote says itself on which device and SM count it was measured.

    Args:
        path: Folder with ``database_workload.json`` and ``database_tuning_record.json``.
        store: Where the records go.
        device: On which a stock folder was measured.
        sm_percent: Share of the device that it was measured at, 1..100.
        sm_count: SMs (or cores) of that share.
        team: Team that the records belong to.
        target_json: A target of the store; a folder's target that means the same is written as this one.

    Raises:
        UsageError: Not such a folder.
        TunerError: A file cannot be read.
        StoreError: The store refuses; what was stored before stays, and importing again adds the rest.
    """
    folder = Path(path)
    folders = [found for found in (folder, *sorted(folder.glob("*/"))) if (found / WORKLOAD_FILE).is_file()]
    if not folders:
        raise UsageError(f"{folder} is not a folder of TVM's JSONDatabase: it holds no {WORKLOAD_FILE}")
    kind = PartitionKind.CPU if device.kind == "cpu" else PartitionKind.MPS if sm_percent < 100 else None
    given = _Origin(
        device.model,
        device.arch,
        kind or PartitionKind.EXCLUSIVE,
        sm_percent,
        sm_count,
        TVM_VERSION,
        device.driver_version,
        device.cuda_version,
        team,
    )
    reports = [_Import(found, store, _origin(found, given), target_json, top=folder).run() for found in folders]
    return ImportReport(
        sum(report.records for report in reports),
        sum(report.stored for report in reports),
        sum(report.known for report in reports),
        sum(report.failed for report in reports),
        sum(report.workloads for report in reports),
        tuple(problem for report in reports for problem in report.problems),
    )


def _origin(folder: Path, given: _Origin) -> _Origin:
    try:
        text = (folder / FACTS_FILE).read_text()
    except FileNotFoundError:
        return given
    except (OSError, UnicodeDecodeError) as error:
        raise TunerError(f"cannot read {folder / FACTS_FILE} ({error})") from None
    try:
        facts = json.loads(text)
        return _Origin(
            device_model=str(facts["device_model"]),
            device_arch=str(facts["device_arch"]),
            partition_kind=PartitionKind(facts["partition_kind"]),
            sm_percent=int(facts["sm_percent"]),
            sm_count=int(facts["sm_count"]),
            tvm_version=str(facts["tvm_version"]),
            driver_version=str(facts["driver_version"]),
            cuda_version=str(facts["cuda_version"]),
            team=given.team,
        )
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{folder / FACTS_FILE} is damaged: remove it to import as from stock TVM") from None


@dataclass
class _Import:
    """One folder on its way into a store."""

    folder: Path
    store: RecordStore
    origin: _Origin
    target_json: str
    top: Path
    problems: list[str] = field(default_factory=list)
    records: int = 0
    stored: int = 0
    failed: int = 0
    target: tuple[dict[str, Any], str, str] | None = None

    def run(self) -> ImportReport:
        workloads: dict[int, Workload] = {}
        for number, line in self._lines(WORKLOAD_FILE):
            with self._problems(WORKLOAD_FILE, number):
                workloads[number] = _canonical_workload(parse_workload(line))
        distinct = {workload.digest: workload for workload in workloads.values()}
        self.store.commit([], distinct.values())
        with ThreadPoolExecutor(1) as committing:  # the next lines are read while a server stores the ones before
            self._import_records(workloads, committing)
        return ImportReport(
            self.records, self.stored, self.records - self.stored, self.failed, len(distinct), tuple(self.problems)
        )

    def _import_records(self, workloads: Mapping[int, Workload], committing: Executor) -> None:
        batch: list[Record] = []
        commit: Future[None] | None = None
        now = time.time()
        for number, line in self._lines(RECORD_FILE):
            with self._problems(RECORD_FILE, number):
                stock = parse_record(line)
                workload = workloads.get(stock.workload)
                if workload is None:
                    raise InvalidRecordError(
                        f"its workload, line {stock.workload + 1} of {WORKLOAD_FILE}, is not there"
                    )
                batch.append(self._record(stock, workload, now))
            if len(batch) >= _BATCH:
                if commit is not None:
                    commit.result()
                commit = committing.submit(self._commit, batch)
                batch = []
        if commit is not None:
            commit.result()
        self._commit(batch)

    def _lines(self, name: str) -> Iterator[tuple[int, bytes]]:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file):
                    if line.strip():
                        yield number, line
        except FileNotFoundError:
            raise UsageError(f"{self.folder} is not a folder of TVM's JSONDatabase: it holds no {name}") from None
        except OSError as error:
            raise TunerError(f"cannot read {path} ({error.strerror})") from None

    @contextlib.contextmanager
    def _problems(self, name: str, number: int) -> Iterator[None]:
        try:
            yield
        except InvalidRecordError as error:
            where = (self.folder / name).relative_to(self.top)
            self.problems.append(f"{where} line {number + 1}: {error}")

    def _record(self, stock: StockRecord, workload: Workload, now: float) -> Record:
        if self.target is None or stock.target != self.target[0]:  # a folder has one target, as a rule
            target_json = self._spelling(canonical_json(stock.target))
            self.target = (stock.target, target_json, target_digest(target_json))
        _, target_json, digest = self.target
        origin = self.origin
        key = RecordKey(workload.digest, digest, origin.device_model, origin.sm_count, origin.tvm_version)
        return Record(
            trial_id=trial_id_of_digest(key, sha256_hex(stock.trace), "", False),
            workload_digest=workload.digest,
            trace=stock.trace,
            target_json=target_json,
            target_digest=digest,
            device_model=origin.device_model,
            device_arch=origin.device_arch,
            sm_percent=origin.sm_percent,
            sm_count=origin.sm_count,
            partition_kind=origin.partition_kind,
            latencies_us=tuple(run * 1e6 for run in stock.runs_s),
            median_us=stock.median_s * 1e6 if stock.runs_s else None,
            tvm_version=origin.tvm_version,
            cuda_version=origin.cuda_version,
            driver_version=origin.driver_version,
            team=origin.team,
            created_at=now,
            failure=None if stock.runs_s else FailureKind.RUN_ERROR,
            failure_message="" if stock.runs_s else "stock TVM recorded a failed build or run",
            origin=Origin.IMPORT,
        )

    def _spelling(self, written: str) -> str:
        from tuner_core.compiler.target import expanded_target

        if not self.target_json:
            return written
        try:
            same = expanded_target(written) == expanded_target(self.target_json)
        except UsageError as error:
            raise InvalidRecordError(str(error)) from None
        return canonical_json(json.loads(self.target_json)) if same else written

    def _commit(self, batch: list[Record]) -> None:
        self.stored += self.store.commit(batch).stored
        self.records += len(batch)
        self.failed += sum(not record.valid for record in batch)


def _canonical_workload(text: str) -> Workload:
    from tuner_core.compiler.workload import module_from_body, workload_from_module

    return workload_from_module(module_from_body(text))
