"""A whole job on a GPU, through ``tuner-server`` and ``tuner-client``, while everything under it is killed."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.client_process import client
from tests.integration.process_state import gone, wait_until
from tests.integration.test_server_lifecycle import ServerProcess, job_status, server
from tests.integration.tiny_models import write_tiny_cnn
from tuner_core.model import JobState, Origin, Record
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store
from tuner_server.gpu.mps import CONTROL, pipe_directory_for
from tuner_server.gpu.mps_processes import MpsProcess, find_mps_processes

TRIALS = 240
_IMPLAUSIBLE = 0.4  # of the best latency that was measured alone: a kernel that did not run looks that fast


def host(running: ServerProcess, folder: Path) -> dict[str, Any]:
    """What ``tuner-client servers`` says."""
    listed = client("servers", "--server", running.address, "--json", data_dir=folder)
    assert listed.returncode == 0, listed.stderr
    (found,) = json.loads(listed.stdout)["servers"]
    return dict(found)


def mps_processes(data_dir: Path) -> list[MpsProcess]:
    """Those of a server with that data directory."""
    return [
        process
        for directory in (data_dir / "mps").glob("*")
        for process in find_mps_processes(pipe_directory_for(directory), CONTROL)
    ]


def kill_worker(running: ServerProcess, folder: Path) -> None:
    """SIGKILL of a worker, in the middle of a measurement if one is seen in a few looks."""
    for _ in range(5):
        workers = host(running, folder)["workers"]
        busy = [worker["pid"] for worker in workers if worker["state"] == "measuring"]
        if busy:
            break
    os.kill(busy[0] if busy else workers[0]["pid"], signal.SIGKILL)


def kill_mps(control: bool) -> Callable[[ServerProcess, Path], None]:
    """SIGKILL of the control daemon, or of the MPS server."""

    def kill(_running: ServerProcess, folder: Path) -> None:
        found = [process for process in mps_processes(folder / "server") if process.is_control is control]
        assert found, "no such process"
        for process in found:
            process.signal(signal.SIGKILL)

    return kill


def job_under_fire(folder: Path, options: tuple[str, ...], shots: list[Callable[[ServerProcess, Path], None]]) -> None:
    """Tune a small model, fire one shot every so many trials, and look at what is left of it."""
    model, data_dir = folder / "tiny.onnx", folder / "server"
    write_tiny_cnn(model)
    with server(data_dir, *options) as running:
        share = options[options.index("--sm-percent") + 1]
        run = client(
            *("tune", str(model), "--server", running.address, "--sm-percent", share, "--trials", str(TRIALS)),
            *("--detach", "--json"),
            data_dir=folder,
            timeout_s=120,
        )
        assert run.returncode == 0, run.stderr
        job = json.loads(run.stdout)["job"]
        deadline = time.monotonic() + 280
        wanted = [TRIALS * (number + 1) // (len(shots) + 2) for number in range(len(shots))]
        while not JobState((status := job_status(running.address, job)).status).ended:
            assert time.monotonic() < deadline, running.log.read_text()[-3000:]
            if wanted and status.trials_measured >= wanted[0]:
                wanted.pop(0)
                shots.pop(0)(running, folder)
            time.sleep(0.05)
        assert not shots, f"the job was over too soon: {status}"
        assert status.status == "done", f"{status}\n{running.log.read_text()[-3000:]}"
        (device,) = host(running, folder)["devices"]
        print(json.dumps(device["measuring"], indent=1))  # pytest -rP shows it
        assert sum(device["measuring"]["faults"].values()) >= 1
        assert device["measuring"]["recoveries"]["longest_s"] <= 15
        assert device["measuring"]["pauses"]["count"] >= 1
        assert running.stop(signal.SIGTERM) == 0
        assert mps_processes(data_dir) == [], "the server has gone in good order, MPS has not"

    store = open_store(f"sqlite:///{data_dir / 'records.sqlite'}")
    try:
        records = store.query(RecordFilter(job=job, include_failed=True), limit=1000).records
    finally:
        store.close()
    assert records
    no_timing_is_poisoned(records)
    lost = [record for record in records if record.failure == "worker_lost"]
    assert not lost, f"{len(lost)} innocent trials were not measured again: {lost[0].failure_message}"


def no_timing_is_poisoned(records: list[Record] | tuple[Record, ...]) -> None:
    """Every timing is one of a kernel that ran: none far below the best that was measured alone and found right.

    Operators that are not worth trials have nothing but the timing of their fallback schedule.
    """
    searched = {record.workload_digest for record in records if record.origin is Origin.SEARCH}
    assert searched
    for workload in {record.workload_digest for record in records}:
        timed = [record for record in records if record.workload_digest == workload and record.median_us is not None]
        alone = [record.median_us for record in timed if record.verified and record.median_us is not None]
        assert alone or workload not in searched, f"nothing was verified: {timed}"
        for record in timed:
            assert record.median_us is not None and math.isfinite(record.median_us)
            assert min(record.latencies_us) > _IMPLAUSIBLE * min(alone, default=0.0), record


def test_a_job_completes_while_a_worker_the_mps_server_and_the_daemon_are_killed(
    short_dir: Path, four_quarters: tuple[str, ...]
) -> None:
    folder = short_dir / "job"
    folder.mkdir()
    job_under_fire(folder, four_quarters, [kill_worker, kill_mps(control=False), kill_mps(control=True)])


def test_the_next_start_clears_away_what_a_killed_server_left(short_dir: Path, four_quarters: tuple[str, ...]) -> None:
    folder = short_dir / "left"
    folder.mkdir()
    data_dir = folder / "server"
    with server(data_dir, *four_quarters) as first:
        workers = [worker["pid"] for worker in host(first, folder)["workers"]]
        assert len(workers) == 4
        first.process.kill()
        first.process.wait()
        left = mps_processes(data_dir)
        assert left, "the daemon should outlive its server: there is nothing to clear away"
        assert wait_until(lambda: all(gone(pid) for pid in workers)), "workers outlive their server"
    with server(data_dir, *four_quarters) as second:
        assert [worker["state"] for worker in host(second, folder)["workers"]] == ["idle"] * 4
        assert not any(process.alive() for process in left)
        assert second.stop(signal.SIGTERM) == 0
    assert mps_processes(data_dir) == []
