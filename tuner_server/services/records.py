"""RecordService: the record store over the wire."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tuner_core.errors import UsageError
from tuner_core.proto.tuner.v1 import records_pb2, records_pb2_grpc
from tuner_core.store import wire
from tuner_core.store.interface import RecordStore
from tuner_core.store.paging import check_query
from tuner_server.services.status import mapped

_PAGE_RECORDS = 1_000
_PAGE_BYTES = 16 << 20


class RecordServicer(records_pb2_grpc.RecordServiceServicer):
    """Serves a store. The store blocks, so every call takes a thread.

    Args:
        store: Any backend; it stays the caller's to close.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    @mapped
    async def CommitRecords(
        self, request: records_pb2.CommitRecordsRequest, context: Any
    ) -> records_pb2.CommitRecordsResponse:
        """Store workloads and records; answered only when durable."""

        def commit() -> records_pb2.CommitRecordsResponse:
            result = self._store.commit(
                [wire.record_from_message(message) for message in request.records],
                [wire.workload_from_message(message) for message in request.workloads],
            )
            return records_pb2.CommitRecordsResponse(stored=result.stored, known=result.known)

        return await asyncio.to_thread(commit)

    @mapped
    async def GetRecord(self, request: records_pb2.GetRecordRequest, context: Any) -> records_pb2.GetRecordResponse:
        """One record, or an empty response."""
        record = await asyncio.to_thread(self._store.get, request.trial_id)
        return records_pb2.GetRecordResponse(record=wire.record_to_message(record) if record else None)

    @mapped
    async def GetWorkload(
        self, request: records_pb2.GetWorkloadRequest, context: Any
    ) -> records_pb2.GetWorkloadResponse:
        """One workload, or an empty response."""
        workload = await asyncio.to_thread(self._store.get_workload, request.digest)
        return records_pb2.GetWorkloadResponse(workload=wire.workload_to_message(workload) if workload else None)

    @mapped
    async def TopRecords(self, request: records_pb2.TopRecordsRequest, context: Any) -> records_pb2.TopRecordsResponse:
        """The strict keyed look-up; no limit means one record."""
        if not request.HasField("key"):
            raise UsageError("the request has no key")
        key = wire.key_from_message(request.key)

        def top() -> records_pb2.TopRecordsResponse:
            found = self._store.top(key, request.limit or 1, verified_only=request.verified_only)
            return records_pb2.TopRecordsResponse(records=[wire.record_to_message(record) for record in found])

        return await asyncio.to_thread(top)

    @mapped
    async def QueryRecords(
        self, request: records_pb2.QueryRecordsRequest, context: Any
    ) -> records_pb2.QueryRecordsResponse:
        """One page; shorter than asked for, with a cursor to go on, where it would not fit a message."""
        return await asyncio.to_thread(self._page, request)

    def _page(self, request: records_pb2.QueryRecordsRequest) -> records_pb2.QueryRecordsResponse:
        where = wire.filter_from_message(request.filter)
        order = request.order or "latency"
        limit = request.limit or 100
        check_query(where, limit, request.cursor or None, order, request.top_per_key)
        limit = min(limit, _PAGE_RECORDS)
        while True:
            page = self._store.query(
                where, limit=limit, cursor=request.cursor or None, order=order, top_per_key=request.top_per_key
            )
            response = records_pb2.QueryRecordsResponse(
                records=[wire.record_to_message(r, with_trace=not request.omit_traces) for r in page.records],
                next_cursor=page.next_cursor or "",
            )
            if limit == 1 or response.ByteSize() <= _PAGE_BYTES:
                return response
            limit = max(1, limit // 4)

    @mapped
    async def GetStats(self, request: records_pb2.GetStatsRequest, context: Any) -> records_pb2.GetStatsResponse:
        """Counts, as JSON."""
        return records_pb2.GetStatsResponse(stats_json=json.dumps(await asyncio.to_thread(self._store.stats)))

    @mapped
    async def PruneRecords(
        self, request: records_pb2.PruneRecordsRequest, context: Any
    ) -> records_pb2.PruneRecordsResponse:
        """Delete by retention."""
        if not request.HasField("older_than"):
            raise UsageError("prune needs a time")
        deleted = await asyncio.to_thread(self._store.prune, wire.seconds(request.older_than), request.team)
        return records_pb2.PruneRecordsResponse(deleted=deleted)
