"""The client as a process against a scripted server: output, exit codes, Ctrl-C, lost servers, TLS, tokens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.integration.client_process import (
    ROOT,
    Scripted,
    calls,
    client,
    client_on_terminal,
    environment,
    scripted,
    start_client,
    wait_for,
)
from tests.integration.scripted_server import JOB

COMMANDS = ["tune", "jobs", "watch", "cancel", "resume", "query", "export", "import", "build", "servers", "drain"]
COMMANDS += ["logs", "stats", "prune"]


@pytest.fixture(scope="module")
def holding() -> Iterator[Scripted]:
    """A server whose job goes on for ever."""
    with scripted({"ticks": 1_000_000}) as server:
        yield server


def one_error_line(stderr: str) -> str:
    """The error, when standard error is that one line and nothing else."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


# Help


def test_help_of_every_command_has_an_example_and_imports_neither_tvm_nor_grpc(tmp_path: Path) -> None:
    script = (
        "import sys, io, contextlib\n"
        "from tuner_client.cli.main import cli\n"
        "for words in [[]] + [[name] for name in sys.argv[1:]]:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        cli.main([*words, '--help'], prog_name='tuner-client', standalone_mode=False)\n"
        "    assert 'Example: tuner-client ' + ' '.join(words) in out.getvalue(), words\n"
        "    assert not words or '--json' in out.getvalue(), words\n"
        "heavy = {'tvm', 'grpc', 'onnx', 'numpy', 'torch', 'google.protobuf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *COMMANDS], env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_python_api_imports_without_tvm_and_grpc(tmp_path: Path) -> None:
    script = (
        "import sys, tuner_client\n"
        "assert callable(tuner_client.tune) and tuner_client.Client and tuner_client.JobReport\n"
        "assert not {'tvm', 'grpc', 'onnx'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], env=environment(tmp_path), cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr


# Usage errors


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["tunee"], "did you mean 'tune'"),
        (["tune"], "missing argument 'MODEL'"),
        (["tune", "none.onnx"], "there is no model file none.onnx"),
        (["tune", "m.onnx", "--trials", "0"], "--trials must be between 1 and 1000000"),
        (["tune", "m.onnx", "--trials", "many"], "not a valid integer"),
        (["tune", "m.onnx", "--sm-percent", "101"], "--sm-percent must be between 1 and 100"),
        (["tune", "m.onnx", "--input-shape", "data"], "NAME=SHAPE"),
        (["tune", "m.onnx", "--target", "cuda"], "--target must be auto or a JSON object"),
        (["tune", "m.onnx", "--output", "nowhere/m.so"], "there is no directory nowhere"),
        (["tune", "m.onnx", "--detach"], "--detach needs a server"),
        (["tune", "m.onnx", "--detach", "--server", "127.0.0.1:1", "-o", "m.so"], "--detach leaves nobody to build"),
        (["query", "--server", "a:1", "--server", "b:1"], "talks to one server, but a:1, b:1 were given"),
        (["tune", "m.onnx", "--detach", "--server", "a:1", "--server", "b:1"], "--detach needs one server"),
        (["tune", "m.onnx", "--wait", "0"], "give --server HOST:PORT for each"),
        (["tune", "m.onnx", "--server", "nonsense"], "is not a server address"),
        (["watch", JOB, "--output", "m.so"], "--output and --model go together"),
        (["jobs", "--tls"], "give --server HOST:PORT"),
        (["query", "--sm-percent", "0"], "--sm-percent must be between 1 and 100"),
        (["query", "--min-sm-percent", "60", "--max-sm-percent", "40"], "is above"),
        (["build", "m.onnx", "-o", "m.so"], "--sm-percent"),
        (["prune", "--older-than", "yesterday"], "e.g. 30d"),
        (["drain"], "which server"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], what: str) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    run = client(*arguments, data_dir=tmp_path)
    assert what in one_error_line(run.stderr)
    assert run.returncode == 2
    assert run.stdout == ""


def test_two_servers_in_the_environment_are_refused_too(tmp_path: Path) -> None:
    run = client("stats", data_dir=tmp_path, TUNER_SERVER="a:1,b:2")
    assert "talks to one server" in one_error_line(run.stderr)
    assert run.returncode == 2


def test_under_json_an_error_is_a_document_too(tmp_path: Path) -> None:
    run = client("tune", "none.onnx", "--json", data_dir=tmp_path)
    document = json.loads(run.stdout)
    assert document["status"] == "failed"
    assert document["exit_code"] == run.returncode == 2
    assert document["error"] in one_error_line(run.stderr)


