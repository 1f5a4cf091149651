"""The command as a user runs it: a process, with or without a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("scripted_server.py")


def environment(data_dir: Path | None = None, **extra: str) -> dict[str, str]:
    """The test's environment without anything that steers the client, on its own data directory."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TUNER_")}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **extra}
    env.pop("COLUMNS", None)
    if data_dir is not None:
        env["TUNER_DATA_DIR"] = str(data_dir)
    return env


def client(*arguments: str, data_dir: Path, timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``tuner-client`` to its end, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "tuner_client", *arguments],
        env=environment(data_dir, **env),
        cwd=data_dir,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def start_client(*arguments: str, data_dir: Path, **env: str) -> subprocess.Popen[str]:
    """Start ``tuner-client`` without a terminal, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuner_client", *arguments],
        env=environment(data_dir, **env),
        cwd=data_dir,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell lets tests ignore it
    )


@dataclass
class TerminalRun:
    """What a command showed on a terminal of 100 x 30 characters, escape sequences included."""

    output: str
    exit_code: int


def client_on_terminal(*arguments: str, data_dir: Path, timeout_s: float = 60) -> TerminalRun:
    """Run ``tuner-client`` to its end on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner_client", *arguments],
        env=environment(data_dir),
        cwd=data_dir,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    output = b""
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([ours], [], [], 0.2)
            if ready:
                try:
                    chunk = os.read(ours, 65536)
                except OSError:
                    break
                if not chunk:
                    break
                output += chunk
        return TerminalRun(output.decode(errors="replace"), process.wait(5))
    finally:
        os.close(ours)
        if process.poll() is None:
            process.kill()
            process.wait()


@dataclass
class Scripted:
    """A scripted server process."""

    process: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@contextlib.contextmanager
def scripted(script: Mapping[str, Any]) -> Iterator[Scripted]:
    """A server that plays the script, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), json.dumps(dict(script))],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the scripted server did not start"
        yield Scripted(process, f"127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def calls(path: Path) -> list[str]:
    """Names of the calls that a scripted server got."""
    if not path.exists():
        return []
    return [json.loads(line)["call"] for line in path.read_text().splitlines()]


def wait_for(condition: Any, timeout_s: float = 20.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)
