"""What a server keeps of a job, be it its own or its part of a sharded one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_server.scheduler.journal import JobJournal
from tuner_server.scheduler.report import JobFacts

JOURNAL_INTERVAL_S = 2.0


class Run(Protocol):
    """A job at work."""

    @property
    def status(self) -> tuning_pb2.JobStatus:
        """The job as it stands."""

    @property
    def elapsed_s(self) -> float:
        """Time spent running."""


@dataclass
class Job:
    """A job, at work or not.

    Attributes:
        status: As it was last; while ``run`` is set, that knows better.
        changed: Set whenever something changes.
        ended: Set when a run has ended.
        messages: Lines for people.
        lease_s: How long leases last; None for a job that is not a shard.
        tokens: Of a shard: newest token seen of each task, by name.
    """

    facts: JobFacts
    status: tuning_pb2.JobStatus
    elapsed_s: float = 0.0
    run: Run | None = None
    turn: asyncio.Task[None] | None = None
    cancel_wanted: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    messages: list[str] = field(default_factory=list)
    journalled_at: float = 0.0
    lease_s: float | None = None
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def state(self) -> JobState:
        """As it was last set; passing states of a run do not show here."""
        return JobState(self.status.status)

    @property
    def current(self) -> tuning_pb2.JobStatus:
        """The job as it stands."""
        return self.run.status if self.run is not None else self.status

    def set_state(self, state: JobState, text: str) -> None:
        """Change the state; the text is its error when it has ended, else what it is doing."""
        self.status.status = state
        self.status.error = text if state.ended else ""
        self.status.phase = "ended" if state.ended else text
        self.changed.set()

    async def write(self, journal: JobJournal) -> None:
        """Write how far it has come."""
        status = self.current
        elapsed_s = self.run.elapsed_s if self.run is not None else self.elapsed_s
        await asyncio.to_thread(journal.update, self.facts.job, JobState(status.status), status, elapsed_s)

    def due(self) -> bool:
        """Whether it is time to write it again; says so once per interval."""
        if time.monotonic() - self.journalled_at <= JOURNAL_INTERVAL_S:
            return False
        self.journalled_at = time.monotonic()
        return True
