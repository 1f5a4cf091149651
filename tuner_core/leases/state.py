"""What a sharded job knows: its tasks, its instances, and who holds which lease. Written by the machine only."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tuner_core.allocation.budget import MIN_TRIALS
from tuner_core.allocation.gradient import gain_per_trial
from tuner_core.allocation.stopping import EarlyStopping
from tuner_core.model import TaskState

EPOCH_BITS = 32
"""A token's low bits count a task's leases, the bits above them the times that the job was taken up by a client."""


@dataclass(frozen=True)
class LeaseSettings:
    """How leases are given.

    Attributes:
        heartbeat_s: How often deadlines are renewed.
        silent_heartbeats: An instance that says nothing for so many heartbeats loses its leases. Less than two, so
            that they run elsewhere before two heartbeats have passed.
        ahead_batches: Batches leased beyond what it has measured to an instance that does not say how many candidates
            keep it busy, so that its pipeline never empties.
        task_ahead_batches: The same of one task; more where there are few tasks for each instance.
        baselines_at_once, conclusions_at_once: Leases of these kinds at one instance.
        slow_factor: An instance so many times slower than the others loses its leases.
        stuck_s: A lease without any result for so long moves.
        wait_s: For how long a job without instances waits for one; None: for ever.
        stopping: When a task gets no more trials.
        negligible_share: Tasks that together take less than this share of the untuned model get none at all.
    """

    heartbeat_s: float = 5.0
    silent_heartbeats: float = 1.5
    ahead_batches: int = 5
    task_ahead_batches: int = 3
    baselines_at_once: int = 8
    conclusions_at_once: int = 6
    slow_factor: float = 10.0
    stuck_s: float = 900.0
    wait_s: float | None = None
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    negligible_share: float = 0.0

    @property
    def lease_s(self) -> float:
        """How long a lease lasts at its instance without renewal."""
        return 3 * self.heartbeat_s


@dataclass(frozen=True)
class TaskPlan:
    """A task as the job describes it; ``cost`` is a relative guess of what one call takes, before anything is known."""

    name: str
    weight: int
    tunable: bool
    cost: float = 1.0


@dataclass(frozen=True)
class TaskHistory:
    """What is known of a task when a client takes the job up.

    Attributes:
        trials: This job's own trials, oldest first: trial id to latency, None for a failed one.
        failures: Failed ones of them by kind.
        by_instance: Who measured how many of them.
        reused: Trials of other jobs for the same key.
        best_us: Best latency of all of these.
        baseline_us: Of the fallback schedule, when it was measured.
        published_us, published_id: The verified record, if there is one.
        published_fallback: It is the fallback schedule.
        concluded: It is this job's own: the task is over.
    """

    trials: Mapping[str, float | None] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    by_instance: Mapping[str, int] = field(default_factory=dict)
    reused: int = 0
    best_us: float | None = None
    baseline_us: float | None = None
    published_us: float | None = None
    published_id: str = ""
    published_fallback: bool = False
    concluded: bool = False


class Phase(enum.Enum):
    """Where a lease is between being decided and being over."""

    WARMING = "warming"
    GRANTING = "granting"
    LIVE = "live"
    REVOKING = "revoking"


@dataclass
class Lease:
    """A slice of a task's trials at one instance; of ``trials``, it has been told of ``told``."""

    task: str
    token: int
    instance: str
    trials: int
    conclude: bool
    changed_s: float
    phase: Phase = Phase.WARMING
    foreign: int = 0
    counted: int = 0
    told: int = 0
    closed: bool = False
    repeat: bool = False
    take_over: bool = False

    @property
    def outstanding(self) -> int:
        """Trials that it allows and that have not been counted."""
        return max(0, self.trials - self.counted)

    @property
    def extensible(self) -> bool:
        """Whether more trials may be added to it."""
        return not self.conclude and not self.closed and self.trials > 0 and self.phase is not Phase.REVOKING


@dataclass
class Awaited:
    """A task that another job tunes.

    Attributes:
        set_aside: Trials for the case that nothing comes of that.
        ask_s: When it is asked again.
    """

    holder: str
    set_aside: int
    ask_s: float


