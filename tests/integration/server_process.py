"""The server as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.integration.client_process import environment


class ServerProcess:
    """``tuner-server`` on a data directory, told when it is up."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        ready, writer = os.pipe()
        data_dir.mkdir(exist_ok=True)
        self.log = data_dir / "server.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tuner_server", "--listen", "127.0.0.1:0"),
                    *("--data-dir", str(data_dir), "--ready-fd", str(writer), *options),
                ],
                env=environment(),
                pass_fds=[writer],
                stdout=log,
                stderr=log,
            )
        os.close(writer)
        with os.fdopen(ready) as said:
            answer = json.loads(said.readline() or "{}")
        assert "address" in answer, self.log.read_text()
        self.address: str = answer["address"]

    def family(self) -> list[psutil.Process]:
        """Its children and theirs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def server(data_dir: Path, *options: str) -> Iterator[ServerProcess]:
    started = ServerProcess(data_dir, *options)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()
