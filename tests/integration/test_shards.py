"""One server's part of a sharded job, over gRPC: leases, their ends, and what survives the server."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.client_process import client
from tests.integration.server_process import ServerProcess, server
from tests.integration.small_workloads import matmul, model_json
from tuner_core.proto.tuner.v1 import (
    host_pb2,
    host_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    tuning_pb2,
    tuning_pb2_grpc,
)
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store
from tuner_core.store.wire import workload_to_message

TOKENS = {"red": "red-token-0123456789", "blue": "blue-token-0123456789"}


@pytest.fixture(scope="module")
def spec() -> tuning_pb2.JobSpec:
    """A model of two tasks, of which it calls one twice."""
    module, _ = model_json()
    job = tuning_pb2.JobSpec(
        model="tiny", sm_percent=100, trials=200, lifted_module_zlib=zlib.compress(module.encode()), seed=3
    )
    job.evaluator.number, job.evaluator.repeat, job.evaluator.min_repeat_ms = 1, 2, 0
    for name, size, weight in (("mm", 64, 2), ("small", 32, 1)):
        job.tasks.add(name=name, workload=workload_to_message(matmul(size)), weight=weight, tunable=True)
    return job


class Shard:
    """A client of one shard, with the events that it was sent."""

    def __init__(self, address: str, job: str, team: str = "") -> None:
        self.job = job
        self._metadata = (("authorization", f"Bearer {TOKENS[team]}"),) if team else ()
        self._channel = grpc.insecure_channel(address)
        self._stub = leases_pb2_grpc.LeaseServiceStub(self._channel)
        self.incarnation = ""
        self.events: list[leases_pb2.WatchShardResponse] = []
        self.heartbeats: list[leases_pb2.ShardHeartbeat] = []
        self.end: grpc.StatusCode | None = None
        self._news: queue.Queue[None] = queue.Queue()
        self._listener: threading.Thread | None = None

    def close_channel(self) -> None:
        self._channel.close()
        if self._listener is not None:
            self._listener.join(10)

    def open(self, spec: tuning_pb2.JobSpec, lease_s: float = 60.0) -> leases_pb2.OpenShardResponse:
        return self._call("OpenShard", leases_pb2.OpenShardRequest(job=self.job, spec=spec, lease_s=lease_s))

    def grant(self, task: str, token: int, trials: int, *, conclude: bool = False) -> None:
        lease = leases_pb2.Lease(task=task, token=token, trials=trials, conclude=conclude)
        self._call("GrantLease", leases_pb2.GrantLeaseRequest(job=self.job, lease=lease))

    def renew(self, *leases: tuple[str, int]) -> leases_pb2.RenewLeasesResponse:
        request = leases_pb2.RenewLeasesRequest(
            job=self.job, tasks=[task for task, _ in leases], tokens=[token for _, token in leases]
        )
        return self._call("RenewLeases", request)

    def renew_until(self, condition: Callable[[], bool], *leases: tuple[str, int]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            self.renew(*leases)
            time.sleep(0.2)
            assert time.monotonic() < deadline, self.events[-3:]

    def revoke(self, task: str, token: int) -> None:
        self._call("RevokeLease", leases_pb2.RevokeLeaseRequest(job=self.job, task=task, token=token))

    def measure_model(self, **trial_ids: str) -> leases_pb2.MeasureModelResponse:
        return self._call("MeasureModel", leases_pb2.MeasureModelRequest(job=self.job, trial_ids=trial_ids))

    def close(self) -> None:
        self._call("CloseShard", leases_pb2.CloseShardRequest(job=self.job))

    def _call(self, name: str, request: object):  # type: ignore[no-untyped-def]
        return getattr(self._stub, name)(request, timeout=120, metadata=self._metadata)

    def watch(self, after: int = 0, incarnation: str = "", heartbeat_s: float = 0.2) -> None:
        request = leases_pb2.WatchShardRequest(
            job=self.job, after_sequence=after, heartbeat_s=heartbeat_s, incarnation=incarnation
        )
        stream = self._stub.WatchShard(request, metadata=self._metadata)
        self._listener = threading.Thread(target=self._listen, args=(stream,), daemon=True)
        self._listener.start()
        self.wait(lambda: bool(self.heartbeats) or self.end is not None)

    def _listen(self, stream: Iterator[leases_pb2.WatchShardResponse]) -> None:
        try:
            for response in stream:
                self.incarnation = response.incarnation
                if response.HasField("heartbeat"):
                    self.heartbeats.append(response.heartbeat)
                else:
                    self.events.append(response)
                self._news.put(None)
            self.end = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.end = error.code()
        self._news.put(None)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            with contextlib.suppress(queue.Empty):
                self._news.get(timeout=0.5)
            assert time.monotonic() < deadline, self.events[-3:]

    def ended(self, task: str, token: int) -> leases_pb2.LeaseEnded:
        """Wait for the end of a lease."""
        found: list[leases_pb2.LeaseEnded] = []

        def look() -> bool:
            ends = [event.ended for event in list(self.events) if event.HasField("ended")]
            found.extend(end for end in ends if (end.task, end.token) == (task, token))
            return bool(found) or self.end is not None

        self.wait(look)
        assert found, f"the stream ended with {self.end}"
        return found[0]

    def trials(self, task: str, token: int) -> list[leases_pb2.TrialFinished]:
        told = [event.trial for event in list(self.events) if event.HasField("trial")]
        return [trial for trial in told if (trial.task, trial.token) == (task, token)]


@contextlib.contextmanager
def shard(address: str, job: str, team: str = "") -> Iterator[Shard]:
    one = Shard(address, job, team)
    try:
        yield one
    finally:
        one.close_channel()


@contextlib.contextmanager
def refused(code: grpc.StatusCode, text: str = "") -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as refusal:
        yield
    assert refusal.value.code() is code, refusal.value
    assert text in refusal.value.details()


def stored(data_dir: Path, job: str) -> dict[str, bool]:
    """Trials of a job in a server's store: trial id to whether it is one of the search."""
    store = open_store(f"sqlite:///{data_dir / 'records.sqlite'}")
    records = store.query(RecordFilter(job=job, include_failed=True), limit=1000).records
    store.close()
    return {record.trial_id: record.origin == "search" and not record.verified for record in records}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("shards")
    tokens = folder / "tokens"
    tokens.write_text("".join(f"{token} {team}\n" for team, token in TOKENS.items()))
    with server(folder / "server", "--token-file", str(tokens)) as started:
        yield started


