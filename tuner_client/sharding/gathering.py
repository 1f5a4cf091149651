"""Every record of a sharded job in one store: followed from each instance, and brought to whoever needs it next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from urllib.parse import parse_qs, urlsplit

from tuner_client.sharding.link import InstanceLink
from tuner_core.errors import PermissionDeniedError
from tuner_core.model import Record, RecordKey, Workload
from tuner_core.proto.tuner.v1 import records_pb2
from tuner_core.store import wire
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import REDIS_SCHEMES
from tuner_core.transport.options import is_loopback, split_address

_COMMIT_TIMEOUT_S = 30.0
_COMMIT_RECORDS = 500
_FETCHED_AT_ONCE = 8


def store_identity(url: str, default_scheme: str = "") -> tuple[str, ...]:
    """What tells shared stores apart: places, database and prefix, not how one connects to them.

    Args:
        url: Of the store; a server leaves out what is before the password's end.
        default_scheme: For such a one.

    Returns:
        Nothing for a store that is not shared.
    """
    parts = urlsplit(url if "://" in url else f"{default_scheme}://{url}")
    if parts.scheme not in REDIS_SCHEMES:
        return ()
    from tuner_core.store.redis.location import DEFAULT_PREFIX

    kind = parts.scheme.partition("+")[2]
    port = "26379" if kind == "sentinel" else "6379"
    places = [place if ":" in place else f"{place}:{port}" for place in parts.netloc.rpartition("@")[2].split(",")]
    places = [f"127.0.0.1:{place.rpartition(':')[2]}" if _is_local(place) else place for place in places]
    prefix = parse_qs(parts.query).get("prefix", [DEFAULT_PREFIX])[0]
    return (kind, *sorted(places), parts.path.strip("/") or "0", prefix)


def _seen_from(address: str, identity: tuple[str, ...]) -> tuple[str, ...]:
    """A Redis at a loopback address is that of the host which says so."""
    if not any(_is_local(part) for part in identity if ":" in part):
        return identity
    host = split_address(address)[0]
    return (*identity, "here" if is_loopback(host) else host)


def _is_local(place: str) -> bool:
    return is_loopback(place.rpartition(":")[0].strip("[]"))


class Gatherer:
    """Keeps the client's store complete while a job runs.

    Args:
        store: Where the records go.
        store_url: Its URL: instances that use the same shared store need no copying.
        job: The job.
        say: Takes a line for people.
    """

    def __init__(
        self, store: RecordStore, store_url: str, job: str, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._store = store
        self._scheme = urlsplit(store_url).scheme
        self._shared = store_identity(store_url)
        self._say = say
        self._sharing: dict[tuple[str, str], bool] = {}
        self._filter = records_pb2.RecordFilter(job=job, include_failed=True)
        self._have: set[str] = set()
        self._arrived = asyncio.Event()

    @property
    def gathered(self) -> int:
        """Records that came from instances, or were here before."""
        return len(self._have)

    def shares_store(self, link: InstanceLink) -> bool:
        """Whether the instance writes into the client's own store; says so when it is found out."""
        if not self._shared or link.facts is None:
            return False
        place = (link.address, link.facts.store)
        if place not in self._sharing:
            self._sharing[place] = self._is_own(link.address, link.facts.store)
            if self._sharing[place]:
                self._say(f"{link.address} writes into the same store as this client: its records are not copied")
        return self._sharing[place]

    def _is_own(self, address: str, store_url: str) -> bool:
        here = _seen_from("127.0.0.1:1", self._shared)
        return _seen_from(address, store_identity(store_url, self._scheme)) == here

    def store_of(self, link: InstanceLink) -> tuple[str, ...]:
        """What tells the instance's store apart from those of the others."""
        assert link.facts is not None
        identity = store_identity(link.facts.store, self._scheme)
        return _seen_from(link.address, identity) if identity else (link.address,)

    def told(self, link: InstanceLink, trial_id: str) -> None:
        """An instance has stored a record: where it writes into our own store, there is nothing to wait for."""
        if trial_id and self.shares_store(link):
            self._have.add(trial_id)

    def missing(self, trial_ids: Iterable[str]) -> list[str]:
        """Those that have not been gathered."""
        return [trial_id for trial_id in trial_ids if trial_id not in self._have]

    def note(self, records: Iterable[Record]) -> None:
        """These are in the store already."""
        self._have.update(record.trial_id for record in records)

    async def follow(self, link: InstanceLink) -> None:
        """Copy the job's records from an instance: those that are there, then as they come. Ends by cancellation.

        Raises:
            TunerError: The instance went away.
        """
        if self.shares_store(link):
            return
        await self.catch_up(link)
        request = records_pb2.FollowRecordsRequest(filter=self._filter, after=link.cursor or "")
        async for response in link.connection.stream(link.records.FollowRecords, request):
            await self._take(link, response.records)
            link.cursor = response.cursor

    async def catch_up(self, link: InstanceLink) -> None:
        """Copy what an instance has of the job, unless that was done before.

        Raises:
            TunerError: The instance went away.
        """
        if link.cursor is not None or self.shares_store(link):
            return
        # First a place to go on from, then what is before it: nothing falls between the two, and some comes twice.
        cursor = ""
        first = records_pb2.FollowRecordsRequest(filter=self._filter, wait_s=0.0)
        async for response in link.connection.stream(link.records.FollowRecords, first):
            cursor = response.cursor
            break
        before = records_pb2.StreamRecordsRequest(filter=self._filter, order="newest")
        async for page in link.connection.stream(link.records.StreamRecords, before):
            await self._take(link, page.records)
        link.cursor = cursor

    async def rest(self, link: InstanceLink) -> None:
        """Copy what an instance that takes no part any more has of the job, as far as it was not copied yet.

        Raises:
            TunerError: The instance went away, or answers no more.
        """
        if self.shares_store(link):
            return
        await self.catch_up(link)
        found = True
        while found:
            request = records_pb2.FollowRecordsRequest(filter=self._filter, after=link.cursor or "", wait_s=0.0)
            found = False
            async for response in link.connection.stream(link.records.FollowRecords, request):
                await self._take(link, response.records)
                link.cursor, found = response.cursor, bool(response.records)

    async def fetch(self, link: InstanceLink, key: RecordKey, most: int) -> None:
        """Copy what an instance knows of a task from any job: the published best, and the best trials.

        Args:
            link: The instance.
            key: Of the task.
            most: Trials that are enough; verified and untuned ones, which there are few of, come on top of them.

        Raises:
            TunerError: The instance went away.
        """
        if self.shares_store(link):
            return
        where = wire.filter_to_message(RecordFilter.of_key(key))
        request = records_pb2.StreamRecordsRequest(filter=where, order="latency", limit=2 * most + 16)
        more = ""
        async for page in link.connection.stream(link.records.StreamRecords, request):
            await self._take(link, page.records)
            more = page.cursor
        if more:  # the published best may be slower, as measured alone, than all of these
            top = records_pb2.TopRecordsRequest(key=wire.key_to_message(key), limit=1, verified_only=True)
            await self._take(link, (await link.connection.call(link.records.TopRecords, top)).records)

    async def fetch_all(self, link: InstanceLink, keys: Collection[RecordKey], most: int) -> None:
        """The same of several tasks, some of them at a time.

        Raises:
            TunerError: The instance went away.
        """
        turns = asyncio.Semaphore(_FETCHED_AT_ONCE)

        async def fetch(key: RecordKey) -> None:
            async with turns:
                await self.fetch(link, key, most)

        for outcome in await asyncio.gather(*map(fetch, keys), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _take(self, link: InstanceLink, messages: Collection[records_pb2.Record]) -> None:
        link.holds.update(message.trial_id for message in messages)
        fresh = [message for message in messages if message.trial_id not in self._have]
        if not fresh:
            return

        def commit() -> None:
            self._store.commit([wire.record_from_message(message) for message in fresh])

        await asyncio.to_thread(commit)
        self._have.update(message.trial_id for message in fresh)
        self._arrived.set()

    async def settled(self, trial_ids: Collection[str], timeout_s: float) -> bool:
        """Wait until these have been gathered; whether that was so in time."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.missing(trial_ids):
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                return False
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left_s)
            except TimeoutError:
                return not self.missing(trial_ids)
        return True

    async def bring(self, link: InstanceLink, records: Collection[Record], workloads: Collection[Workload]) -> None:
        """Commit records to an instance that does not have them.

        Raises:
            TunerError: It cannot be reached, or refuses.
        """
        if self.shares_store(link):
            return
        wanted = [record for record in records if record.trial_id not in link.holds]
        for start in range(0, len(wanted), _COMMIT_RECORDS):
            part = wanted[start : start + _COMMIT_RECORDS]
            request = records_pb2.CommitRecordsRequest(
                workloads=[wire.workload_to_message(workload) for workload in workloads],
                records=[wire.record_to_message(record) for record in part],
            )
            try:
                await link.connection.call(link.records.CommitRecords, request, _COMMIT_TIMEOUT_S)
            except PermissionDeniedError:  # our token there is of another team than who measured them
                for message in request.records:
                    message.team = ""  # what is committed becomes the token's team's
                await link.connection.call(link.records.CommitRecords, request, _COMMIT_TIMEOUT_S)
            link.holds.update(record.trial_id for record in part)
