"""A sharded job as a user leads it: tune, jobs, watch, cancel and resume, with TLS and a token for each server."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.client_process import client, client_on_terminal, start_client, wait_for
from tests.integration.replay_fleet import Fleet, fleet
from tests.integration.test_server_trust import certificate
from tests.integration.tiny_models import write_tiny_cnn
from tuner_client.job import JobReport
from tuner_client.sharding.journal import sharded_job, sharded_jobs

TOKENS = {"red": "red-token-0123456789", "blue": "blue-token-0123456789"}


def measured(folder: Path, more_than: int) -> bool:
    return any(job.measured > more_than for job in sharded_jobs(folder))


@pytest.fixture
def servers(tmp_path: Path) -> Fleet:
    with fleet(tmp_path) as found:
        cert, key = certificate(tmp_path)
        for team, token in TOKENS.items():
            (tmp_path / team).write_text(token)
            found.add(tls_cert=str(cert), tls_key=str(key), tokens={token: team}, trial_s=0.5)
        yield found


def flags(servers: Fleet) -> list[str]:
    """Trust in the common certificate, and for each server the token of the team that we are there."""
    found = ["--tls-ca", str(servers.folder / "cert.pem")]
    for server, team in zip(servers.servers, TOKENS, strict=True):
        found += ["--token-file", f"{server.address}={servers.folder / team}"]
    return found


def addresses(servers: Fleet) -> list[str]:
    return [word for server in servers.servers for word in ("--server", server.address)]


def end(process: subprocess.Popen[str]) -> tuple[int, dict[str, object], str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, json.loads(out), err


def test_a_job_over_servers_with_tls_and_tokens_is_listed_watched_cancelled_and_resumed(
    servers: Fleet, tmp_path: Path
) -> None:
    model, data = tmp_path / "tiny.onnx", tmp_path / "client"
    write_tiny_cnn(model)
    data.mkdir()
    secure = flags(servers)

    wrong = client("servers", *addresses(servers), "--tls-ca", secure[1], "--json", data_dir=data)
    assert wrong.returncode == 1 and wrong.stdout.count("wants a token") >= 2

    tune = (
        "tune",
        str(model),
        "--trials",
        "300",
        *addresses(servers),
        "--heartbeat-s",
        "1",
        "--early-stopping",
        "0",
        "--json",
    )
    tuning = start_client(*tune, *secure, data_dir=data)
    wait_for(lambda: measured(data, 8) or tuning.poll() is not None, 60)
    assert tuning.poll() is None, tuning.communicate()[1]
    (job,) = (job.job for job in sharded_jobs(data))
    listed = client("jobs", *addresses(servers), "--json", data_dir=data)
    assert [(entry["job"], entry["status"]) for entry in json.loads(listed.stdout)["jobs"]] == [(job, "running")]
    busy = client("resume", job, *secure, data_dir=data)
    assert busy.returncode == 1 and f"another tuner-client runs {job}" in busy.stderr

    watching = start_client("watch", job, data_dir=data)
    cancelled = client("cancel", job, data_dir=data)
    assert cancelled.returncode == 0 and f"{job} is cancelled" in cancelled.stdout, cancelled
    code, document, err = end(tuning)
    assert (code, document["status"]) == (1, "cancelled"), err
    out, _ = watching.communicate(timeout=30)
    assert watching.returncode == 1 and "cancelled" in out and job in out
    before = sharded_job(data, job).measured
    assert before > 8

    without_token = client("resume", job, "--tls-ca", secure[1], data_dir=data)
    assert without_token.returncode == 1 and "token" in without_token.stderr
    resuming = start_client("resume", job, "--wait", "0", "--heartbeat-s", "1", "--json", *secure, data_dir=data)
    wait_for(lambda: measured(data, before + 8) or resuming.poll() is not None, 60)
    for server in servers.servers:
        server.signal(signal.SIGKILL)
    code, document, err = end(resuming)
    assert (code, document["status"]) == (3, "partly"), err
    assert "no instance takes leases any more; what was measured is kept" in str(document["error"])
    kept = servers.gathered(job).union(*(server.records(job) for server in servers.servers))
    assert len(kept) >= sharded_job(data, job).measured > before

    for server in servers.servers:
        server.settings["trial_s"] = 0.02
        server.restart()
    watched = client_on_terminal("resume", job, "--heartbeat-s", "1", *secure, data_dir=data)
    assert watched.exit_code == 0, watched.output
    first, second = (server.address for server in servers.servers)
    for address in (first, second):
        assert address in watched.output  # the live view, and who measured what at the end
    report: JobReport = sharded_job(data, job)
    assert report.status == "done" and report.measured >= 300
    assert sum(one.trials for one in report.instances) == report.measured
    (conv,) = (task for task in report.tasks if task.trials)
    assert set(conv.trials_by_instance) == {first, second}
    assert sum(conv.trials_by_instance.values()) == conv.trials == report.measured
    gathered = servers.gathered(job)
    assert all(server.records(job) <= gathered for server in servers.servers)
