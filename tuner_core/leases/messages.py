"""What goes into the state machine of a sharded job (events) and what comes out of it (instructions).

Nothing here knows how messages travel. Every event carries ``now_s``, seconds of any clock that does not go back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tuner_core.model import JobState

# Events


@dataclass(frozen=True)
class InstanceJoined:
    """An instance has the job and takes leases: for the first time, or again after it was away.

    Attributes:
        incarnation: Changes when the instance restarts; its leases are gone then.
        workers, batch: Measurement workers, and trials in one batch of its search.
        in_flight: Candidates that keep its search, builds and workers busy; 0: it does not say.
    """

    now_s: float
    instance: str
    incarnation: str
    workers: int = 1
    batch: int = 16
    draining: bool = False
    in_flight: int = 0


@dataclass(frozen=True)
class InstanceGone:
    """An instance is known to be gone: its process ended, or it was left out. Silence is noticed without this."""

    now_s: float
    instance: str
    reason: str


@dataclass(frozen=True)
class Heard:
    """A sign of life."""

    now_s: float
    instance: str
    draining: bool = False


@dataclass(frozen=True)
class Warmed:
    """The instance holds the task's records: :class:`Warm` is done."""

    now_s: float
    instance: str
    task: str
    token: int


@dataclass(frozen=True)
class LeaseAccepted:
    """The instance took the lease, or its extension."""

    now_s: float
    instance: str
    task: str
    token: int


@dataclass(frozen=True)
class LeaseRefused:
    """The instance did not take the lease or its extension, or its records could not be brought.

    Attributes:
        unanswered: Nobody knows: the instance may have taken it.
    """

    now_s: float
    instance: str
    task: str
    token: int
    reason: str
    draining: bool = False
    unanswered: bool = False


@dataclass(frozen=True)
class LeaseLost:
    """The instance says that it does not hold this lease (any more)."""

    now_s: float
    instance: str
    task: str
    token: int


@dataclass(frozen=True)
class BaselineMeasured:
    """A task's fallback schedule was measured; ``latency_us`` is None when it failed."""

    now_s: float
    instance: str
    task: str
    token: int
    latency_us: float | None
    trial_id: str = ""
    error: str = ""


@dataclass(frozen=True)
class TrialFinished:
    """A trial's record is durable at the instance; ``latency_us`` is None for a failed one."""

    now_s: float
    instance: str
    task: str
    token: int
    trial_id: str
    latency_us: float | None
    failure: str = ""


@dataclass(frozen=True)
class LeaseEnded:
    """A lease is over at the instance.

    Attributes:
        reason: measured, exhausted, concluded, revoked, expired, draining, failed; ``held`` by another job's claim, or
            ``published`` by another job.
        verified: Concluded: the best is published.
        fallback: Concluded, published: the best is the fallback schedule.
        baseline_us: Concluded: the baseline, measured again alone like the best.
        holder: Held: which job tunes the task.
        reused: Published: trials of other jobs that the instance knows.
    """

    now_s: float
    instance: str
    task: str
    token: int
    reason: str
    verified: bool = False
    best_latency_us: float | None = None
    best_trial_id: str = ""
    fallback: bool = False
    error: str = ""
    baseline_us: float | None = None
    holder: str = ""
    reused: int = 0


@dataclass(frozen=True)
class ModelMeasured:
    """The whole model was measured, or cannot be: ``error`` says why."""

    now_s: float
    instance: str
    baseline_us: float | None = None
    tuned_us: float | None = None
    outputs_match: bool | None = None
    error: str = ""


@dataclass(frozen=True)
class ModelNotMeasured:
    """The instance that was to measure the model did not answer."""

    now_s: float
    instance: str
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed. Sent several times per heartbeat."""

    now_s: float


@dataclass(frozen=True)
class CancelRequested:
    """The user ends the job."""

    now_s: float


@dataclass(frozen=True)
class StopRequested:
    """Whoever drives the job leaves: leases are given back, none is given any more."""

    now_s: float


Event = (
    InstanceJoined
    | InstanceGone
    | Heard
    | Warmed
    | LeaseAccepted
    | LeaseRefused
    | LeaseLost
    | BaselineMeasured
    | TrialFinished
    | LeaseEnded
    | ModelMeasured
    | ModelNotMeasured
    | Tick
    | CancelRequested
    | StopRequested
)

# Instructions


@dataclass(frozen=True)
class Warm:
    """Bring the task's records to the instance, then say :class:`Warmed` (or :class:`LeaseRefused`)."""

    instance: str
    task: str
    token: int


@dataclass(frozen=True)
class Grant:
    """Start a lease, or extend the one with this token: ``trials`` is what it allows in all.

    Attributes:
        take_over: Nothing of the task is published as far as is known: what another job has published ends the lease.
    """

    instance: str
    task: str
    token: int
    trials: int
    conclude: bool = False
    take_over: bool = False


@dataclass(frozen=True)
class Renew:
    """Move the deadlines of these leases, ``(task, token)`` each."""

    instance: str
    leases: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Revoke:
    """End a lease; what is being measured is finished and stored."""

    instance: str
    task: str
    token: int


@dataclass(frozen=True)
class MeasureModel:
    """Measure the whole model on this instance with these records (task to trial id), bringing them there first."""

    instance: str
    trial_ids: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Say:
    """One line for people."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The job is over."""

    state: JobState
    error: str = ""


Instruction = Warm | Grant | Renew | Revoke | MeasureModel | Say | Finish
