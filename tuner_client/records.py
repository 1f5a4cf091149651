"""The record store as a database that TVM's own passes apply."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterator
from typing import Any

from tuner_client.places import choose_place
from tuner_client.selection import Place, Selection
from tuner_core.compiler.target import expanded_target
from tuner_core.compiler.trace import apply_trace
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import (
    canonical_module,
    digest_of,
    module_from_body,
    normalise,
    workload_from_module,
)
from tuner_core.errors import (
    AuthenticationError,
    DeadlineError,
    InvalidRecordError,
    PermissionDeniedError,
    StoreError,
    TunerError,
    UnavailableError,
    UsageError,
)
from tuner_core.model import Origin, PartitionKind, Record, canonical_json, target_digest, trial_id
from tuner_core.store.interface import RecordStore
from tuner_core.transport.options import ConnectionOptions, read_token

load_tvm()

from tvm.ir.utils import derived_object  # noqa: E402
from tvm.s_tir import meta_schedule as ms  # noqa: E402
from tvm.target import Target  # noqa: E402
from tvm_ffi import register_error  # noqa: E402

log = logging.getLogger(__name__)

# TVM's C++ calls this database: without registration, what it raises comes out of TVM as a RuntimeError
for _error in (
    StoreError,
    TunerError,
    UnavailableError,
    DeadlineError,
    UsageError,
    AuthenticationError,
    PermissionDeniedError,
):
    register_error(_error)

_CANDIDATES = 8
_HOST_TIMEOUT_S = 120.0


@derived_object
class RecordDatabase(ms.database.PyDatabase):
    """Records of one device, SM count and target, for ``with database:`` and ``MetaScheduleApplyDatabase``.

    TVM's own databases answer a query for any target with whatever they hold; this one answers only for its own::

        with target, RecordDatabase("gpu1:50061", sm_percent=25):
            module = relax.transform.MetaScheduleApplyDatabase()(module)

    Args:
        store_or_server: A server: ``HOST:PORT`` (with the token of ``TUNER_TOKEN``, if any) or connection options; or a
            store.
        sm_percent: Share that the model will run on, 1..100. A server says what that is: device, SM count and target;
            None: its first share. Beside a store, only for records that TVM commits into this database.
        device_model: As records hold it, e.g. ``NVIDIA H200``, or a server's name for a device of it (``cuda:1``);
            None: the server's. It must say, or the target, where a server has devices of several models.
        sm_count: SMs (or cores) that the model will run on; None: the server's at that share.
        target: ``tvm.target.Target``, mapping or JSON; None: the server's at that share.
        strict: Require device, SM count and TVM version to be the same. When False, a workload without such a record
            gets the one of the nearest SM count, the same version and device preferred, and the log says so.

    Raises:
        UsageError: TVM does not know the target, the address is not one, a store came without device, SM count and
            target, or a server has several devices and nothing says which is meant.
        ConflictError: The server has no such device.
        StoreError, UnavailableError (also when queried): As the server or the store raises them.
    """

    def __init__(
        self,
        store_or_server: RecordStore | ConnectionOptions | str,
        *,
        sm_percent: int | None = None,
        device_model: str | None = None,
        sm_count: int | None = None,
        target: Any = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        self._channel: Any = None
        target_json = None if target is None else canonical_json(json.loads(_json(target)))
        if isinstance(store_or_server, RecordStore):
            store = store_or_server
            if device_model is None or sm_count is None or target_json is None:
                raise UsageError("a store does not know what you build for: give device_model, sm_count and target")
        else:
            if isinstance(store_or_server, str):
                store_or_server = ConnectionOptions(store_or_server, token=read_token(None, os.environ))
            store = self._connect(store_or_server)
            if device_model is None or sm_count is None or target_json is None:
                try:
                    offered = _place_of_server(
                        self._channel, store_or_server.address, sm_percent, device_model, target_json
                    )
                except BaseException:
                    self.close()
                    raise
                device_model = offered.device_model
                sm_count = sm_count or offered.sm_count
                target_json = target_json or offered.target_json
        self._sm_percent = sm_percent or 100
        self.place = Place(device_model, sm_count, target_json)
        self._selection = Selection(store, self.place, strict=strict)
        self._store = store

    def _connect(self, options: ConnectionOptions) -> RecordStore:
        from tuner_core.store.remote import RemoteStore
        from tuner_core.transport.channel import open_channel

        self._channel = open_channel(options)
        return RemoteStore(self._channel, address=options.address)

    def close(self) -> None:
        """Close the connection that this database opened; a store that was given stays open."""
        if self._channel is not None:
            self._channel.close()

    # Queries of TVM

    def has_workload(self, mod: Any) -> bool:
        """Whether there is a record that applies."""
        return bool(self._selection.best(digest_of(mod), 1))

    def query_tuning_record(self, mod: Any, target: Any, workload_name: str | None = None) -> Any:
        """The best record that applies to this workload on this target, or None.

        A record whose trace does not fit its workload is passed over with a warning.
        """
        if expanded_target(target) != self._selection.expanded_target:
            return None
        records = self._selection.best(digest_of(mod), _CANDIDATES)
        return next((found for _, found in self._replayed(canonical_module(mod), records)), None)

    def query_schedule(self, mod: Any, target: Any, workload_name: str | None = None) -> Any:
        """The schedule of :meth:`query_tuning_record`, or None."""
        record = self.query_tuning_record(mod, target, workload_name)
        return None if record is None else record.as_measure_candidate().sch

    def query_ir_module(self, mod: Any, target: Any, workload_name: str | None = None) -> Any:
        """The scheduled module of :meth:`query_tuning_record`, or None."""
        schedule = self.query_schedule(mod, target, workload_name)
        return None if schedule is None else schedule.mod

    def get_top_k(self, workload: Any, top_k: int) -> list[Any]:
        """The best records of a workload, best first."""
        if top_k < 1:
            return []
        records = self._selection.best(digest_of(workload.mod), top_k)
        return [found for _, found in self._replayed(canonical_module(workload.mod), records)]

    def get_all_tuning_records(self) -> list[Any]:
        """All valid records of this device, SM count and target. Each trace is replayed, some milliseconds each."""
        modules: dict[str, Any] = {}
        found: list[Any] = []
        for record in self._selection.all():
            if record.workload_digest not in modules:
                workload = self._store.get_workload(record.workload_digest)
                modules[record.workload_digest] = None if workload is None else module_from_body(workload.body)
            if modules[record.workload_digest] is not None:
                found += [replayed for _, replayed in self._replayed(modules[record.workload_digest], [record])]
        return found

    def __len__(self) -> int:
        """How many valid records this device, SM count and target have."""
        return sum(1 for _ in self._selection.all())

    # Queries of this product

    def best_that_applies(self, workload_digest: str, body: str) -> tuple[Record | None, dict[str, str]]:
        """What :meth:`query_tuning_record` finds, as our record; of a fallback schedule without replaying it.

        Args:
            workload_digest: Of the workload.
            body: Its canonical JSON.

        Returns:
            The best record whose trace fits, or None; and why each better one was passed over, by trial id.
        """
        passed_over: dict[str, str] = {}
        records = self._selection.best(workload_digest, _CANDIDATES)
        if records and records[0].origin is Origin.FALLBACK:
            return records[0], {}
        replayed = self._replayed(module_from_body(body), records, passed_over) if records else iter(())
        return next((record for record, _ in replayed), None), passed_over

    # Commits of TVM: a stock tuning run may use this database

    def commit_workload(self, mod: Any) -> Any:
        """Store a workload."""
        self._store.commit([], [workload_from_module(mod)])
        return ms.database.Workload(normalise(mod))

    def commit_tuning_record(self, record: Any) -> None:
        """Store a record that stock TVM measured on this device.

        Raises:
            UsageError: It was measured for another target.
        """
        if record.target is not None and expanded_target(record.target) != self._selection.expanded_target:
            raise UsageError("this record was measured for another target than this database's")
        runs_us = tuple(float(run) * 1e6 for run in record.run_secs or ())
        if not runs_us or max(runs_us) >= 1e13:
            return  # stock TVM's mark of a failed run says nothing about why
        workload = workload_from_module(record.workload.mod)
        trace = json.dumps(record.as_json()[0], separators=(",", ":"))
        cpu = self._selection.target_kind == "llvm"
        stored = Record(
            trial_id=trial_id(self.place.key(workload.digest), trace, "", False),
            workload_digest=workload.digest,
            trace=trace,
            target_json=self.place.target_json,
            target_digest=target_digest(self.place.target_json),
            device_model=self.place.device_model,
            device_arch="",
            sm_percent=self._sm_percent,
            sm_count=self.place.sm_count,
            partition_kind=PartitionKind.CPU if cpu else PartitionKind.EXCLUSIVE,
            latencies_us=runs_us,
            median_us=statistics.median(runs_us),
            origin=Origin.IMPORT,
        )
        self._store.commit([stored], [workload])

    def _replayed(
        self, mod: Any, records: list[Record], passed_over: dict[str, str] | None = None
    ) -> Iterator[tuple[Record, Any]]:
        """Records as TVM's, each trace replayed when it is asked for; those that do not fit are left out."""
        workload = ms.database.Workload(mod)
        args_info = [info.as_json() for info in ms.arg_info.ArgInfo.from_entry_func(mod, remove_preproc=False)]
        for record in records:
            runs_s = [us * 1e-6 for us in record.latencies_us or (record.median_us or 0.0,)]
            row = [json.loads(record.trace), runs_s, json.loads(record.target_json), args_info]
            try:
                replayed = _from_json(row, workload, mod, record.trace)
            except InvalidRecordError as error:
                log.warning("record %s of %s: %s", record.trial_id[:12], record.description, error)
                if passed_over is not None:
                    passed_over[record.trial_id] = str(error)
            else:
                yield record, replayed


