"""What goes into the job's state machine (events) and what comes out of it (instructions)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tuner_core.model import FailureKind, JobState
from tuner_server.search.messages import KnownTrial as KnownTrial


@dataclass(frozen=True)
class Known:
    """What the store holds for a task when the job starts.

    Attributes:
        trials: Search trials, this job's own earlier ones included.
        own: How many of them this job measured before it was interrupted; ``own_failed`` of these failed.
        best_verified: Trace and latency of the published record, if there is one.
        best_is_fallback: The published record is the fallback schedule.
        baseline: Trace and latency of the fallback schedule, when it was measured before.
    """

    trials: tuple[KnownTrial, ...] = ()
    own: int = 0
    own_failed: Mapping[FailureKind, int] = field(default_factory=dict)
    best_verified: KnownTrial | None = None
    best_trial_id: str = ""
    best_is_fallback: bool = False
    baseline: KnownTrial | None = None
    baseline_trial_id: str = ""


# Events


@dataclass(frozen=True)
class Started:
    """The job begins, or goes on after an interruption.

    Attributes:
        known: One entry per task, by index.
        held: Tasks that another job tunes at this moment, with its name: their records are awaited.
    """

    known: Mapping[int, Known]
    held: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClaimTaken:
    """A task that another job held is this job's now: it has published what ``known`` has, or has died."""

    task: int
    known: Known


@dataclass(frozen=True)
class BaselineMeasured:
    """The fallback schedule of a task was built and measured."""

    task: int
    trace: str = field(repr=False)
    median_us: float = 0.0
    trial_id: str = ""


@dataclass(frozen=True)
class BaselineFailed:
    """The fallback schedule of a task could not be built or measured."""

    task: int
    message: str


@dataclass(frozen=True)
class CandidatesReady:
    """New candidates of a batch, together at most as many as asked for; none at all when the space is exhausted.

    Attributes:
        more: The batch is not complete: others are being generated.
    """

    task: int
    batch: int
    traces: tuple[str, ...] = field(repr=False)
    more: bool = False


@dataclass(frozen=True)
class CannotSample:
    """The task's search cannot produce candidates; the reason is for people."""

    task: int
    batch: int
    reason: str


@dataclass(frozen=True)
class SessionLost:
    """The process that held the task's search ended; what it was generating is lost."""

    task: int
    batch: int | None
    reason: str


@dataclass(frozen=True)
class TrialMeasured:
    """A trial was built, measured and stored."""

    task: int
    batch: int
    trace: str = field(repr=False)
    median_us: float = 0.0
    trial_id: str = ""


@dataclass(frozen=True)
class TrialFailed:
    """A trial failed and was stored with its kind."""

    task: int
    batch: int
    trace: str = field(repr=False)
    kind: FailureKind = FailureKind.RUN_ERROR
    message: str = ""
    trial_id: str = ""


@dataclass(frozen=True)
class TrialDropped:
    """A trial was abandoned before it was measured."""

    task: int
    batch: int
    trace: str = field(repr=False)


@dataclass(frozen=True)
class Promoted:
    """The task's best candidates, measured again alone; None for one that failed."""

    task: int
    results: tuple[KnownTrial, ...]


@dataclass(frozen=True)
class Checked:
    """The output of a promoted candidate was compared with the reference.

    Attributes:
        verdict: ``ok``, ``wrong_result``, ``inconclusive`` or ``error``. On ``ok`` it has been published.
    """

    task: int
    trace: str = field(repr=False)
    verdict: str = "ok"
    message: str = ""
    trial_id: str = ""


@dataclass(frozen=True)
class ModelMeasured:
    """The whole model was built and measured, untuned and tuned in turn. None: could not be; the message says why."""

    baseline_us: float | None
    tuned_us: float | None
    outputs_match: bool | None
    message: str = ""


@dataclass(frozen=True)
class CancelRequested:
    """Someone cancelled the job."""


Event = (
    Started
    | ClaimTaken
    | BaselineMeasured
    | BaselineFailed
    | CandidatesReady
    | CannotSample
    | SessionLost
    | TrialMeasured
    | TrialFailed
    | TrialDropped
    | Promoted
    | Checked
    | ModelMeasured
    | CancelRequested
)


# Instructions


@dataclass(frozen=True)
class MeasureBaseline:
    """Build the task's fallback schedule and measure it."""

    task: int


@dataclass(frozen=True)
class OpenSession:
    """Start a search for the task, warm from what is known."""

    task: int
    known: tuple[KnownTrial, ...]


@dataclass(frozen=True)
class Generate:
    """Ask the task's search for a batch of candidates."""

    task: int
    batch: int
    count: int


@dataclass(frozen=True)
class RunTrial:
    """Build, measure and store one candidate."""

    task: int
    batch: int
    trace: str = field(repr=False)


@dataclass(frozen=True)
class Abandon:
    """Drop these trials of a batch, unless they are built already."""

    task: int
    batch: int
    traces: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """Tell the task's search how a batch came out."""

    task: int
    results: tuple[KnownTrial, ...]


@dataclass(frozen=True)
class CloseSession:
    """End the task's search."""

    task: int


@dataclass(frozen=True)
class Forget:
    """These candidates of the task cannot be promoted any more: their artifacts may go."""

    task: int
    traces: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Promote:
    """Measure these candidates again, alone on the device, at the same share."""

    task: int
    traces: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Check:
    """Compare the candidate's output with the reference, and publish it if it is right.

    Attributes:
        median_us: What promotion measured.
        fallback: The candidate is the fallback schedule.
    """

    task: int
    trace: str = field(repr=False)
    median_us: float = 0.0
    fallback: bool = False


@dataclass(frozen=True)
class PrepareModel:
    """Begin to build the untuned model: no new candidate needs the cores."""


@dataclass(frozen=True)
class MeasureModel:
    """Build the model untuned and with these schedules (task index to trace), and measure both in turn."""

    traces: Mapping[int, str] = field(repr=False)


@dataclass(frozen=True)
class Say:
    """One line for people."""

    message: str


@dataclass(frozen=True)
class Finish:
    """The job has ended."""

    state: JobState
    error: str = ""


Instruction = (
    MeasureBaseline
    | OpenSession
    | Generate
    | RunTrial
    | Abandon
    | Report
    | CloseSession
    | Forget
    | Promote
    | Check
    | PrepareModel
    | MeasureModel
    | Say
    | Finish
)


class Sink(Protocol):
    """Where the steps of a state machine put instructions: a list of them, or of these and others."""

    def append(self, instruction: Instruction, /) -> None:
        """Add one."""

    def extend(self, instructions: Iterable[Instruction], /) -> None:
        """Add several, in order."""