# A job from beginning to end


@pytest.mark.parametrize(("end", "code"), [("done", 0), ("partly", 3), ("failed", 1), ("cancelled", 1)])
def test_the_exit_code_says_how_the_job_ended(tmp_path: Path, end: str, code: int) -> None:
    with scripted({"end": end, "ticks": 3}) as server:
        run = client("watch", JOB, "--server", server.address, data_dir=tmp_path)
    assert run.returncode == code, run.stderr
    assert f"tiny: {end}" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    assert run.stderr == ("error: the scripted reason\n" if end == "failed" else "")


def test_without_a_terminal_progress_is_plain_lines_and_the_table_has_everything(tmp_path: Path) -> None:
    with scripted({"ticks": 5, "tasks": 4}) as server:
        run = client("watch", JOB, "--server", server.address, data_dir=tmp_path)
    assert "\x1b" not in run.stdout
    assert "the scripted message" in run.stdout
    assert re.search(r"tuned: conv2d 1x8x14x14 .*: 812 µs -> 271 µs \(3\.00x\), 32 trials, 3 failed", run.stdout)
    table = run.stdout[run.stdout.index("operator  ") :]
    assert re.search(r"conv2d 1x8x14x14 .* 1 +812 µs +271 µs +3\.00x +32 +3 +tuned ✓", table)
    assert re.search(r"whole model +4\.20 ms +1\.40 ms +3\.00x +64 +3 +same output", table)
    assert "2 other operators, fallback schedule" in table
    assert "2 build_error, 1 run_timeout" in table
    assert "64 trials measured (3 failed), in" in table


def test_a_failed_operator_is_named_with_its_reason(tmp_path: Path) -> None:
    with scripted({"end": "partly", "ticks": 2}) as server:
        run = client("watch", JOB, "--server", server.address, data_dir=tmp_path)
    assert "failed: dense 64x128 -> 32, fp32: no candidate could be built" in run.stdout


def test_json_is_one_document_on_stdout_and_progress_goes_to_stderr(tmp_path: Path) -> None:
    with scripted({"ticks": 4}) as server:
        run = client("watch", JOB, "--server", server.address, "--json", data_dir=tmp_path)
    document = json.loads(run.stdout)
    assert document["job"] == JOB
    assert document["status"] == "done"
    assert document["model_latency_us"] == {"baseline": 4200.0, "tuned": 1400.0}
    assert [task["state"] for task in document["tasks"]] == ["tuned", "tuned", "fallback"]
    assert "the scripted message" in run.stderr


def test_on_a_terminal_there_is_a_live_view_that_the_final_table_replaces(tmp_path: Path) -> None:
    with scripted({"ticks": 20}) as server:
        run = client_on_terminal("watch", JOB, "--server", server.address, data_dir=tmp_path)
    assert run.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run.output)
    live, _, final = text.rpartition("whole model")
    assert re.search(r"\d+/64 trials  3 failed  12\.5/s  \d+ s left", live)
    assert "running" in live
    assert "\x1b[?25l" in run.output  # the cursor is hidden while it is drawn
    assert run.output.rindex("\x1b[?25h") > run.output.rindex("\x1b[?25l")  # and shown again
    assert "/64 trials" not in final
    assert "64 trials measured" in final


def test_many_operators_do_not_overflow_the_terminal(tmp_path: Path) -> None:
    with scripted({"ticks": 12, "tasks": 60}) as server:
        run = client_on_terminal("watch", JOB, "--server", server.address, data_dir=tmp_path)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run.output)
    assert re.search(r"and (\d+) more: \1 running", text)
    last_frame = text[: text.rindex("more: ")].rpartition("operator")[2]
    assert last_frame.count("running") < 30


# Ctrl-C