def test_a_shard_from_its_opening_to_its_close(running: ServerProcess, spec: tuning_pb2.JobSpec) -> None:
    with shard(running.address, "job-whole", "red") as one:
        opened = one.open(spec)
        assert opened.workers >= 1 and opened.batch >= 1 and not opened.draining
        assert one.open(spec).incarnation == opened.incarnation  # a repeat finds it as it is
        one.watch()
        assert one.incarnation == opened.incarnation
        assert one.heartbeats[0].doing == "no lease here now"

        one.grant("mm", 1, 12)
        one.wait(lambda: len(one.trials("mm", 1)) >= 2)
        one.grant("mm", 1, 20)  # extended while it runs
        end = one.ended("mm", 1)
        assert (end.reason, end.measured) == ("measured", 20), end
        assert len({trial.trial_id for trial in one.trials("mm", 1)}) == 20
        sequences = [event.sequence for event in one.events]
        assert sequences == list(range(1, len(sequences) + 1))
        (baseline,) = [event.baseline for event in one.events if event.HasField("baseline")]
        assert baseline.latency_us > 0 and baseline.trial_id

        one.grant("mm", 2, 0, conclude=True)
        best = one.ended("mm", 2)
        assert (best.reason, best.verified) == ("concluded", True), best
        assert 0 < best.best_latency_us <= best.baseline_latency_us  # both measured again, alone

        chosen = {} if best.fallback else {"mm": best.best_trial_id}
        model = one.measure_model(**chosen)
        assert model.error == "" and model.outputs_match
        assert model.baseline_latency_us > 0 and model.tuned_latency_us > 0
        with refused(grpc.StatusCode.NOT_FOUND, "feed"):
            one.measure_model(mm="feed")

        again = Shard(running.address, one.job, "red")  # as after a broken connection
        again.watch(after=sequences[-1] + 1, incarnation=one.incarnation)
        again.wait(lambda: len(again.events) == len(one.events) - len(sequences) - 1)
        assert [event.sequence for event in again.events] == [
            event.sequence for event in one.events if event.sequence > sequences[-1] + 1
        ]
        one.close()
        one.close()
        one.wait(lambda: one.end is not None)
        assert one.end is grpc.StatusCode.OK
        again.close_channel()
        with refused(grpc.StatusCode.NOT_FOUND):
            one.grant("mm", 3, 4)
    of_search = [trial for trial, searched in stored(running.log.parent, "job-whole").items() if searched]
    assert len(of_search) == 20 and set(of_search) == {trial.trial_id for trial in one.trials("mm", 1)}


