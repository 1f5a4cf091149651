"""What a scheduler knows of its tasks. Written by the state machines only; read by reports."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from tuner_core.model import FailureKind, TaskState
from tuner_server.scheduler import messages as m

HOPELESS_FACTOR = 1.5
"""A candidate whose first sample is slower than this many times the best gets no more samples."""
_LARGEST = 4


@dataclass(frozen=True)
class TaskPlan:
    """A task as the job describes it.

    Attributes:
        cost: See :attr:`Workload.cost_guess`; decides which tasks are searched first.
    """

    name: str
    weight: int
    tunable: bool
    cost: float = 1.0


@dataclass(frozen=True)
class Limits:
    """How much is in flight.

    Attributes:
        batch: Candidates per batch.
        batches_per_task: As many as these batches hold are in flight per task: generated, building or being measured.
        batches_at_once: The same for all tasks together.
        top_k: Candidates measured again at the end of a task.
        kept_busy_by: In flight, so many keep every process at work; None: a third of what may be in flight.
    """

    batch: int = 16
    batches_per_task: int = 2
    batches_at_once: int = 4
    top_k: int = 8
    kept_busy_by: int | None = None

    @staticmethod
    def for_cores(batch: int, in_flight: int) -> Limits:
        """Limits that keep about so many candidates in flight, in batches of that size, and at least four batches.

        Args:
            batch: Candidates per batch.
            in_flight: Six for each core: two of these keep it at work.
        """
        return Limits(batch=batch, batches_at_once=max(4, math.ceil(in_flight / batch)), kept_busy_by=in_flight // 3)

    def little(self, in_flight: int) -> bool:
        """Whether so few candidates are in flight that processes soon stand idle."""
        enough = self.batch * self.batches_at_once / 3 if self.kept_busy_by is None else self.kept_busy_by
        return in_flight < enough

    def for_tasks(self, tasks: int) -> Limits:
        """The same number of candidates in flight for a job with few tasks: each must give more of them.

        Args:
            tasks: How many are searched.
        """
        in_flight = self.batch * self.batches_at_once
        each = math.ceil(in_flight / (self.batches_per_task * max(1, tasks)))
        batch = min(max(self.batch, each), _LARGEST * self.batch)
        at_once = max(2 * self.batches_per_task, math.ceil(in_flight / batch))
        return replace(self, batch=batch, batches_at_once=at_once)


@dataclass
class Batch:
    """Candidates that were asked for together.

    Attributes:
        lease: Token of the lease that pays for them, if there are leases.
        session: Which of the task's sessions they were asked of.
        asked: How many are to come in all; fewer than were asked for, once it is known that the search has no more.
        come: How many of them the search has proposed by now.
    """

    asked: int
    lease: int = 0
    session: int = 0
    come: int = 0
    waiting: set[str] = field(default_factory=set)
    results: list[m.KnownTrial] = field(default_factory=list)

    @property
    def generated(self) -> bool:
        """No more will come."""
        return self.come == self.asked


@dataclass
class TaskProgress:
    """One task."""

    index: int
    plan: TaskPlan
    state: TaskState = TaskState.PENDING
    baseline_us: float | None = None
    baseline_trace: str | None = None
    best_us: float | None = None
    best_trace: str | None = None
    best_trial_id: str = ""
    verified: bool = False
    measured: int = 0
    reused: int = 0
    failures: Counter[FailureKind] = field(default_factory=Counter)
    error: str = ""

    results: dict[str, float] = field(default_factory=dict)
    known: tuple[m.KnownTrial, ...] = ()
    history_us: list[float] = field(default_factory=list)
    batches: dict[int, Batch] = field(default_factory=dict)
    session_open: bool = False
    sessions: int = 0
    session_losses: int = 0
    exhausted: bool = False
    stopped_early: bool = False
    new_trials: int = 0
    chosen: bool = False
    waiting_for: str = ""
    set_aside: int = 0
    promoting: bool = False
    promoted: list[m.KnownTrial] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    published: m.KnownTrial | None = None
    published_is_fallback: bool = False

    @property
    def outstanding(self) -> int:
        """Candidates that were asked for, and those that are being built or measured."""
        return sum(batch.asked - batch.come + len(batch.waiting) for batch in self.batches.values())

    @property
    def fresh(self) -> int:
        """Trials of this run that count as progress, or the lack of it."""
        return max(0, len(self.history_us) - 1 - len(self.known))

    @property
    def failed(self) -> int:
        """Trials of this job that failed."""
        return sum(self.failures.values())

    @property
    def hopeless_above_us(self) -> float | None:
        """Latency above which a candidate needs only a glance; None while there is nothing to compare with.

        Asked for when the candidate is about to be measured, which may be long after it was proposed.
        """
        known = [us for us in (self.best_us, self.baseline_us) if us is not None]
        return HOPELESS_FACTOR * min(known) if known else None

    def ranked(self) -> list[str]:
        """Traces of all valid trials, the fastest first."""
        return sorted(self.results, key=lambda trace: (self.results[trace], trace))

    def all_known(self) -> tuple[m.KnownTrial, ...]:
        """Trials that a search starts from: those of the store, then those measured since."""
        stored = {trial.trace for trial in self.known}
        return self.known + tuple(m.KnownTrial(t, us) for t, us in self.results.items() if t not in stored)
