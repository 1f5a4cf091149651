"""What goes into a shard's state machine, and comes out of it, besides what a job's does."""

from __future__ import annotations

from dataclasses import dataclass

from tuner_server.scheduler import messages as m
from tuner_server.scheduler.progress import Limits

# Events


@dataclass(frozen=True)
class LaneOpened:
    """The shard has partitions to work with."""

    limits: Limits


@dataclass(frozen=True)
class LaneClosed:
    """It has them no more; nothing was under way."""


@dataclass(frozen=True)
class KnownFound:
    """What the store holds for a task."""

    task: int
    known: m.Known


@dataclass(frozen=True)
class ClaimAnswered:
    """What came of a claim; see :class:`tuner_server.scheduler.task_claims.Taken`."""

    task: int
    holder: str = ""
    fresh: bool = True


@dataclass(frozen=True)
class ClaimLost:
    """A claim could not be renewed: the job's other instances are done with the task, or another job has taken it."""

    task: int


@dataclass(frozen=True)
class LeaseRevoked:
    """The client takes a lease back. One that is not held is no matter."""

    task: int
    token: int


@dataclass(frozen=True)
class AllRevoked:
    """Every lease ends; promotions that have begun are finished.

    Attributes:
        reason: As in the leases' end.
    """

    reason: str


@dataclass(frozen=True)
class Stopped:
    """All work has been cancelled, searches are closed: leases end at once, with what they have measured."""

    reason: str
    error: str = ""


@dataclass(frozen=True)
class Tick:
    """Time has passed; ``now_s`` on a clock that does not go back."""

    now_s: float


Event = (
    m.Event
    | LaneOpened
    | LaneClosed
    | KnownFound
    | ClaimAnswered
    | ClaimLost
    | LeaseRevoked
    | AllRevoked
    | Stopped
    | Tick
)

# Instructions


@dataclass(frozen=True)
class LookUp:
    """Find out what the store holds for a task."""

    task: int


@dataclass(frozen=True)
class TakeClaim:
    """Claim a task for the job."""

    task: int


@dataclass(frozen=True)
class ReleaseClaim:
    """The job is done with a task: others may have it."""

    task: int


@dataclass(frozen=True)
class TellBaseline:
    """The client is to know a task's baseline; no latency: the fallback schedule failed."""

    task: int
    token: int
    latency_us: float | None
    trial_id: str = ""
    error: str = ""


@dataclass(frozen=True)
class TellTrial:
    """The client is to know a trial's outcome; its record is durable."""

    task: int
    token: int
    trial_id: str
    latency_us: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class TellEnded:
    """The client is to know that a lease is over, and how; see ``LeaseEnded`` in leases.proto."""

    task: int
    token: int
    reason: str
    measured: int
    verified: bool = False
    best_us: float | None = None
    best_trial_id: str = ""
    fallback: bool = False
    error: str = ""
    baseline_us: float | None = None
    holder: str = ""
    reused: int = 0


Tell = TellBaseline | TellTrial | TellEnded
Instruction = m.Instruction | LookUp | TakeClaim | ReleaseClaim | Tell
