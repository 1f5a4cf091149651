"""A job's state as plain values, and the JSON document that every command prints for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuner_core.errors import ExitCode
from tuner_core.model import JobState, TaskState

if TYPE_CHECKING:
    from tuner_core.proto.tuner.v1 import tuning_pb2

DETACHED = "detached"
_EXIT_CODES = {
    JobState.DONE.value: ExitCode.DONE,
    JobState.PARTLY.value: ExitCode.PARTLY,
    DETACHED: ExitCode.DONE,
}


@dataclass(frozen=True)
class TaskReport:
    """One operator of a job.

    Attributes:
        name: Name of the task within the model.
        state: One of :class:`tuner_core.model.TaskState`.
        workload: Digest of the workload.
        weight: How often the model calls it.
        trials: Measured for this job, failed ones included.
        reused: Trials taken from the store.
        failed: Failed trials; ``failures`` counts them by kind.
        baseline_latency_us: Latency of the fallback schedule, None when not measured.
        best_latency_us: Best latency known, None when there is none.
        verified: The best one was measured again alone on the device, and its output is right.
        instance: Server that tuned it; of a sharded job its address, the last one when it moved.
        stopped_early: Its trials made too little progress, and the rest of them went to others.
        trials_by_instance: Of a sharded job: who measured how many of them, by address.
        error: Why it failed or was left to the fallback schedule, for people.
    """

    name: str
    state: TaskState
    workload: str
    description: str
    op: str = ""
    weight: int = 1
    trials: int = 0
    reused: int = 0
    failed: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    baseline_latency_us: float | None = None
    best_latency_us: float | None = None
    verified: bool = False
    instance: str = ""
    error: str = ""
    best_trial_id: str = ""
    stopped_early: bool = False
    trials_by_instance: Mapping[str, int] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Baseline latency divided by the best one."""
        if not self.baseline_latency_us or not self.best_latency_us:
            return None
        return self.baseline_latency_us / self.best_latency_us

    def document(self) -> dict[str, Any]:
        """The task's entry in the JSON document."""
        return {
            "name": self.name,
            "state": self.state.value,
            "workload": self.workload,
            "description": self.description,
            "op": self.op,
            "weight": self.weight,
            "trials": self.trials,
            "reused": self.reused,
            "failed": self.failed,
            "failures": dict(self.failures),
            "baseline_latency_us": self.baseline_latency_us,
            "best_latency_us": self.best_latency_us,
            "verified": self.verified,
            "instance": self.instance,
            "error": self.error or None,
            "trial_id": self.best_trial_id or None,
            "trials_by_instance": dict(self.trials_by_instance),
            "stopped_early": self.stopped_early,
        }


