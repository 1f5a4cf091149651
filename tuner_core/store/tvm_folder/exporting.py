"""Records of a store as folders that stock TVM's JSONDatabase opens."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tuner_core.errors import TunerError, UsageError
from tuner_core.model import TVM_VERSION, Record, Workload
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.tvm_folder.lines import FACTS_FILE, RECORD_FILE, WORKLOAD_FILE, record_line


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: ``folders`` are those that ``JSONDatabase`` opens."""

    records: int
    workloads: int
    folders: tuple[Path, ...]

    def line(self) -> str:
        """The report in one line."""
        if not self.folders:
            return "no record matches: nothing was written"
        where = str(self.folders[0]) if len(self.folders) == 1 else f"{len(self.folders)} folders"
        return f"exported {self.records} records of {self.workloads} operators to {where}"


def export_folder(path: str | Path, store: RecordStore, where: RecordFilter, *, split: bool = False) -> ExportReport:
    """Write the valid records that match, so that stock ``JSONDatabase`` opens and applies them.

    Stock look-ups ignore the target, so a folder holds one target, device, SM count and TVM version. Files appear when
    all is written.

    Args:
        path: Made when missing.
        store: Where the records come from.
        where: Which records; failed ones are never written.
        split: Write a folder in ``path`` for each target, device, SM count and TVM version.

    Raises:
        UsageError: ``path`` holds a database already; or the records have several of these and ``split`` is not set.
        TunerError: It cannot be written.
    """
    folder = Path(path)
    if next(folder.rglob(WORKLOAD_FILE), None) is not None:
        raise UsageError(f"{folder} holds a TVM database already; choose another folder")
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
        try:
            report = _write_all(folder, scratch, store, where, split)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
        return report
    except OSError as error:
        raise TunerError(
            f"cannot write {folder} ({error.strerror}); free some space or choose another folder"
        ) from None


def _write_all(folder: Path, scratch: Path, store: RecordStore, where: RecordFilter, split: bool) -> ExportReport:
    exports: dict[tuple[str, str, int, str], _Export] = {}
    digests: set[str] = set()
    count = 0
    with contextlib.ExitStack() as stack:
        for record in _records(store, where):
            key = (record.target_digest, record.device_model, record.sm_count, record.tvm_version)
            if key not in exports:
                if exports and not split:
                    first = next(iter(exports.values())).first
                    raise UsageError(
                        f"the records are of {_place(first)} and of {_place(record)}, and one TVM database cannot "
                        "tell them apart: choose by --device, --sm-count or --sm-percent, or --split for a folder each"
                    )
                name = _folder_name(record)
                if (scratch / name).exists():  # two devices whose names differ in signs only
                    name = f"{name}-{len(exports)}"
                exports[key] = _Export(scratch / name, record, store.get_workload, stack)
            exports[key].add(record)
            digests.add(record.workload_digest)
            count += 1
    folders = []
    for export in exports.values():
        if not split:
            for file in sorted(export.folder.iterdir()):
                file.rename(folder / file.name)
            folders.append(folder)
        else:
            folders.append(export.folder.rename(folder / export.folder.name))
    return ExportReport(count, len(digests), tuple(sorted(folders)))


def _records(store: RecordStore, where: RecordFilter) -> Iterator[Record]:
    cursor: str | None = None
    while True:
        page = store.query(where, limit=1_000, cursor=cursor)
        yield from (record for record in page.records if record.valid)
        cursor = page.next_cursor
        if cursor is None:
            return


def _place(record: Record) -> str:
    kind = json.loads(record.target_json).get("kind", "target")
    version = "" if record.tvm_version == TVM_VERSION else f", TVM {record.tvm_version}"
    target = f"target {kind} {record.target_digest[:8]}"
    return f"{record.device_model} with {record.sm_count} SMs ({target}{version})"


def _folder_name(record: Record) -> str:
    kind = json.loads(record.target_json).get("kind", "target")
    device = re.sub(r"[^A-Za-z0-9.]+", "-", record.device_model).strip("-")
    name = f"{kind}-{record.target_digest[:8]}-{device}-{record.sm_count}"
    return name if record.tvm_version == TVM_VERSION else f"{name}-tvm-{record.tvm_version}"


class _Export:
    """One folder being written."""

    def __init__(
        self, folder: Path, first: Record, workload: Callable[[str], Workload | None], stack: contextlib.ExitStack
    ) -> None:
        self.folder = folder
        self.first = first
        folder.mkdir()
        self._workload = workload
        self._workloads: dict[str, tuple[int, Workload]] = {}
        self._workload_file: IO[str] = stack.enter_context((folder / WORKLOAD_FILE).open("w"))
        self._record_file: IO[str] = stack.enter_context((folder / RECORD_FILE).open("w"))
        facts = {
            "device_model": first.device_model,
            "device_arch": first.device_arch,
            "partition_kind": first.partition_kind,
            "sm_percent": first.sm_percent,
            "sm_count": first.sm_count,
            "target": json.loads(first.target_json),
            "tvm_version": first.tvm_version,
            "driver_version": first.driver_version,
            "cuda_version": first.cuda_version,
        }
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")

    def add(self, record: Record) -> None:
        digest = record.workload_digest
        if digest not in self._workloads:
            workload = self._workload(digest)
            if workload is None:
                raise TunerError(f"the store has lost workload {digest[:12]} of its records")
            self._workload_file.write(_stock_workload(workload) + "\n")
            self._workloads[digest] = (len(self._workloads), workload)
        number, workload = self._workloads[digest]
        self._record_file.write(record_line(record, workload, number) + "\n")


def _stock_workload(workload: Workload) -> str:
    from tuner_core.compiler.tvm_setup import load_tvm
    from tuner_core.compiler.workload import module_from_body

    load_tvm()
    from tvm.s_tir import meta_schedule as ms

    line: str = json.dumps(ms.database.Workload(module_from_body(workload.body)).as_json(), separators=(",", ":"))
    return line
