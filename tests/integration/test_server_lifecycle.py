"""The server as a process: partitions of the CPU, graceful stop, sudden death, and jobs that go on afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.integration.client_process import client, environment
from tests.integration.server_process import ServerProcess, server
from tests.integration.tiny_models import write_tiny_cnn
from tuner_core.proto.tuner.v1 import host_pb2, host_pb2_grpc, tuning_pb2, tuning_pb2_grpc
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store

TRIALS = 40
CORES = sorted(os.sched_getaffinity(0))


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def job_status(address: str, job: str) -> tuning_pb2.JobStatus:
    with grpc.insecure_channel(address) as channel:
        stub = tuning_pb2_grpc.TuningServiceStub(channel)
        return stub.GetJob(tuning_pb2.GetJobRequest(job=job), timeout=10).status


def wait_for_trials(running: ServerProcess, job: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while job_status(running.address, job).trials_measured < count:
        assert time.monotonic() < deadline, running.log.read_text()
        assert job_status(running.address, job).status in ("queued", "running"), running.log.read_text()
        time.sleep(0.1)


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_job_on_two_half_cpus_survives_sigterm_and_sigkill_of_its_server(tmp_path: Path) -> None:
    data_dir, model = tmp_path / "server", tmp_path / "tiny.onnx"
    write_tiny_cnn(model)
    with server(data_dir, "--sm-percent", "50", "--workers", "2") as first:
        with grpc.insecure_channel(first.address) as channel:
            host = host_pb2_grpc.HostServiceStub(channel).GetHost(host_pb2.GetHostRequest(), timeout=60)
            pinned = [tuple(worker.affinity) for worker in host.workers]
            assert len(pinned) == 2 and not set(pinned[0]) & set(pinned[1])
            assert all(worker.sm_count_seen == len(worker.affinity) for worker in host.workers)
            for worker in host.workers:
                assert os.sched_getaffinity(worker.pid) == set(worker.affinity)

            run = client(
                *("tune", str(model), "--server", first.address, "--sm-percent", "50"),
                *("--trials", str(TRIALS), "--detach", "--json"),
                data_dir=tmp_path,
            )
            assert run.returncode == 0, run.stderr
            job = json.loads(run.stdout)["job"]
            wait_for_trials(first, job, 4)

            statuses: list[int] = []
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
            statuses.append(next(watch).status)
            listener = threading.Thread(target=lambda: statuses.extend(_until_cut(watch)))
            listener.start()
            family = first.family()
            assert len(family) >= 4  # prefork, two workers, search or build
            assert first.stop(signal.SIGTERM) == 0, first.log.read_text()
            listener.join(10)
        serving = health_pb2.HealthCheckResponse.ServingStatus
        assert statuses[:2] == [serving.SERVING, serving.NOT_SERVING]
        assert gone(family), "a process outlived its server"

    measured = _measured(data_dir, job)
    assert measured >= 4
    with server(data_dir, "--sm-percent", "50", "--workers", "2") as second:
        wait_for_trials(second, job, measured + 4)  # it went on by itself
        family = second.family()
        assert second.stop(signal.SIGKILL) == -signal.SIGKILL
        assert gone(family), "a process outlived its killed server"

    assert _measured(data_dir, job) >= measured + 4
    with server(data_dir, "--sm-percent", "50", "--workers", "2") as third:
        run = client("watch", job, "--server", third.address, "--json", data_dir=tmp_path, timeout_s=180)
        document = json.loads(run.stdout)
        assert (run.returncode, document["status"]) == (0, "done"), run.stderr
        assert document["trials"]["measured"] == TRIALS  # none was measured twice
        assert document["sm_count"] == len(CORES) // 2

    assert _measured(data_dir, job) == TRIALS
    store = open_store(f"sqlite:///{data_dir / 'records.sqlite'}")
    records = store.query(RecordFilter(job=job), limit=1000).records
    store.close()
    assert {record.sm_count for record in records} == {len(CORES) // 2}
    assert {record.affinity for record in records} == set(pinned)
    assert max(record.neighbours for record in records) == 1  # two ran side by side
    assert all(record.neighbours == 0 for record in records if record.verified)  # alone
    assert any(record.verified for record in records)


def _until_cut(watch: Iterator[health_pb2.HealthCheckResponse]) -> list[int]:
    seen = []
    with contextlib.suppress(grpc.RpcError):
        for response in watch:
            seen.append(response.status)
    return seen


def _measured(data_dir: Path, job: str) -> int:
    """Search trials of a job in the store."""
    store = open_store(f"sqlite:///{data_dir / 'records.sqlite'}")
    records = store.query(RecordFilter(job=job, include_failed=True), limit=1000).records
    store.close()
    return len({record.trial_id for record in records if not record.verified and record.origin == "search"})


def refused(data_dir: Path, *options: str, lazy: bool = True) -> tuple[int, str]:
    """Exit code and standard error of a server that must not start."""
    data_dir.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-m", "tuner_server", "--data-dir", str(data_dir), *(["--lazy"] * lazy), *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return run.returncode, run.stderr.strip().splitlines()[-1]


def test_a_server_that_cannot_start_says_so_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, line = refused(tmp_path / "a", "--listen", address)
        assert code == 1 and line.startswith(f"error: cannot listen on {address}")

    newer = tmp_path / "newer.sqlite"
    with contextlib.closing(sqlite3.connect(newer)) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("PRAGMA user_version=999")
    code, line = refused(tmp_path / "a", "--listen", "127.0.0.1:0", "--store", f"sqlite:///{newer}")
    assert code == 1 and line.startswith("error:") and "newer" in line

    (tmp_path / "file").touch()
    code, line = refused(tmp_path / "a", "--store", f"sqlite:///{tmp_path / 'file' / 'r.sqlite'}")
    assert code == 1 and line.startswith("error:")

    code, line = refused(tmp_path / "a", "--listen", "0.0.0.0:50061")
    assert code == 2 and "--tls-cert" in line

    config = tmp_path / "server.yaml"
    config.write_text("sm_procent: 25\n")
    code, line = refused(tmp_path / "a", "--config", str(config))
    assert code == 2 and "sm_procent" in line

    code, line = refused(tmp_path / "a", "--device", "cuda:0", lazy=False)
    assert code == 1 and "no GPU" in line


def test_two_servers_do_not_share_a_data_directory_and_the_client_finds_the_one_that_runs(tmp_path: Path) -> None:
    with server(tmp_path / "d", "--lazy", "--reflection") as running:
        code, line = refused(tmp_path / "d", "--listen", "127.0.0.1:0")
        assert code == 1 and str(running.process.pid) in line and running.address in line
        run = client("stats", "--json", data_dir=tmp_path / "d")
        assert run.returncode == 0 and json.loads(run.stdout)["records"] == 0

        with grpc.insecure_channel(running.address) as channel:
            offered = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {"tuner.v1.TuningService", "tuner.v1.RecordService", "tuner.v1.HostService"} <= offered


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"listen: 0.0.0.0:1\ndata-dir: {tmp_path / 'from_file'}\n")
    run = [sys.executable, "-m", "tuner_server", "--config", str(config), "--lazy", "--debug"]
    from_file = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=60)
    assert "0.0.0.0:1 is reachable" in from_file.stderr
    env = environment() | {"TUNER_LISTEN": "0.0.0.0:2"}
    from_env = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60)
    assert "0.0.0.0:2 is reachable" in from_env.stderr
    from_flag = subprocess.run([*run, "--listen", "0.0.0.0:3"], env=env, capture_output=True, text=True, timeout=60)
    assert "0.0.0.0:3 is reachable" in from_flag.stderr


@pytest.mark.parametrize("trials", [0, 10_000_000])
def test_absurd_trials_are_refused_by_the_server_too(tmp_path: Path, trials: int) -> None:
    with server(tmp_path / "d", "--lazy") as running, grpc.insecure_channel(running.address) as channel:
        spec = tuning_pb2.JobSpec(model="m", sm_percent=100, trials=trials)
        with pytest.raises(grpc.RpcError) as refusal:
            tuning_pb2_grpc.TuningServiceStub(channel).SubmitJob(tuning_pb2.SubmitJobRequest(spec=spec), timeout=30)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(trials) in refusal.value.details()


def test_check_measures_once_and_says_what_is_there(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tuner_server", "--data-dir", str(tmp_path), "check", "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    findings = {finding["what"]: finding["text"] for finding in json.loads(run.stdout)["findings"]}
    assert {"store", "tvm", "device", "partitions", "worker 0", "measurement"} <= set(findings)
    assert " us (" in findings["measurement"]