def test_a_lease_that_is_not_renewed_expires_and_the_next_one_starts_warm(
    running: ServerProcess, spec: tuning_pb2.JobSpec
) -> None:
    with shard(running.address, "job-expiring", "red") as one:
        one.open(spec, lease_s=2.0)
        one.watch()
        one.grant("small", 7, 5000)
        one.renew_until(lambda: len(one.trials("small", 7)) >= 1, ("small", 7))
        end = one.ended("small", 7)
        assert end.reason == "expired" and end.measured == len(one.trials("small", 7)) > 0
        for token in (6, 7):
            with refused(grpc.StatusCode.FAILED_PRECONDITION):
                one.grant("small", token, 5000)
        assert list(one.renew(("small", 3), ("nothing", 1)).lost) == ["small", "nothing"]
        one.grant("small", 8, 6)
        one.renew_until(lambda: len(one.trials("small", 8)) == 6, ("small", 8))
        assert one.ended("small", 8).measured == 6
        old = {trial.trial_id for trial in one.trials("small", 7)}
        assert not old & {trial.trial_id for trial in one.trials("small", 8)}
        one.close()


def test_other_teams_bad_requests_and_cancelled_jobs_are_refused(
    running: ServerProcess, spec: tuning_pb2.JobSpec, tmp_path: Path
) -> None:
    with shard(running.address, "job-red", "red") as red, shard(running.address, "job-red", "blue") as blue:
        with refused(grpc.StatusCode.NOT_FOUND):
            red.grant("mm", 1, 4)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "lease_s"):
            red.open(spec, lease_s=0)
        red.open(spec)
        red.watch()
        for call in (lambda: blue.open(spec), lambda: blue.grant("mm", 1, 4), blue.close, blue.renew):
            with refused(grpc.StatusCode.PERMISSION_DENIED):
                call()
        other = tuning_pb2.JobSpec()
        other.CopyFrom(spec)
        other.tasks[1].name = "another"
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "other tasks"):
            red.open(other)
        with refused(grpc.StatusCode.NOT_FOUND, "no task"):
            red.grant("another", 1, 4)
        red.grant("mm", 1, 400)
        run = client("cancel", "job-red", "--server", running.address, data_dir=tmp_path, TUNER_TOKEN=TOKENS["red"])
        assert run.returncode == 0, run.stderr
        red.wait(lambda: red.end is not None)
        assert red.end is grpc.StatusCode.FAILED_PRECONDITION
        assert red.ended("mm", 1).reason == "revoked"
        for call in (lambda: red.open(spec), lambda: red.grant("mm", 2, 4)):
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "cancelled"):
                call()
        with grpc.insecure_channel(running.address) as channel:
            jobs = tuning_pb2_grpc.TuningServiceStub(channel)
            metadata = (("authorization", f"Bearer {TOKENS['red']}"),)
            jobs.ResumeJob(tuning_pb2.ResumeJobRequest(job="job-red"), metadata=metadata, timeout=30)
        red.open(spec)
        red.close()


