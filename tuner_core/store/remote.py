"""A record store on the other side of a gRPC channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc

from tuner_core.errors import StoreError, UnavailableError, UsageError
from tuner_core.model import Record, RecordKey, Workload
from tuner_core.proto.tuner.v1 import records_pb2, records_pb2_grpc
from tuner_core.store import wire
from tuner_core.store.interface import CommitResult, Followed, Page, RecordFilter, RecordStore
from tuner_core.store.paging import MAX_LIMIT, check_follow, check_query
from tuner_core.store.validation import check_figures, check_tags, check_workload
from tuner_core.transport.channel import call, stream

_MESSAGE_BYTES = 16 << 20


class RemoteStore(RecordStore):
    """RecordStore over RecordService.

    Args:
        channel: An open channel; it stays the caller's, :meth:`close` leaves it open.
        timeout_s: Deadline of each call.
        address: Where the channel leads, for the text of errors.
        team: For which team one tags and prunes on a server without tokens; empty: nobody in particular.

    Raises (any method, besides the interface's):
        UnavailableError: The server cannot be reached.
        DeadlineError: No answer within ``timeout_s``.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        timeout_s: float = 60.0,
        address: str = "the given address",
        team: str = "",
    ) -> None:
        self._stub = records_pb2_grpc.RecordServiceStub(channel)
        self._timeout_s = timeout_s
        self._address = address
        self._team = team
        self._closed = False

    def commit(self, records: Sequence[Record], workloads: Iterable[Workload] = ()) -> CommitResult:
        """See :meth:`RecordStore.commit`. More than 16 MiB goes in several calls, each stored as a whole."""
        workloads = list(workloads)
        for workload in workloads:
            check_workload(workload)
        for record in records:
            check_figures(record)  # the server checks the rest
        stored = known = 0
        for request in _requests(records, workloads):
            response = self._call(self._stub.CommitRecords, request)
            stored += response.stored
            known += response.known
        return CommitResult(stored, known)

    def get(self, trial_id: str) -> Record | None:
        """See :meth:`RecordStore.get`."""
        response = self._call(self._stub.GetRecord, records_pb2.GetRecordRequest(trial_id=trial_id))
        return wire.record_from_message(response.record) if response.HasField("record") else None

    def get_workload(self, digest: str) -> Workload | None:
        """See :meth:`RecordStore.get_workload`."""
        response = self._call(self._stub.GetWorkload, records_pb2.GetWorkloadRequest(digest=digest))
        return wire.workload_from_message(response.workload) if response.HasField("workload") else None

    def top(self, key: RecordKey, limit: int = 1, *, verified_only: bool = False) -> list[Record]:
        """See :meth:`RecordStore.top`."""
        request = records_pb2.TopRecordsRequest(key=wire.key_to_message(key), limit=limit, verified_only=verified_only)
        return [wire.record_from_message(m) for m in self._call(self._stub.TopRecords, request).records]

    def query(
        self,
        where: RecordFilter,
        *,
        limit: int = 100,
        cursor: str | None = None,
        order: str = "latency",
        top_per_key: int = 0,
    ) -> Page:
        """See :meth:`RecordStore.query`. A page that the server cuts into messages is put together here."""
        check_query(where, limit, cursor, order, top_per_key)
        records: list[Record] = []
        while True:
            request = records_pb2.QueryRecordsRequest(
                filter=wire.filter_to_message(where),
                limit=min(limit - len(records), MAX_LIMIT),
                cursor=cursor or "",
                order=order,
                top_per_key=top_per_key,
            )
            response = self._call(self._stub.QueryRecords, request)
            records += [wire.record_from_message(message) for message in response.records]
            cursor = response.next_cursor or None
            if cursor is None or len(records) >= limit:
                return Page(tuple(records), cursor)

    def stream(
        self,
        where: RecordFilter,
        *,
        order: str = "latency",
        top_per_key: int = 0,
        limit: int | None = None,
        with_traces: bool = True,
    ) -> Iterator[Record]:
        """All records that match, as they stood at the beginning, in one call; closing the iterator ends it.

        Args:
            where, order, top_per_key: As for :meth:`query`.
            limit: At most so many; None: all.
            with_traces: Without, records come with an empty trace, and faster.
        """
        check_query(where, 1, None, order, top_per_key)
        if limit is not None and limit < 1:
            raise UsageError(f"limit {limit} is not positive")
        request = records_pb2.StreamRecordsRequest(
            filter=wire.filter_to_message(where),
            order=order,
            top_per_key=top_per_key,
            limit=limit or 0,
            omit_traces=not with_traces,
        )
        for response in self._stream(self._stub.StreamRecords, request):
            for message in response.records:
                yield wire.record_from_message(message)

    def follow(
        self, where: RecordFilter, after: str | None = None, *, limit: int = 1_000, wait_s: float = 0.0
    ) -> Followed:
        """See :meth:`RecordStore.follow`."""
        check_follow(where, limit)
        request = records_pb2.FollowRecordsRequest(
            filter=wire.filter_to_message(where), after=after or "", limit=limit, wait_s=max(0.0, wait_s)
        )
        for response in self._stream(self._stub.FollowRecords, request, self._timeout_s + wait_s):
            return _followed(response)
        raise UnavailableError(f"the server at {self._address} ended the call")

    def following(
        self, where: RecordFilter, after: str | None = None, *, with_traces: bool = True
    ) -> Iterator[Followed]:
        """:meth:`follow` without an end, in one call: an answer whenever there are records, and an empty one at once.

        Args:
            where, after: As for :meth:`follow`.
            with_traces: Without, records come with an empty trace.
        """
        check_follow(where, 1)
        request = records_pb2.FollowRecordsRequest(
            filter=wire.filter_to_message(where), after=after or "", omit_traces=not with_traces
        )
        yield from map(_followed, self._stream(self._stub.FollowRecords, request))

    def tag(self, trial_id: str, tags: Mapping[str, str | None]) -> Record:
        """See :meth:`RecordStore.tag`.

        Raises:
            PermissionDeniedError: The record is another team's.
        """
        check_tags(tags)
        request = records_pb2.TagRecordRequest(
            trial_id=trial_id,
            set={name: value for name, value in tags.items() if value is not None},
            remove=[name for name, value in tags.items() if value is None],
            team=self._team,
        )
        return wire.record_from_message(self._call(self._stub.TagRecord, request).record)

    def stats(self) -> dict[str, Any]:
        """See :meth:`RecordStore.stats`."""
        found: dict[str, Any] = json.loads(self._call(self._stub.GetStats, records_pb2.GetStatsRequest()).stats_json)
        return found

    def prune(self, older_than: float, team: str = "", *, dry_run: bool = False) -> int:
        """See :meth:`RecordStore.prune`. Where tokens say whose records they are, only one's own are deleted."""
        request = records_pb2.PruneRecordsRequest(
            older_than=wire.timestamp(older_than), team=team or self._team, dry_run=dry_run
        )
        return int(self._call(self._stub.PruneRecords, request).deleted)

    def close(self) -> None:
        """See :meth:`RecordStore.close`."""
        self._closed = True

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        if self._closed:
            raise StoreError("the connection to the store is closed")
        return call(method, request, address=self._address, timeout_s=self._timeout_s)

    def _stream(self, method: Callable[..., Any], request: Any, timeout_s: float | None = None) -> Iterator[Any]:
        if self._closed:
            raise StoreError("the connection to the store is closed")
        return stream(method, request, address=self._address, timeout_s=timeout_s)


def _followed(message: records_pb2.FollowRecordsResponse) -> Followed:
    return Followed(tuple(wire.record_from_message(record) for record in message.records), message.cursor)


def _requests(records: Sequence[Record], workloads: Sequence[Workload]) -> Iterator[records_pb2.CommitRecordsRequest]:
    """Workloads first, then records, in requests of a bounded size."""
    request = records_pb2.CommitRecordsRequest()
    size = 0
    for workload in workloads:
        if size > _MESSAGE_BYTES:
            yield request
            request, size = records_pb2.CommitRecordsRequest(), 0
        workload_message = wire.workload_to_message(workload)
        request.workloads.append(workload_message)
        size += workload_message.ByteSize()
    for record in records:
        if size > _MESSAGE_BYTES:
            yield request
            request, size = records_pb2.CommitRecordsRequest(), 0
        record_message = wire.record_to_message(record)
        request.records.append(record_message)
        size += record_message.ByteSize()
    if size:
        yield request
