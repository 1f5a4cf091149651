"""Two teams shard the same model at once, over servers that share a Redis: every operator is tuned once."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration.replay_fleet import FACTS, Fleet, Script, fleet, records_of
from tests.redis_server import DURABLE, RedisServer
from tests.redis_server import running as running_redis
from tests.replay_server import replay_spec
from tuner_client.job import JobReport
from tuner_client.sharding import gathering
from tuner_core.model import Origin, TaskState
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store

TRIALS, TASKS = 160, 4
TTL_S = 2.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis", *DURABLE) as found:
        yield found


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as found:
        yield found


def jobs_of_workloads(url: str) -> dict[str, set[str]]:
    """Which jobs measured search trials of an operator."""
    store = open_store(url)
    records = store.query(RecordFilter(include_failed=True), limit=10_000).records
    store.close()
    jobs: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.origin is Origin.SEARCH and not record.verified:
            jobs[record.workload_digest].add(record.job)
    return jobs


def test_every_operator_is_tuned_by_one_of_two_jobs_and_both_get_it_though_a_lease_moves(
    redis: RedisServer, servers: Fleet
) -> None:
    first, both, second = (servers.add(store=redis.url, trial_s=0.1) for _ in range(3))
    scripts = [Script((10, lambda: first.signal(signal.SIGKILL))), Script()]  # what it held moves within its job
    places = [[first, both], [both, second]]

    def tune(number: int) -> JobReport:
        tuner = servers.tuner(scripts[number], servers=places[number], client=f"client{number}")
        return tuner.drive(replay_spec(TASKS, TRIALS), FACTS)

    with ThreadPoolExecutor(2) as clients:
        reports = list(clients.map(tune, range(2)))
    assert [report.status for report in reports] == ["done", "done"], [report.error for report in reports]
    jobs = jobs_of_workloads(redis.url)
    assert len(jobs) == TASKS and all(len(of_one) == 1 for of_one in jobs.values()), jobs
    assert any(script.said("tunes operators of this model at this moment") for script in scripts)
    for one, other in zip(reports[0].tasks, reports[1].tasks, strict=True):
        states = {one.state, other.state}
        assert TaskState.REUSED in states and len(states) == 2  # one of them tuned it
        assert one.best_trial_id == other.best_trial_id != "" and one.best_latency_us == other.best_latency_us
        taken = one if one.state is TaskState.REUSED else other
        assert (taken.trials, taken.verified) == (0, True) and taken.reused > 0 and taken.baseline_latency_us
    assert all(report.measured <= TRIALS for report in reports) and any(report.measured < TRIALS for report in reports)
    for number, report in enumerate(reports):  # and build finds everything in its own client's store
        gathered = {
            record.trial_id for record in records_of(f"sqlite:///{servers.folder}/client{number}/records.sqlite", "")
        }
        assert {task.best_trial_id for task in report.tasks} <= gathered


def test_a_job_whose_holder_dies_goes_on_from_its_records_and_a_third_finds_everything_done(
    redis: RedisServer, servers: Fleet
) -> None:
    doomed = servers.add(store=redis.url, claim_ttl_s=TTL_S, trial_s=0.5)
    other = servers.add(store=redis.url, claim_ttl_s=TTL_S)
    waiting = Script()

    def wait_for_it() -> JobReport:
        tuner = servers.tuner(waiting, servers=[other], client="waiting")
        return tuner.drive(replay_spec(1, 80), FACTS)

    with ThreadPoolExecutor(1) as clients:
        begun = []

        def begin_second() -> None:
            begun.append(clients.submit(wait_for_it))

        class KillWhenAwaited(Script):
            def job(self, report: JobReport, message: str = "") -> None:
                super().job(report, message)
                if waiting.said("tunes operators of this model"):
                    doomed.signal(signal.SIGKILL)

        script = KillWhenAwaited((8, begin_second))
        given_up = servers.tuner(script, servers=[doomed], client="dying", wait_s=0).drive(replay_spec(1, 80), FACTS)
        assert given_up.status == "partly" and 8 <= given_up.measured < 80
        taken_over = begun[0].result(60)
    (task,) = taken_over.tasks
    assert (taken_over.status, task.state, task.verified) == ("done", TaskState.TUNED, True)
    assert waiting.said(f"{given_up.job} tunes operators of this model")
    assert waiting.said(f"{given_up.job} left it without a result; it is tuned here")

    third = servers.tuner(Script(), servers=[other], client="third").drive(replay_spec(1, 80), FACTS)
    (task,) = third.tasks
    assert (third.status, third.measured, task.state) == ("done", 0, TaskState.REUSED)
    assert task.best_trial_id == taken_over.tasks[0].best_trial_id


def test_records_of_instances_on_the_client_s_own_redis_are_neither_copied_nor_waited_for(
    redis: RedisServer, servers: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = servers.add(store=redis.url), servers.add(store=f"redis://localhost:{redis.port}")  # it is the same

    def copied(*_: object) -> None:
        raise AssertionError("a record travelled between a server and the client")

    monkeypatch.setattr(gathering.wire, "record_from_message", copied)
    monkeypatch.setattr(gathering.wire, "record_to_message", copied)
    waited: list[list[str]] = []
    settled = gathering.Gatherer.settled

    async def watched(self: gathering.Gatherer, trial_ids: Collection[str], timeout_s: float) -> bool:
        waited.append(self.missing(trial_ids))
        return await settled(self, trial_ids, timeout_s)

    monkeypatch.setattr(gathering.Gatherer, "settled", watched)
    script = Script((20, lambda: first.signal(signal.SIGKILL)))  # its task moves, and its records are there
    report = servers.tuner(script, store=redis.url).drive(replay_spec(3, 96), FACTS)
    assert (report.status, report.measured) == ("done", 96), report.error
    said = [note for note in script.notes if "writes into the same store as this client" in note]
    assert sorted(said) == sorted(
        f"{server.address} writes into the same store as this client: its records are not copied"
        for server in servers.servers
    )
    assert waited and not any(waited)
    assert not script.said("are not gathered")
    assert not (servers.client_folder / "records.sqlite").exists()
    stored = {record.trial_id for record in records_of(redis.url, report.job)}
    assert {task.best_trial_id for task in report.tasks} <= stored and len(stored) > 96


def test_a_redis_at_a_loopback_address_is_our_own_only_on_our_own_host() -> None:
    same = gathering.store_identity
    assert same("redis://user:secret@store:6379/0?timeout_s=9") == same("store/0", "redis") == same("rediss://store")
    assert same("redis://store/1") != same("redis://store/0") != same("redis://store/0?prefix=other")
    assert same("redis+cluster://b:1,a:1") == same("redis+cluster://a:1,b:1") != same("redis://a:1")
    assert same("sqlite:////var/records.sqlite") == ()
    own = gathering.Gatherer(None, "redis://localhost:6379", "job-1")  # type: ignore[arg-type]
    for address, shares in (("127.0.0.1:50061", True), ("[::1]:50061", True), ("gpu1:50061", False)):
        link = SimpleNamespace(address=address, facts=SimpleNamespace(store="redis://127.0.0.1:6379/0"))
        assert own.shares_store(link) is shares  # type: ignore[arg-type]
