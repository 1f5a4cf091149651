"""A server with partitions of different sizes, as a process: two jobs at once, a third one waiting, all told apart."""

from __future__ import annotations

import json
import time
from pathlib import Path

import grpc
import pytest

from tests.integration.client_process import client
from tests.integration.test_server_lifecycle import CORES, job_status, server
from tests.integration.tiny_models import write_tiny_cnn
from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2, tuning_pb2_grpc
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store

TRIALS = 20


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_50_percent_job_and_a_25_percent_job_run_side_by_side_while_one_for_100_percent_waits(tmp_path: Path) -> None:
    data_dir, model = tmp_path / "server", tmp_path / "tiny.onnx"
    write_tiny_cnn(model)
    config = tmp_path / "server.yaml"
    cores = ",".join(map(str, CORES[:2]))
    config.write_text(f"devices:\n- device: cpu:{cores}\n  partitions: [50, 25]\n")
    with server(data_dir, "--config", str(config)) as running, grpc.insecure_channel(running.address) as channel:

        def tune(share: int) -> str:
            run = client(
                *("tune", str(model), "--server", running.address, "--sm-percent", str(share)),
                *("--trials", str(TRIALS), "--refresh", "--detach", "--json"),
                data_dir=tmp_path,
            )
            assert run.returncode == 0, run.stderr
            return str(json.loads(run.stdout)["job"])

        half, quarter = tune(50), tune(25)
        whole = tune(100)
        at_once = False
        deadline = time.monotonic() + 150
        while not at_once:
            assert time.monotonic() < deadline, running.log.read_text()
            both = [job_status(running.address, job) for job in (half, quarter)]
            assert not any(JobState(status.status).ended for status in both), "one ended before the other began"
            at_once = all(status.status == "running" and status.trials_measured for status in both)
            time.sleep(0.05)
        waiting = job_status(running.address, whole)
        assert (waiting.status, waiting.phase) == ("queued", "waiting for partitions of 100 %")

        listed = client("servers", "--server", running.address, "--json", data_dir=tmp_path)
        (host,) = json.loads(listed.stdout)["servers"]
        (device,) = host["devices"]
        assert (device["name"], device["shares"], device["present_shares"]) == (f"cpu:{cores}", [50, 25], [50, 25])
        assert [(w["sm_percent"], w["sm_count_seen"], w["device_uuid"]) for w in host["workers"]] == [
            (50, 1, f"cpu:{cores}"),
            (25, 1, f"cpu:{cores}"),
        ]
        shown = client("servers", "--server", running.address, data_dir=tmp_path)
        assert "partitions: 50 + 25 %" in shown.stdout

        stub = tuning_pb2_grpc.TuningServiceStub(channel)
        assert stub.CancelJob(tuning_pb2.CancelJobRequest(job=whole), timeout=10).status.status == "cancelled"
        for job, share in ((half, 50), (quarter, 25)):
            while not JobState((status := job_status(running.address, job)).status).ended:
                assert time.monotonic() < deadline, running.log.read_text()
                time.sleep(0.2)
            assert (status.status, status.sm_percent, status.sm_count) == ("done", share, 1), status
            assert list(status.device_uuids) == [f"cpu:{cores}"]
        watched = client("watch", half, "--server", running.address, "--json", data_dir=tmp_path)
        assert json.loads(watched.stdout)["devices"] == [f"cpu:{cores}"]

    store = open_store(f"sqlite:///{data_dir / 'records.sqlite'}")
    for job, share in ((half, 50), (quarter, 25)):
        records = store.query(RecordFilter(job=job, include_failed=True), limit=1000).records
        assert {(record.sm_percent, record.sm_count) for record in records} == {(share, 1)}
        assert any(record.verified and record.neighbours == 0 for record in records)
        assert any(record.neighbours == 1 for record in records), "its neighbour was never at work"
    store.close()
