"""The client with its embedded server: one command on an empty data directory, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.integration.client_process import client, start_client, wait_for
from tests.integration.tiny_models import write_open_shape, write_tiny_cnn
from tuner_core.datadir import read_holder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_job_survives_the_death_of_its_local_server_and_ctrl_c_and_resumes(tmp_path: Path) -> None:
    model = tmp_path / "tiny.onnx"
    write_tiny_cnn(model)
    process = start_client("tune", str(model), "--trials", "48", "--refresh", data_dir=tmp_path)
    assert process.stdout is not None
    lines: list[str] = []

    def read_until(pattern: str) -> re.Match[str]:
        assert process.stdout is not None
        while line := process.stdout.readline():
            lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(lines) + (process.stderr.read() if process.stderr else ""))

    job = read_until(r"(job-\w+) · .* 48 trials").group(1)
    read_until(r"\d+/48 trials")
    first = read_holder(tmp_path)
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    read_until(r"was killed by SIGKILL.*starting it again")
    wait_for(lambda: (holder := read_holder(tmp_path)) is not None and holder.pid != first.pid)
    second = read_holder(tmp_path)
    assert second is not None

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert f"go on with: tuner-client resume {job}" in out
    assert "Traceback" not in out + err
    assert not _alive(second.pid)

    stored = json.loads(client("stats", "--json", data_dir=tmp_path).stdout)["records"]
    assert stored >= 1
    run = client("resume", job, "--json", data_dir=tmp_path, timeout_s=180)
    document = json.loads(run.stdout)
    assert run.returncode == 0, run.stderr
    assert document["status"] == "done"
    assert document["job"] == job
    # 48 in all: what was measured before the death and the interruption was not measured again
    assert document["trials"]["measured"] == 48


@pytest.mark.parametrize("kind", ["truncated", "open"])
def test_a_bad_model_is_one_line_before_any_server_starts(tmp_path: Path, kind: str) -> None:
    model = tmp_path / "bad.onnx"
    write_tiny_cnn(model)
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    if kind == "open":
        write_open_shape(model)
    run = client("tune", str(model), "--json", data_dir=tmp_path)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.stderr
    assert "Traceback" not in run.stderr
    if kind == "open":
        assert "--input-shape x=" in errors[0]
    assert run.returncode in (1, 2)
    assert json.loads(run.stdout)["status"] == "failed"
    assert not (tmp_path / "server.lock").exists()  # no server was started for it