@dataclass(frozen=True)
class InstanceReport:
    """One server instance of a sharded job.

    Attributes:
        address: As it was named, or what its name stood for.
        name: What it calls itself; changes when it restarts.
        state: healthy, suspect, slow, draining, dead, connecting, or ``left out``.
        trials: Measured by it and counted.
        late: Results of leases that it had lost: kept as records, not counted.
        tasks: What it holds now.
        doing: In its own words.
        reason: Why it is dead or left out.
    """

    address: str
    name: str = ""
    state: str = "connecting"
    trials: int = 0
    late: int = 0
    trials_per_s: float = 0.0
    tasks: tuple[str, ...] = ()
    doing: str = ""
    reason: str = ""

    def document(self) -> dict[str, Any]:
        """The instance's entry in the JSON document."""
        return {
            "address": self.address,
            "name": self.name,
            "state": self.state,
            "trials": self.trials,
            "late": self.late,
            "trials_per_s": round(self.trials_per_s, 3),
            "tasks": list(self.tasks),
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class JobReport:
    """One job: what it is, how far it is, how it ended.

    Attributes:
        status: One of :class:`tuner_core.model.JobState`, or ``detached`` when the client left it running.
        sm_percent, sm_count: The share asked for, and the SMs (or cores) that it means.
        baseline_latency_us, tuned_latency_us: Of the whole model, measured, not added up.
        outputs_match: Whether the tuned model's outputs equal the baseline's on the same inputs.
        budget: Trials the job may spend.
        elapsed_s: Time spent on the job by the server.
        phase: What it does now, for people.
        created_at: Seconds since the epoch.
        layout: Of the model's 2-D convolutions, NCHW or NHWC; empty without any.
        devices: UUIDs of the devices that it runs on, all of ``device_model``.
        output: File that was built, if one was.
        coverage: Of the built file: how many operators run a tuned schedule.
        instances: Of a job that is sharded over several servers: who they are and what they did.
    """

    job: str
    model: str
    status: str
    model_digest: str = ""
    target: Mapping[str, Any] = field(default_factory=dict)
    sm_percent: int = 0
    sm_count: int = 0
    tasks: tuple[TaskReport, ...] = ()
    baseline_latency_us: float | None = None
    tuned_latency_us: float | None = None
    outputs_match: bool | None = None
    measured: int = 0
    failed: int = 0
    reused: int = 0
    budget: int = 0
    elapsed_s: float = 0.0
    trials_per_s: float = 0.0
    created_at: float = 0.0
    error: str = ""
    team: str = ""
    phase: str = ""
    device_model: str = ""
    devices: tuple[str, ...] = ()
    tvm_version: str = ""
    layout: str = ""
    instance: str = ""
    output: str = ""
    coverage: Mapping[str, Any] | None = None
    instances: tuple[InstanceReport, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the job will not go on by itself."""
        return self.status == DETACHED or JobState(self.status).ended

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of a command that reports this job."""
        return _EXIT_CODES.get(self.status, ExitCode.FAILED)

    @property
    def speedup(self) -> float | None:
        """Baseline latency of the whole model divided by the tuned one."""
        if not self.baseline_latency_us or not self.tuned_latency_us:
            return None
        return self.baseline_latency_us / self.tuned_latency_us

    def count(self, *states: TaskState) -> int:
        """How many tasks are in one of these states."""
        return sum(task.state in states for task in self.tasks)

    def document(self) -> dict[str, Any]:
        """The JSON document of ``tune``, ``watch`` and ``resume``. Fields are added, never renamed."""
        document: dict[str, Any] = {
            "job": self.job,
            "model": self.model,
            "model_digest": self.model_digest,
            "status": self.status,
            "error": self.error or None,
            "target": dict(self.target),
            "device": self.device_model,
            "devices": list(self.devices),
            "sm_percent": self.sm_percent,
            "sm_count": self.sm_count,
            "tasks": [task.document() for task in self.tasks],
            "model_latency_us": {"baseline": self.baseline_latency_us, "tuned": self.tuned_latency_us},
            "outputs_match": self.outputs_match,
            "trials": {
                "measured": self.measured,
                "failed": self.failed,
                "reused": self.reused,
                "budget": self.budget,
            },
            "elapsed_s": round(self.elapsed_s, 3),
            "trials_per_s": round(self.trials_per_s, 3),
            "team": self.team,
            "instance": self.instance,
            "instances": [instance.document() for instance in self.instances],
            "tvm_version": self.tvm_version,
            "layout": self.layout or None,
            "created_at": self.created_at,
        }
        if self.output:
            document["output"] = self.output
            document["coverage"] = dict(self.coverage or {})
        return document


class JobInterrupted(KeyboardInterrupt):
    """Ctrl-C while a job was being followed.

    Attributes:
        report: The job's last known state; its status is ``detached`` when the server goes on with it, ``stopped``
            when the local server saved it and ended.
    """

    def __init__(self, report: JobReport) -> None:
        super().__init__(f"job {report.job} {report.status}")
        self.report = report


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _task_report(status: tuning_pb2.TaskStatus) -> TaskReport:
    try:
        state = TaskState(status.state)
    except ValueError:  # a newer server's
        state = TaskState.RUNNING
    return TaskReport(
        name=status.name,
        state=state,
        workload=status.workload_digest,
        description=status.description or status.name,
        op=status.op,
        weight=status.weight,
        trials=status.trials,
        reused=status.reused,
        failed=status.failed,
        failures=dict(sorted(status.failures.items())),
        baseline_latency_us=_optional(status, "baseline_latency_us"),
        best_latency_us=_optional(status, "best_latency_us"),
        verified=status.verified,
        instance=status.instance,
        error=status.error,
        best_trial_id=status.best_trial_id,
        stopped_early=status.stopped_early,
    )


def job_report(status: tuning_pb2.JobStatus) -> JobReport:
    """The report of a status that came over the wire."""
    try:
        state = JobState(status.status).value
    except ValueError:  # a newer server's
        state = JobState.RUNNING.value
    try:
        target = json.loads(status.target_json) if status.target_json else {}
    except ValueError:
        target = {}
    return JobReport(
        job=status.job,
        model=status.model,
        model_digest=status.model_digest,
        status=state,
        target=target,
        sm_percent=status.sm_percent,
        sm_count=status.sm_count,
        tasks=tuple(_task_report(task) for task in status.tasks),
        baseline_latency_us=_optional(status, "baseline_latency_us"),
        tuned_latency_us=_optional(status, "tuned_latency_us"),
        outputs_match=_optional(status, "outputs_match"),
        measured=status.trials_measured,
        failed=status.trials_failed,
        reused=status.trials_reused,
        budget=status.trials_budget,
        elapsed_s=status.elapsed_s,
        trials_per_s=status.trials_per_s,
        created_at=status.created_at.seconds + status.created_at.nanos / 1e9,
        error=status.error,
        team=status.team,
        phase=status.phase,
        device_model=status.device_model,
        devices=tuple(status.device_uuids),
        tvm_version=status.tvm_version,
        layout=status.layout,
        instance=status.instance,
    )
