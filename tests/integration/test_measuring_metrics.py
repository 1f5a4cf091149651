"""A server's own account of lost workers and of pauses, through the command."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.client_process import client, wait_for
from tests.integration.test_server_lifecycle import CORES, server
from tests.integration.tiny_models import write_tiny_cnn


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_killed_worker_and_the_pauses_of_a_job_are_counted(tmp_path: Path) -> None:
    model = tmp_path / "tiny.onnx"
    write_tiny_cnn(model)
    options = ("--device", "cpu:" + ",".join(map(str, CORES[:2])), "--sm-percent", "50", "--workers", "2")
    with server(tmp_path / "server", *options) as running:

        def host() -> dict[str, Any]:
            listed = client("servers", "--server", running.address, "--json", data_dir=tmp_path)
            (found,) = json.loads(listed.stdout)["servers"]
            return dict(found)

        before = host()
        assert before["devices"][0]["measuring"]["faults"] == {}
        os.kill(before["workers"][0]["pid"], signal.SIGKILL)
        wait_for(lambda: host()["devices"][0]["measuring"]["recoveries"]["count"] == 1)
        tuned = client(
            *("tune", str(model), "--server", running.address, "--trials", "16", "--json"),
            data_dir=tmp_path,
            timeout_s=120,
        )
        assert tuned.returncode == 0, tuned.stderr
        measuring = host()["devices"][0]["measuring"]
        assert measuring["faults"] == {"worker_lost": 1}
        assert measuring["worker_restarts"] == 1
        pauses = measuring["pauses"]
        assert pauses["count"] >= 2, "a promotion, and the whole model"
        assert 0 < pauses["longest_s"] <= pauses["total_s"]
        shown = client("servers", "--server", running.address, data_dir=tmp_path).stdout
        assert "faults: worker_lost 1; 1 worker restarted" in " ".join(shown.split())
