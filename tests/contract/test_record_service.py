"""What only the service promises, over every backend: whole queries and commits as streams, and teams."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.conftest import BACKENDS, serving
from tests.contract.record_values import make_record, make_workload
from tuner_core.errors import AuthenticationError, NotFoundError, PermissionDeniedError, UsageError
from tuner_core.model import FailureKind
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.remote import RemoteStore
from tuner_core.transport.channel import open_channel
from tuner_core.transport.options import ConnectionOptions

MATMUL = make_workload("matmul 64x64x64")
CONV = make_workload("conv 3x3", op="conv2d")
TOKENS = {"vision-token-0123456789": "vision", "speech-token-0123456789": "speech"}

Connect = Callable[[str], RemoteStore]


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordStore]:
    """An empty store of each kind in turn, in process."""
    with BACKENDS[request.param](tmp_path) as store:
        yield store


@contextlib.contextmanager
def connecting(store: RecordStore, tokens: dict[str, str] | None) -> Iterator[Connect]:
    """Clients of a server: with tokens, by team; without, those that say their team."""
    by_team = {team: token for token, team in (tokens or {}).items()}
    with serving(store, tokens) as address, contextlib.ExitStack() as stack:

        def connect(team: str) -> RemoteStore:
            channel = open_channel(ConnectionOptions(address, token=by_team.get(team)))
            stack.callback(channel.close)
            return RemoteStore(channel, timeout_s=30, team="" if tokens else team)

        yield connect


@pytest.fixture
def teams(backend: RecordStore) -> Iterator[Connect]:
    """Clients of a server with tokens."""
    with connecting(backend, TOKENS) as connect:
        yield connect


@pytest.fixture
def open_server(backend: RecordStore) -> Iterator[Connect]:
    """Clients of a server without tokens."""
    with connecting(backend, None) as connect:
        yield connect


class TestStreams:
    def test_a_stream_is_the_whole_query_in_its_order_however_long(
        self, backend: RecordStore, open_server: Connect
    ) -> None:
        records = [make_record(MATMUL, number) for number in range(1_203)]
        backend.commit([*records, make_record(CONV, 1)], [MATMUL, CONV])
        client = open_server("")
        assert list(client.stream(RecordFilter(op="dense"))) == records
        newest = client.stream(RecordFilter(op="dense"), order="newest", limit=700)
        assert list(newest) == records[:502:-1]
        assert list(client.stream(RecordFilter(), top_per_key=1, limit=500)) == [records[0], make_record(CONV, 1)]
        bare = next(client.stream(RecordFilter(), with_traces=False))
        assert bare == dataclasses.replace(records[0], trace="")
        assert list(client.stream(RecordFilter(team="nobody"))) == []

    def test_a_stream_shows_what_stood_at_its_beginning(self, backend: RecordStore, open_server: Connect) -> None:
        records = [make_record(MATMUL, number) for number in range(1_100)]
        backend.commit(records, [MATMUL])
        stream = open_server("").stream(RecordFilter())
        found = list(itertools.islice(stream, 1))
        backend.commit([make_record(MATMUL, number, median_us=1e6) for number in range(2_000, 2_010)])
        assert found + list(stream) == records

    def test_a_bad_stream_is_a_usage_error(self, open_server: Connect) -> None:
        for arguments in ({"order": "random"}, {"limit": 0}, {"top_per_key": -1}):
            with pytest.raises(UsageError):
                next(open_server("").stream(RecordFilter(), **arguments))  # type: ignore[arg-type]

    def test_an_endless_follower_gets_records_as_they_come_and_goes_on_after_a_break(
        self, backend: RecordStore, open_server: Connect
    ) -> None:
        backend.commit([], [MATMUL])
        client = open_server("")
        where = RecordFilter(include_failed=True)
        following = client.following(where)
        begun = next(following)
        assert begun.records == ()
        records = [make_record(MATMUL, number) for number in range(1_500)]
        writing = threading.Thread(target=backend.commit, args=(records,))
        writing.start()
        first = next(following)
        assert 0 < len(first.records) < 1_500
        following.close()  # the connection is lost: what was on its way is not counted as seen
        writing.join()
        failed = make_record(MATMUL, 2_000, failure=FailureKind.RUN_ERROR)
        backend.commit([failed])
        seen = list(first.records)
        for followed in client.following(where, first.cursor, with_traces=False):
            seen += followed.records
            if len(seen) == 1_501:
                break
        ids = [record.trial_id for record in seen]
        assert len(set(ids)) == 1_501
        assert ids[-1] == failed.trial_id
        assert seen[-1].trace == ""

    def test_many_idle_followers_leave_other_calls_alone(self, backend: RecordStore, open_server: Connect) -> None:
        backend.commit([make_record(MATMUL, 1)], [MATMUL])
        followers = [open_server("").following(RecordFilter()) for _ in range(40)]
        for follower in followers:
            next(follower)
        done: list[int] = []
        client = open_server("")
        calling = threading.Thread(
            target=lambda: done.extend(len(client.query(RecordFilter()).records) for _ in range(40)), daemon=True
        )
        calling.start()
        calling.join(20)  # it takes half a second; behind followers that hold a thread each, minutes
        assert done == [1] * 40
        backend.commit([make_record(MATMUL, 2)])
        assert [len(next(follower).records) for follower in followers] == [1] * 40
        for follower in followers:
            follower.close()


class TestTeams:
    def test_what_a_client_commits_belongs_to_its_tokens_team_and_keeps_its_instance(self, teams: Connect) -> None:
        record = make_record(MATMUL, 1, team="", instance="host-far-away")
        own = make_record(MATMUL, 2, team="speech", instance="host-far-away")
        teams("speech").commit([record, own], [MATMUL])
        for trial_id in (record.trial_id, own.trial_id):
            found = teams("vision").get(trial_id)
            assert found is not None
            assert (found.team, found.instance) == ("speech", "host-far-away")

    def test_every_team_reads_everything(self, teams: Connect) -> None:
        teams("vision").commit([make_record(MATMUL, 1)], [MATMUL])
        teams("speech").commit([make_record(MATMUL, 2, team="speech")])
        for team in ("vision", "speech"):
            assert len(teams(team).query(RecordFilter()).records) == 2
            assert len(list(teams(team).stream(RecordFilter(team="vision")))) == 1

    def test_nobody_commits_deletes_or_tags_for_another_team(self, backend: RecordStore, teams: Connect) -> None:
        theirs = [make_record(MATMUL, number, created_at=100.0) for number in range(3)]
        teams("vision").commit(theirs, [MATMUL])
        speech = teams("speech")
        attempts: list[Callable[[], object]] = [
            lambda: speech.commit([make_record(MATMUL, 7, team="speech"), make_record(MATMUL, 8, team="vision")]),
            lambda: speech.prune(200.0, "vision"),
            lambda: speech.prune(200.0, "vision", dry_run=True),
            lambda: speech.tag(theirs[0].trial_id, {"best": "no"}),
        ]
        for attempt in attempts:
            with pytest.raises(PermissionDeniedError, match="vision") as caught:
                attempt()
            assert "speech" in str(caught.value)
            assert "\n" not in str(caught.value)
        assert [record.trial_id for record in backend.query(RecordFilter()).records] == [r.trial_id for r in theirs]
        assert backend.get(theirs[0].trial_id) == theirs[0]

    def test_retention_without_a_team_is_that_of_the_tokens_team(self, backend: RecordStore, teams: Connect) -> None:
        for at, team in ((0, "vision"), (10, "speech")):
            records = [make_record(MATMUL, at + number, team=team, created_at=100.0) for number in range(3)]
            teams(team).commit(records, [MATMUL])
        assert teams("speech").prune(200.0, dry_run=True) == 3
        assert teams("speech").prune(200.0) == 3
        assert {record.team for record in backend.query(RecordFilter()).records} == {"vision"}

    def test_a_team_tags_its_own(self, teams: Connect) -> None:
        record = make_record(MATMUL, 1, team="speech", tags={})
        teams("speech").commit([record], [MATMUL])
        assert teams("speech").tag(record.trial_id, {"release": "1.0"}).tags == {"release": "1.0"}
        with pytest.raises(NotFoundError, match="no record"):
            teams("speech").tag("0" * 64, {"release": "1.0"})

    def test_streams_need_a_token_too(self, teams: Connect) -> None:
        with pytest.raises(AuthenticationError, match="token"):
            next(teams("nobody").stream(RecordFilter()))
        with pytest.raises(AuthenticationError, match="token"):
            next(teams("nobody").following(RecordFilter()))

    def test_on_an_open_server_the_client_says_its_team(self, backend: RecordStore, open_server: Connect) -> None:
        theirs = [make_record(MATMUL, number, created_at=100.0) for number in range(3)]
        nobodys = make_record(MATMUL, 20, team="")
        open_server("vision").commit([*theirs, nobodys], [MATMUL])
        assert [backend.get(record.trial_id) for record in theirs] == theirs
        with pytest.raises(PermissionDeniedError, match="belongs to team vision"):
            open_server("speech").tag(theirs[0].trial_id, {"a": "b"})
        assert open_server("speech").tag(nobodys.trial_id, {"a": "b"}).tags["a"] == "b"
        assert open_server("vision").tag(theirs[0].trial_id, {"a": "b"}).tags["a"] == "b"
        assert open_server("").tag(theirs[0].trial_id, {"a": None}).tags == {"branch": "main"}
        assert open_server("speech").prune(200.0) == 0
        assert open_server("").prune(200.0) == 2