def _from_json(row: list[Any], workload: Any, mod: Any, trace: str) -> Any:
    try:
        return ms.database.TuningRecord.from_json(row, workload)
    except Exception:  # whatever TVM raises when it replays a trace; apply_trace says why, or knows what was missing
        apply_trace(mod, trace)
        try:
            return ms.database.TuningRecord.from_json(row, workload)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InvalidRecordError(f"TVM cannot read the record: {lines[-1][:300]}") from None


def _place_of_server(
    channel: Any, address: str, sm_percent: int | None, device: str | None, target_json: str | None
) -> Place:
    """What a share of a server's device is."""
    from tuner_core.proto.tuner.v1 import host_pb2, host_pb2_grpc
    from tuner_core.transport.channel import call

    request = host_pb2.GetHostRequest(sm_percent=sm_percent or 0)
    stub = host_pb2_grpc.HostServiceStub(channel)
    host = call(stub.GetHost, request, address=address, timeout_s=_HOST_TIMEOUT_S)
    chosen = choose_place(host, address, device=device, target_json=target_json)
    return Place(chosen.device_model, chosen.sm_count, canonical_json(json.loads(chosen.target_json)))


def _json(target: Any) -> str:
    if isinstance(target, str):
        return target
    return str(target) if isinstance(target, Target) else json.dumps(dict(target))