@dataclass
class TaskLedger:
    """One task: its trials, its leases, how it ends.

    Attributes:
        counted: This job's trials that count, by id; ``late`` are those that came under a lease that was lost.
        new_trials: Trials that were leased by this client, less those that came back unmeasured.
        leases: By instance: more than one only while there are more instances than tasks for them.
        produced: Trials with a record by who measured them; those known before under the empty name.
        seen: How many of the others' an instance was given.
        home: The instance where it goes on, because its search is warm there.
        holder: The instance that was given the latest lease.
        orphaned: A lease of it was lost in the middle; it runs elsewhere before anything else.
    """

    plan: TaskPlan
    index: int
    state: TaskState = TaskState.PENDING
    counted: dict[str, float | None] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    failures: Counter[str] = field(default_factory=Counter)
    by_instance: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    history_us: list[float] = field(default_factory=list)
    best_us: float | None = None
    best_trial_id: str = ""
    verified: bool = False
    baseline_us: float | None = None
    baseline_known: bool = False
    baseline_attempts: int = 0
    error: str = ""
    chosen: bool = False
    exhausted: bool = False
    stopped_early: bool = False
    new_trials: int = 0
    settled: bool = False
    settled_fallback: bool = False
    attempts: int = 0
    last_token: int = 0
    leases: dict[str, Lease] = field(default_factory=dict)
    produced: Counter[str] = field(default_factory=Counter)
    seen: dict[str, int] = field(default_factory=dict)
    home: str | None = None
    holder: str = ""
    moved_s: float = -math.inf
    orphaned: bool = False
    awaited: Awaited | None = None

    @property
    def open(self) -> bool:
        """Whether it may get trials."""
        return (
            self.plan.tunable and self.chosen and not self.exhausted and not self.state.final and self.awaited is None
        )

    @property
    def reusable(self) -> bool:
        """Whether another job's published best stands, since this job has measured nothing of it."""
        return self.settled and not self.counted and not self.new_trials

    @property
    def known(self) -> int:
        """Trials that say something about it."""
        return len(self.counted) + self.reused

    @property
    def missing(self) -> int:
        """Trials that must stay reserved for it, so that one valid candidate can be promoted."""
        need = MIN_TRIALS - self.known
        if need <= 0 or not self.open:
            return 0
        return max(0, need - sum(lease.outstanding for lease in self.leases.values()))

    def foreign(self, instance: str) -> int:
        """Trials with a record that this instance did not measure."""
        return self.produced.total() - self.produced[instance]

    def gain(self) -> float:
        """Expected reduction of the model's latency by its next trial, in microseconds; infinite without a trial."""
        if self.new_trials == 0 and self.known == 0:
            return math.inf
        history = self.history_us
        if len(history) < 2:
            start = self.best_us if self.best_us is not None else self.baseline_us
            if start is None:
                return math.inf
            return gain_per_trial(self.plan.weight, [start] * (self.known + self.new_trials + 1))
        return gain_per_trial(self.plan.weight, history)


@dataclass
class InstanceState:
    """One instance: its health, its leases, how fast it measures."""

    name: str
    incarnation: str = ""
    workers: int = 1
    batch: int = 16
    in_flight: int = 0
    alive: bool = False
    suspect: bool = False
    draining: bool = False
    reason: str = ""
    heard_s: float = 0.0
    leases: dict[str, Lease] = field(default_factory=dict)
    stale: set[tuple[str, int]] = field(default_factory=set)
    trials: int = 0
    late: int = 0
    rate: float | None = None
    window_since_s: float | None = None
    window_trials: int = 0
    unplanned: int = 0
    slow_until_s: float = -math.inf
    slow_strikes: int = 0
    backoff_until_s: float = -math.inf
    refusals: int = 0

    @property
    def outstanding(self) -> int:
        """Trials leased to it that have not been counted."""
        return sum(lease.outstanding for lease in self.leases.values())

    @property
    def conclusions(self) -> int:
        """Tasks that it promotes now."""
        return sum(lease.conclude for lease in self.leases.values())

    @property
    def baselines(self) -> int:
        """Tasks of which it measures nothing but the baseline."""
        return sum(lease.trials == 0 and not lease.conclude for lease in self.leases.values())

    def slow(self, now_s: float) -> bool:
        """Whether it was found to be far slower than the others, lately."""
        return now_s < self.slow_until_s

    def state(self, now_s: float) -> str:
        """One word for people: healthy, suspect, slow, draining or dead."""
        if not self.alive:
            return "dead"
        if self.draining:
            return "draining"
        if self.suspect:
            return "suspect"
        return "slow" if self.slow(now_s) else "healthy"


@dataclass
class Board:
    """The whole job at a moment.

    Attributes:
        epoch: How often the job was taken up by a client.
        trials: The whole job's budget.
        unassigned: Trials of the budget that are in no lease and have not been counted.
        joined: An instance has joined, now or before.
        chosen: It is decided which tasks get trials.
        model_at: The instance that measures the model now.
    """

    tasks: dict[str, TaskLedger]
    settings: LeaseSettings
    instances: dict[str, InstanceState] = field(default_factory=dict)
    epoch: int = 1
    trials: int = 0
    unassigned: int = 0
    fair_trials: int = 0
    now_s: float = 0.0
    joined: bool = False
    chosen: bool = False
    model_at: str | None = None

    def usable(self) -> list[InstanceState]:
        """Instances that may get leases: slow ones only when there are no others."""
        ready = [
            one
            for one in self.instances.values()
            if one.alive and not one.suspect and not one.draining and self.now_s >= one.backoff_until_s
        ]
        quick = [one for one in ready if not one.slow(self.now_s)]
        if quick or any(not one.slow(self.now_s) for one in self.alive()):
            return quick
        return ready

    def alive(self) -> list[InstanceState]:
        """Instances that may take leases, now or in a moment."""
        return [one for one in self.instances.values() if one.alive and not one.draining]

    def open_tasks(self) -> list[TaskLedger]:
        """Tasks that may get trials."""
        return [task for task in self.tasks.values() if task.open]

    def reserved(self, besides: TaskLedger | None = None) -> int:
        """Trials that must stay for tasks that have not had their least, those included that may not get any.

        Args:
            besides: A task that does not count.
        """
        return sum(task.missing + self._undecided(task) for task in self.tasks.values() if task is not besides)

    def undecided(self) -> int:
        """Trials that must stay for tasks of which it is not known yet whether they get any."""
        return sum(map(self._undecided, self.tasks.values()))

    def _undecided(self, task: TaskLedger) -> int:
        if self.chosen or task.chosen or not task.plan.tunable or task.state.final or task.awaited is not None:
            return 0
        return max(0, MIN_TRIALS - task.known)

    def leased(self) -> bool:
        """Whether any lease is out."""
        return any(task.leases for task in self.tasks.values())
