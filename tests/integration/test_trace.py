"""``tuner-server --trace``: every stage of a job is in the file, also when the server was killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.integration.client_process import client
from tests.integration.server_process import server
from tests.integration.tiny_models import write_tiny_cnn


def test_a_killed_servers_trace_shows_every_stage_of_its_job(tmp_path: Path) -> None:
    model, trace = tmp_path / "tiny.onnx", tmp_path / "run.trace.json"
    write_tiny_cnn(model)
    with server(tmp_path / "server", "--trace", str(trace)) as running:
        done = client(
            *("tune", str(model), "--server", running.address, "--trials", "12", "--json"),
            data_dir=tmp_path,
            timeout_s=240,
        )
        assert done.returncode == 0, done.stderr
        running.stop(signal.SIGKILL)
    events = json.loads(trace.read_text())
    stages = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    slices = [event for event in events if event["ph"] == "X"]
    assert {stages[event["pid"]] for event in slices} >= {"search", "build", "measure", "promotion", "commit"}
    report = json.loads(done.stdout)
    builds = [event for event in slices if event["name"] == "build"]
    assert len(builds) >= report["trials"]["measured"]
    assert {event["args"]["task"] for event in builds} <= {task["description"] for task in report["tasks"]}
    assert sum(event["args"]["cpu_s"] for event in builds) > 0
    measured = [event for event in slices if event["name"] == "measure" and "device_s" in event["args"]]
    assert len(measured) >= report["trials"]["measured"]
    times = [(1e6 * event["args"]["device_s"], event["dur"]) for event in measured]
    odd = [(ran_us, lasted_us) for ran_us, lasted_us in times if not 0 < ran_us <= lasted_us]
    assert not odd
    by_worker: dict[int, float] = {}
    for event in sorted(slices, key=lambda event: float(event["ts"])):
        if event["name"] in ("build", "generate", "measure"):
            assert event["ts"] >= by_worker.get(event["tid"], 0.0)  # one after the other
            by_worker[event["tid"]] = event["ts"] + event["dur"]
    assert {event["name"] for event in events if event["ph"] == "C"} == {
        "waiting to be built",
        "waiting to be measured",
    }
