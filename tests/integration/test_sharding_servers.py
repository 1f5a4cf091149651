"""One job over two real servers: real search, builds and measurements."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.client_process import start_client, wait_for
from tests.integration.replay_fleet import records_of
from tests.integration.test_cli_server import running_server
from tests.integration.tiny_models import write_tiny_cnn
from tuner_client.sharding.journal import sharded_jobs
from tuner_client.sharding.tuning import default_store

TRIALS = 40


@pytest.mark.slow
def test_a_killed_server_s_task_goes_on_at_the_other_and_the_model_is_built_from_gathered_records(
    tmp_path: Path,
) -> None:
    model, output, data = tmp_path / "tiny.onnx", tmp_path / "tiny.so", tmp_path / "client"
    write_tiny_cnn(model)
    data.mkdir()
    with running_server(tmp_path / "one") as (first, one), running_server(tmp_path / "two") as (second, two):
        command = ("tune", str(model), "--trials", str(TRIALS), "--server", one, "--server", two)
        client = start_client(*command, "--heartbeat-s", "5", "-o", str(output), "--json", data_dir=data)
        try:
            wait_for(lambda: any(job.measured >= 8 for job in sharded_jobs(data)), timeout_s=120)
            (job,) = sharded_jobs(data)
            busy = max(job.instances, key=lambda entry: entry.trials).address
            os.kill((first if busy == one else second).pid, signal.SIGKILL)
            printed, said = client.communicate(timeout=240)
        finally:
            client.kill()
            client.wait()
    assert client.returncode == 0, said
    document = json.loads(printed)
    assert document["status"] == "done"
    assert document["trials"]["measured"] == TRIALS
    (conv,) = (task for task in document["tasks"] if task["trials"])
    assert set(conv["trials_by_instance"]) == {one, two}  # each measured a part of the one operator worth tuning
    assert conv["verified"] is True
    assert document["outputs_match"] is True
    states = {entry["address"]: entry["state"] for entry in document["instances"]}
    assert states[busy] == "dead"
    assert document["coverage"]["missing"] == [] and output.stat().st_size > 0
    gathered = {record.trial_id for record in records_of(default_store(data), document["job"])}
    assert conv["trial_id"] in gathered
    assert len(gathered) > TRIALS