def test_ctrl_c_detaches_from_a_named_server_and_says_how_to_go_on(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with scripted({"ticks": 1_000_000, "calls": str(log)}) as server:
        process = start_client("watch", JOB, "--server", server.address, data_dir=tmp_path)
        wait_for(lambda: "WatchJob" in calls(log))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert server.process.poll() is None
    assert process.returncode == 130
    assert f"detached: {JOB} goes on" in out
    assert f"tuner-client watch {JOB} --server {server.address}" in out
    assert f"tuner-client resume {JOB} --server {server.address}" in out
    assert "CancelJob" not in calls(log)
    assert "Traceback" not in out + err


def test_sigterm_and_json_detach_with_one_document(tmp_path: Path, holding: Scripted) -> None:
    process = start_client("watch", JOB, "--server", holding.address, "--json", data_dir=tmp_path)
    assert process.stderr is not None
    while "the scripted message" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert json.loads(out)["status"] == "detached"
    assert "tuner-client watch" in err


# Lost servers


def test_a_server_that_dies_and_comes_back_does_not_end_the_watch(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with scripted({"ticks": 1_000_000, "calls": str(log)}) as first:
        process = start_client("watch", JOB, "--server", first.address, data_dir=tmp_path)
        wait_for(lambda: "WatchJob" in calls(log))
        first.process.kill()
        first.process.wait()
    with scripted({"ticks": 20, "from": 10, "port": first.port}):
        out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "trying again" in out
    assert "connected again" in out
    assert "tiny: done" in out


def test_a_server_that_dies_and_stays_away_ends_the_watch_with_one_line(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with scripted({"ticks": 1_000_000, "calls": str(log)}) as server:
        process = start_client("watch", JOB, "--server", server.address, "--reconnect-s", "1", data_dir=tmp_path)
        wait_for(lambda: "WatchJob" in calls(log))
        server.process.kill()
        _, err = process.communicate(timeout=40)
    line = one_error_line(err)
    assert "lost the server" in line
    assert "is stored there" in line
    assert f"tuner-client resume {JOB} --server {server.address}" in line
    assert process.returncode == 1


def test_a_server_that_stops_gracefully_and_stays_away_leaves_a_stopped_job(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with scripted({"ticks": 1_000_000, "calls": str(log)}) as server:
        process = start_client(
            *("watch", JOB, "--server", server.address, "--reconnect-s", "1", "--json"), data_dir=tmp_path
        )
        wait_for(lambda: "WatchJob" in calls(log))
        server.process.terminate()
        out, _ = process.communicate(timeout=40)
    assert json.loads(out)["status"] == "stopped"
    assert process.returncode == 1


def test_a_server_that_restarts_gracefully_is_followed_on(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with scripted({"ticks": 1_000_000, "calls": str(log)}) as first:
        process = start_client("watch", JOB, "--server", first.address, data_dir=tmp_path)
        wait_for(lambda: "WatchJob" in calls(log))
        first.process.terminate()
        first.process.wait(20)
    with scripted({"ticks": 20, "from": 10, "port": first.port}):
        out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "tiny: done" in out


def test_watching_a_job_that_was_stopped_before_says_so_at_once(tmp_path: Path) -> None:
    with scripted({"first": "stopped", "ticks": 1_000_000}) as server:
        run = client("watch", JOB, "--server", server.address, data_dir=tmp_path)
        assert run.returncode == 1
        assert "tiny: stopped" in run.stdout


def test_resume_asks_the_server_and_follows_to_the_end(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with scripted({"first": "stopped", "ticks": 10, "calls": str(log)}) as server:
        run = client("resume", JOB, "--server", server.address, data_dir=tmp_path)
    assert run.returncode == 0, run.stderr
    assert calls(log).index("ResumeJob") < calls(log).index("WatchJob")


# Servers that are none


def test_no_server_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = client("jobs", "--server", f"127.0.0.1:{port}", data_dir=tmp_path)
    line = one_error_line(run.stderr)
    assert f"127.0.0.1:{port}" in line
    assert "connection refused" in line
    assert run.returncode == 1


def test_a_web_server_is_not_a_tuner_server(tmp_path: Path) -> None:
    web = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        run = client("jobs", "--server", f"127.0.0.1:{web.server_port}", data_dir=tmp_path)
    finally:
        web.shutdown()
        web.server_close()
    assert "wrong port" in one_error_line(run.stderr)
    assert run.returncode == 1


def test_an_unknown_job_is_named(tmp_path: Path, holding: Scripted) -> None:
    run = client("watch", "job-none", "--server", holding.address, data_dir=tmp_path)
    assert "there is no job job-none" in one_error_line(run.stderr)
    assert run.returncode == 1


def test_a_traceback_only_with_debug(tmp_path: Path, holding: Scripted) -> None:
    run = client("watch", "job-none", "--server", holding.address, "--debug", data_dir=tmp_path)
    assert "Traceback" in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("error: ")


# Small commands


def test_the_server_comes_from_the_environment(tmp_path: Path, holding: Scripted) -> None:
    run = client("jobs", "--json", data_dir=tmp_path, TUNER_SERVER=holding.address)
    assert [job["job"] for job in json.loads(run.stdout)["jobs"]] == [JOB]


def test_jobs_and_servers_for_people(tmp_path: Path, holding: Scripted) -> None:
    jobs = client("jobs", "--server", holding.address, data_dir=tmp_path).stdout
    assert re.search(rf"{JOB} +tiny +running +100 %", jobs)
    servers = client("servers", "--server", holding.address, data_dir=tmp_path).stdout
    assert "cpu: Test CPU (x86-64), 2 cores" in servers
    assert re.search(r"0 +cpu +100 % +2 +idle +1 +0, 1", servers)


def test_cancel_and_drain_reach_the_server(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with scripted({"ticks": 1_000_000, "calls": str(log)}) as server:
        cancelled = client("cancel", JOB, "--server", server.address, "--json", data_dir=tmp_path)
        drained = client("drain", "--server", server.address, "--json", data_dir=tmp_path)
    assert json.loads(cancelled.stdout)["status"] == "cancelled"
    assert json.loads(drained.stdout) == {"draining": True, "running_jobs": [JOB]}
    assert {"CancelJob", "Drain"} <= set(calls(log))


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path, holding: Scripted) -> None:
    command = f"{sys.executable} -m tuner_client servers --json --server {holding.address} | head -c 1"
    run = subprocess.run(
        command, shell=True, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "{"
    assert "Traceback" not in run.stderr


# Who one is


def test_a_token_travels_with_every_call(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    with scripted({"ticks": 3, "token": "s3cret"}) as server:
        refused = client("watch", JOB, "--server", server.address, data_dir=tmp_path)
        from_file = client("watch", JOB, "--server", server.address, "--token-file", str(token), data_dir=tmp_path)
        from_env = client("jobs", "--server", server.address, data_dir=tmp_path, TUNER_TOKEN="s3cret")
    assert "no valid token" in one_error_line(refused.stderr)
    assert refused.returncode == 1
    assert from_file.returncode == from_env.returncode == 0, from_file.stderr


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A certificate authority, a server's and a client's certificate."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl(*new, "-x509", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(*new[:-2], "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", "names", "-out", f"{name}.pem"),
        )
    return {path.name: path for path in folder.iterdir()}


def test_mutual_tls_works_and_its_absence_says_what_to_do(tmp_path: Path, certificates: dict[str, Path]) -> None:
    tls = {"key": "server.key", "cert": "server.pem", "ca": "ca.pem"}
    script: dict[str, Any] = {"ticks": 3, "tls": {name: str(certificates[file]) for name, file in tls.items()}}
    ca = ("--tls-ca", str(certificates["ca.pem"]))
    own = ("--tls-cert", str(certificates["client.pem"]), "--tls-key", str(certificates["client.key"]))
    with scripted(script) as server:
        good = client("watch", JOB, "--server", server.address, *ca, *own, data_dir=tmp_path)
        nobody = client("jobs", "--server", server.address, *ca, data_dir=tmp_path)
        plain = client("jobs", "--server", server.address, data_dir=tmp_path)
        stranger = client("jobs", "--server", server.address, "--tls", data_dir=tmp_path)
    assert good.returncode == 0, good.stderr
    for run in (nobody, plain, stranger):
        assert run.returncode == 1
        assert "TLS" in one_error_line(run.stderr)


def test_a_missing_certificate_file_is_a_usage_error(tmp_path: Path) -> None:
    run = client("jobs", "--server", "127.0.0.1:1", "--tls-ca", "none.pem", data_dir=tmp_path)
    assert "cannot read none.pem" in one_error_line(run.stderr)
    assert run.returncode == 2


# The data directory


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_data_directory_is_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    run = client("jobs", "--data-dir", str(closed / "data"), data_dir=tmp_path)
    assert "cannot write the data directory" in one_error_line(run.stderr)


def test_a_data_directory_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = client("jobs", "--data-dir", str(tmp_path / "file"), data_dir=tmp_path)
    assert "cannot write the data directory" in one_error_line(run.stderr)
    assert run.returncode == 1


def test_the_clients_tls_variables_do_not_turn_a_local_server_into_a_tls_server(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("not a certificate")
    tls = {"TUNER_TLS_CA": "ca.pem", "TUNER_TLS_CERT": "cert.pem", "TUNER_TLS_KEY": "key.pem"}
    run = client("jobs", "--json", data_dir=tmp_path, **tls)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"jobs": []}
