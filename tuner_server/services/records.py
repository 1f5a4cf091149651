"""RecordService: the record store over the wire."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from tuner_core.errors import NotFoundError, UsageError
from tuner_core.proto.tuner.v1 import records_pb2, records_pb2_grpc
from tuner_core.store import wire
from tuner_core.store.interface import RecordStore
from tuner_core.store.paging import check_query
from tuner_server.services.auth import Authenticator
from tuner_server.services.status import mapped

_PAGE_RECORDS = 1_000
_STREAM_RECORDS = 500
_FOLLOW_POLL_S = 0.2
_PAGE_BYTES = 16 << 20


class RecordServicer(records_pb2_grpc.RecordServiceServicer):
    """Serves a store. The store blocks, so every call takes a thread.

    Every team reads everything and writes its own: what it commits becomes its own, what it deletes or tags must be.

    Args:
        store: Any backend; it stays the caller's to close.
        authenticator: Knows the teams; None: an open server.
    """

    def __init__(self, store: RecordStore, authenticator: Authenticator | None = None) -> None:
        self._store = store
        self._authenticator = authenticator or Authenticator({})

    @mapped
    async def CommitRecords(
        self, request: records_pb2.CommitRecordsRequest, context: Any
    ) -> records_pb2.CommitRecordsResponse:
        """Store workloads and records, as the token's team; answered only when durable."""
        metadata = context.invocation_metadata()
        for message in request.records:
            message.team = self._authenticator.owner(metadata, message.team)

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
    async def StreamRecords(
        self, request: records_pb2.StreamRecordsRequest, context: Any
    ) -> AsyncIterator[records_pb2.StreamRecordsResponse]:
        """A query page by page; every page is of the state at the first one."""
        page = records_pb2.QueryRecordsRequest(
            filter=request.filter,
            order=request.order,
            top_per_key=request.top_per_key,
            omit_traces=request.omit_traces,
            cursor=request.cursor,
        )
        left = request.limit
        while True:
            page.limit = min(left or _STREAM_RECORDS, _STREAM_RECORDS)
            found = await asyncio.to_thread(self._page, page)
            last = not found.next_cursor or (left and left <= len(found.records))
            yield records_pb2.StreamRecordsResponse(records=found.records, cursor=found.next_cursor)
            if last:
                return
            page.cursor = found.next_cursor
            left -= len(found.records) if left else 0

    @mapped
    async def FollowRecords(
        self, request: records_pb2.FollowRecordsRequest, context: Any
    ) -> AsyncIterator[records_pb2.FollowRecordsResponse]:
        """Records as they are committed; the first response comes at once and says where that begins."""
        where = wire.filter_from_message(request.filter)
        after = request.after
        if not after:
            after = (await asyncio.to_thread(self._store.follow, where)).cursor
        once = request.HasField("wait_s")
        if not once:
            yield records_pb2.FollowRecordsResponse(cursor=after)
        deadline = time.monotonic() + max(0.0, request.wait_s)
        while True:
            response = await asyncio.to_thread(self._followed, request, after)
            after = response.cursor
            left_s = deadline - time.monotonic()
            if response.records or (once and left_s <= 0):
                yield response
                if once:
                    return
            else:  # asked again and again: a follower that waited in a thread would take it from other calls
                await asyncio.sleep(min(_FOLLOW_POLL_S, left_s) if once else _FOLLOW_POLL_S)

    def _followed(self, request: records_pb2.FollowRecordsRequest, after: str) -> records_pb2.FollowRecordsResponse:
        where = wire.filter_from_message(request.filter)
        limit = min(request.limit or _STREAM_RECORDS, _STREAM_RECORDS)
        while True:
            found = self._store.follow(where, after, limit=limit)
            response = records_pb2.FollowRecordsResponse(
                records=[wire.record_to_message(r, with_trace=not request.omit_traces) for r in found.records],
                cursor=found.cursor,
            )
            if limit == 1 or response.ByteSize() <= _PAGE_BYTES:
                return response
            limit = max(1, limit // 4)

    @mapped
    async def TagRecord(self, request: records_pb2.TagRecordRequest, context: Any) -> records_pb2.TagRecordResponse:
        """Set and remove tags of a record of one's own team."""
        record = await asyncio.to_thread(self._store.get, request.trial_id)
        if record is None:
            raise NotFoundError(f"there is no record {request.trial_id[:64]}; see: tuner-client query --ids")
        name = f"record {record.trial_id[:12]}"
        self._authenticator.check_owner(context.invocation_metadata(), record.team, name, request.team)
        tags: dict[str, str | None] = {**dict.fromkeys(request.remove), **request.set}
        record = await asyncio.to_thread(self._store.tag, record.trial_id, tags)
        return records_pb2.TagRecordResponse(record=wire.record_to_message(record))

    @mapped
    async def GetStats(self, request: records_pb2.GetStatsRequest, context: Any) -> records_pb2.GetStatsResponse:
        """Counts, as JSON."""
        return records_pb2.GetStatsResponse(stats_json=json.dumps(await asyncio.to_thread(self._store.stats)))

    @mapped
    async def PruneRecords(
        self, request: records_pb2.PruneRecordsRequest, context: Any
    ) -> records_pb2.PruneRecordsResponse:
        """Delete by retention; with tokens, only records of one's own team."""
        if not request.HasField("older_than"):
            raise UsageError("prune needs a time")
        team = self._authenticator.owner(context.invocation_metadata(), request.team)
        deleted = await asyncio.to_thread(
            self._store.prune, wire.seconds(request.older_than), team, dry_run=request.dry_run
        )
        return records_pb2.PruneRecordsResponse(deleted=deleted)