def test_an_ordinary_job_waits_for_the_leases_and_runs_when_the_shard_has_none(
    running: ServerProcess, spec: tuning_pb2.JobSpec
) -> None:
    metadata = (("authorization", f"Bearer {TOKENS['red']}"),)
    with shard(running.address, "job-first", "red") as one, grpc.insecure_channel(running.address) as channel:
        jobs = tuning_pb2_grpc.TuningServiceStub(channel)
        one.open(spec)
        one.watch()
        one.grant("mm", 1, 24)
        one.wait(lambda: len(one.trials("mm", 1)) >= 1)
        ordinary = tuning_pb2.JobSpec()
        ordinary.CopyFrom(spec)
        ordinary.trials, ordinary.refresh = 8, True
        del ordinary.tasks[1:]
        job = jobs.SubmitJob(tuning_pb2.SubmitJobRequest(spec=ordinary), metadata=metadata, timeout=60).job
        states: list[tuple[str, bool]] = []
        for response in jobs.WatchJob(tuning_pb2.WatchJobRequest(job=job), metadata=metadata, timeout=120):
            ended = any(event.HasField("ended") for event in one.events)
            states.append((response.status.status, ended))
        assert states[0][0] == "queued" and states[-1][0] == "done", states[-1]
        assert all(ended for state, ended in states if state == "running")
        listed = jobs.ListJobs(tuning_pb2.ListJobsRequest(), metadata=metadata, timeout=60).jobs
        (status,) = [status for status in listed if status.job == "job-first"]
        assert (status.status, status.trials_measured, status.phase) == ("running", 24, "no lease here now")
        one.close()


def test_records_and_tokens_survive_sigkill_and_sigterm_and_a_drained_server_takes_no_leases(
    tmp_path: Path, spec: tuning_pb2.JobSpec
) -> None:
    data_dir, told = tmp_path / "server", set()
    with server(data_dir) as first, shard(first.address, "job-1") as one:
        one.open(spec)
        one.watch()
        one.grant("small", 4, 5000)
        one.wait(lambda: len(one.trials("small", 4)) >= 2)
        first.stop(signal.SIGKILL)
        one.wait(lambda: one.end is not None)
        assert one.end is grpc.StatusCode.UNAVAILABLE
        told |= {trial.trial_id for trial in one.trials("small", 4)}
    assert told <= set(stored(data_dir, "job-1"))

    with server(data_dir) as second, shard(second.address, "job-1") as two:
        two.watch(after=len(one.events), incarnation=one.incarnation)  # it is known without being opened
        assert two.incarnation not in ("", one.incarnation) and two.events == []
        assert list(two.renew(("small", 4)).lost) == ["small"]
        with refused(grpc.StatusCode.FAILED_PRECONDITION):
            two.grant("small", 4, 5000)
        two.grant("small", 5, 5000)
        two.wait(lambda: len(two.trials("small", 5)) >= 2)
        assert two.events[0].sequence == 1
        assert second.stop(signal.SIGTERM) == 0
        two.wait(lambda: two.end is not None)
        assert two.end is grpc.StatusCode.UNAVAILABLE
        end = two.ended("small", 5)
        fresh = {trial.trial_id for trial in two.trials("small", 5)}
        assert end.reason == "draining" and end.measured == len(fresh) and not fresh & told
    assert told | fresh <= set(stored(data_dir, "job-1"))

    with server(data_dir) as third, shard(third.address, "job-1") as three:
        three.open(spec)
        with grpc.insecure_channel(third.address) as channel:
            jobs = tuning_pb2_grpc.TuningServiceStub(channel)
            status = jobs.GetJob(tuning_pb2.GetJobRequest(job="job-1"), timeout=30).status
        assert status.trials_measured >= len(fresh)  # by this instance, lives before included
        three.watch()
        three.grant("small", 6, 5000)
        three.wait(lambda: len(three.trials("small", 6)) >= 1)
        run = client("drain", "--server", third.address, "--json", data_dir=tmp_path)
        assert run.returncode == 0 and "job-1" in run.stdout
        end = three.ended("small", 6)
        assert end.reason == "draining" and end.measured == len(three.trials("small", 6)) < 5000
        three.heartbeats.clear()
        three.wait(lambda: any(beat.draining for beat in three.heartbeats))
        assert three.renew().draining and three.open(spec).draining
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "draining"):
            three.grant("small", 7, 4)
        with shard(third.address, "job-2") as new, refused(grpc.StatusCode.FAILED_PRECONDITION, "draining"):
            new.open(spec)
        with grpc.insecure_channel(third.address) as channel:
            host = host_pb2_grpc.HostServiceStub(channel).GetHost(host_pb2.GetHostRequest(), timeout=60)
        assert host.draining and list(host.running_jobs) == []
