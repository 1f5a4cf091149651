"""A job's state machine as the status message that clients see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tuner_core.model import JobState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_server.lanes.lane import Lane
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.progress import TaskProgress


@dataclass(frozen=True)
class JobFacts:
    """What does not change while a job runs. Latencies and times as in the message."""

    job: str
    spec: tuning_pb2.JobSpec
    created_at: float
    instance: str


class Machine(Protocol):
    """What a report reads from a state machine."""

    @property
    def tasks(self) -> Sequence[TaskProgress]:
        """The job's tasks."""

    @property
    def phase(self) -> str:
        """What the job is doing, for people."""

    @property
    def finished(self) -> m.Finish | None:
        """How it ended."""

    @property
    def model(self) -> m.ModelMeasured | None:
        """What the whole model's measurement said."""


def queued_status(facts: JobFacts) -> tuning_pb2.JobStatus:
    """Status of a job that has not begun."""
    spec = facts.spec
    status = tuning_pb2.JobStatus(
        job=facts.job,
        model=spec.model,
        model_digest=spec.model_digest,
        status=JobState.QUEUED,
        target_json=spec.target_json,
        sm_percent=spec.sm_percent,
        trials_budget=spec.trials,
        team=spec.team,
        layout=spec.layout,
        phase="queued",
        instance=facts.instance,
    )
    status.created_at.FromNanoseconds(int(facts.created_at * 1e9))
    for task in spec.tasks:
        status.tasks.add(
            name=task.name,
            state="pending",
            workload_digest=task.workload.digest,
            description=task.workload.description,
            op=task.workload.op,
            weight=task.weight,
        )
    return status


def device_facts(status: tuning_pb2.JobStatus, lane: Lane) -> None:
    """Write into a status what the job runs on."""
    status.target_json = lane.target_json
    status.sm_count = lane.sm_count
    status.device_model = lane.device.model
    status.device_uuids[:] = lane.device_uuids
    status.tvm_version = lane.tvm_version


def running_status(
    facts: JobFacts, machine: Machine, base: tuning_pb2.JobStatus, elapsed_s: float
) -> tuning_pb2.JobStatus:
    """Status of a job whose machine is at work or has ended.

    Args:
        facts: The job.
        machine: Its state.
        base: Status with the device's facts filled in (target, SM count, versions).
        elapsed_s: Time spent running, earlier runs included.
    """
    status = tuning_pb2.JobStatus()
    status.CopyFrom(base)
    del status.tasks[:]
    status.status = machine.finished.state if machine.finished else JobState.RUNNING
    status.error = machine.finished.error if machine.finished else ""
    status.phase = machine.phase
    for spec, task in zip(facts.spec.tasks, machine.tasks, strict=True):
        message = status.tasks.add(
            name=spec.name,
            state=task.state,
            workload_digest=spec.workload.digest,
            description=spec.workload.description,
            op=spec.workload.op,
            weight=spec.weight,
            trials=task.measured,
            reused=task.reused,
            failed=task.failed,
            verified=task.verified,
            instance=facts.instance,
            error=task.error,
            best_trial_id=task.best_trial_id,
            failures={str(kind): count for kind, count in task.failures.items()},
            stopped_early=task.stopped_early,
        )
        if task.baseline_us is not None:
            message.baseline_latency_us = task.baseline_us
        if task.best_us is not None:
            message.best_latency_us = task.best_us
    status.trials_measured = sum(task.measured for task in machine.tasks)
    status.trials_failed = sum(task.failed for task in machine.tasks)
    status.trials_reused = sum(task.reused for task in machine.tasks)
    status.elapsed_s = elapsed_s
    status.trials_per_s = status.trials_measured / elapsed_s if elapsed_s > 0 else 0.0
    if machine.model is not None:
        if machine.model.baseline_us is not None:
            status.baseline_latency_us = machine.model.baseline_us
        if machine.model.tuned_us is not None:
            status.tuned_latency_us = machine.model.tuned_us
        if machine.model.outputs_match is not None:
            status.outputs_match = machine.model.outputs_match
    return status
