"""Replaying servers as processes, and jobs that are sharded over them."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.client_process import ROOT, environment
from tests.replay_server import CORES, DEVICE, TARGET
from tuner_client.job import JobReport
from tuner_client.progress import Silent
from tuner_client.sharding.admission import JobFacts
from tuner_client.sharding.tuning import ShardedTuner, ShardingOptions, default_store
from tuner_core.model import Record
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store
from tuner_core.transport.options import ConnectionOptions

FACTS = JobFacts(100, TARGET, DEVICE, CORES)
HEARTBEAT_S = 1.0


@dataclass
class Replayed:
    """A replaying server process."""

    settings: dict[str, Any]
    process: subprocess.Popen[str]
    address: str

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def restart(self) -> None:
        """Start it again at the same address, on the same store."""
        self.process.kill()
        self.process.wait()
        port = int(self.address.rpartition(":")[2])
        self.process, self.address = _start({**self.settings, "port": port})

    def grants(self) -> list[tuple[float, str]]:
        """When it took a lease of which task, seconds since the epoch."""
        lines = (Path(self.settings["folder"]) / "grants").read_text().splitlines()
        return [(float(line.split()[0]), line.split()[1]) for line in lines]

    def records(self, job: str) -> set[str]:
        """Trial ids of the job in this server's own store."""
        return {record.trial_id for record in records_of(f"sqlite:///{self.settings['folder']}/records.sqlite", job)}


def records_of(url: str, job: str) -> list[Record]:
    """All records of a job in a store."""
    store = open_store(url)
    try:
        return list(store.query(RecordFilter(job=job, include_failed=True), limit=10_000).records)
    finally:
        store.close()


def _start(settings: dict[str, Any], prefix: tuple[str, ...] = ()) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [*prefix, sys.executable, str(ROOT / "tests" / "replay_server.py"), json.dumps(settings)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    assert port, "the replaying server did not start"
    return process, f"{settings.get('host', '127.0.0.1')}:{port}"


@dataclass
class Fleet:
    """Servers on one folder each, and the client's folder."""

    folder: Path
    servers: list[Replayed] = field(default_factory=list)

    def add(self, prefix: tuple[str, ...] = (), **settings: Any) -> Replayed:
        name = f"server{len(self.servers)}"
        every = {"folder": str(self.folder / name), "name": name, "trial_s": 0.05, **settings}
        process, address = _start(every, prefix)
        server = Replayed(every, process, address)
        self.servers.append(server)
        return server

    @property
    def client_folder(self) -> Path:
        return self.folder / "client"

    def tuner(
        self,
        progress: Silent | None = None,
        *,
        servers: Sequence[Replayed] | None = None,
        client: str = "client",
        **options: Any,
    ) -> ShardedTuner:
        """A client of these servers (all, when none are named), on its own folder."""
        named = tuple(ConnectionOptions(server.address) for server in servers or self.servers)
        options = {"heartbeat_s": HEARTBEAT_S, **options}
        return ShardedTuner(ShardingOptions(named, **options), self.folder / client, progress)

    def gathered(self, job: str) -> set[str]:
        """Trial ids of the job in the client's store."""
        return {record.trial_id for record in records_of(default_store(self.client_folder), job)}


@contextlib.contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    """An empty fleet; its servers are killed at the end."""
    found = Fleet(folder)
    try:
        yield found
    finally:
        for server in found.servers:
            with contextlib.suppress(ProcessLookupError):
                server.process.kill()
            server.process.wait()
            if server.process.stdout is not None:
                server.process.stdout.close()


class Script(Silent):
    """Does things when a job has come so far: trials measured, and what to do then."""

    def __init__(self, *steps: tuple[int, Callable[[], Any]]) -> None:
        self.notes: list[str] = []
        self.reports: list[JobReport] = []
        self._steps = list(steps)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def job(self, report: JobReport, message: str = "") -> None:
        self.reports.append(report)
        while self._steps and report.measured >= self._steps[0][0]:
            self._steps.pop(0)[1]()

    def said(self, text: str) -> bool:
        return any(text in note for note in self.notes)
