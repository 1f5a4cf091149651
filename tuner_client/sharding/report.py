"""The report of a sharded job, from the state machine and what the instances said."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuner_client.job import InstanceReport, JobReport, TaskReport
from tuner_client.sharding.admission import JobFacts
from tuner_client.sharding.link import InstanceLink
from tuner_core.leases.machine import LeaseMachine
from tuner_core.leases.state import TaskLedger
from tuner_core.model import TVM_VERSION, JobState, Workload
from tuner_core.proto.tuner.v1 import tuning_pb2

_PHASES = {
    "starting": "opening the job on the instances",
    "baseline": "measuring the untuned operators",
    "search": "tuning",
    "model": "measuring the whole model",
    "ended": "ended",
}
_AWAITING = "waiting for operators that another job tunes"


@dataclass(frozen=True)
class ShardedJob:
    """What does not change while a sharded job runs; ``spent_s`` is time that earlier clients spent on it."""

    job: str
    spec: tuning_pb2.JobSpec
    facts: JobFacts
    workloads: Mapping[str, Workload]
    created_at: float
    spent_s: float = 0.0


def job_report(
    job: ShardedJob,
    machine: LeaseMachine,
    links: Sequence[InstanceLink],
    *,
    elapsed_s: float,
    measured_before: int = 0,
    status: str = "",
    error: str = "",
) -> JobReport:
    """The job's present state.

    Args:
        job: The job.
        machine: Its state.
        links: Its instances.
        elapsed_s: Since this client took it up.
        measured_before: Trials measured before that.
        status, error: When the machine does not know how it ended.
    """
    finished = machine.finished
    tasks = tuple(_task(ledger, job.workloads[name]) for name, ledger in machine.board.tasks.items())
    measured = sum(task.trials for task in tasks)
    model = machine.model
    fresh = measured - measured_before
    return JobReport(
        job=job.job,
        model=job.spec.model,
        model_digest=job.spec.model_digest,
        status=status or (finished.state.value if finished else JobState.RUNNING.value),
        target=json.loads(job.facts.target_json),
        sm_percent=job.facts.sm_percent,
        sm_count=job.facts.sm_count,
        tasks=tasks,
        baseline_latency_us=model.baseline_us if model else None,
        tuned_latency_us=model.tuned_us if model else None,
        outputs_match=model.outputs_match if model else None,
        measured=measured,
        failed=sum(task.failed for task in tasks),
        reused=sum(task.reused for task in tasks),
        budget=job.spec.trials,
        elapsed_s=job.spent_s + elapsed_s,
        trials_per_s=fresh / elapsed_s if elapsed_s > 0 else 0.0,
        created_at=job.created_at,
        error=error or (finished.error if finished else ""),
        team=job.spec.team,
        phase=_phase(machine),
        device_model=job.facts.device_model,
        tvm_version=TVM_VERSION,
        layout=job.spec.layout,
        instance=machine.model_instance,
        instances=tuple(_instance(link, machine) for link in links),
    )


def _phase(machine: LeaseMachine) -> str:
    if machine.waiting_since_s is not None:
        return "no instance is left"
    left = [task for task in machine.board.tasks.values() if not task.state.final]
    if left and all(task.awaited is not None for task in left):
        return _AWAITING
    return _PHASES.get(machine.phase, machine.phase)


def _task(ledger: TaskLedger, workload: Workload) -> TaskReport:
    return TaskReport(
        name=ledger.plan.name,
        state=ledger.state,
        workload=workload.digest,
        description=workload.description or ledger.plan.name,
        op=workload.op,
        weight=ledger.plan.weight,
        trials=len(ledger.counted),
        reused=ledger.reused,
        failed=sum(ledger.failures.values()),
        failures=dict(sorted(ledger.failures.items())),
        baseline_latency_us=ledger.baseline_us,
        best_latency_us=ledger.best_us,
        verified=ledger.verified,
        instance=ledger.holder or next(iter(ledger.by_instance), ""),
        error=ledger.error,
        best_trial_id=ledger.best_trial_id,
        stopped_early=ledger.stopped_early,
        trials_by_instance={name: count for name, count in ledger.by_instance.items() if ledger.counted and count},
    )


def _instance(link: InstanceLink, machine: LeaseMachine) -> InstanceReport:
    name = link.facts.instance if link.facts else ""
    state = machine.board.instances.get(link.address)
    if link.left_out:
        return InstanceReport(link.address, name, "left out", reason=link.left_out)
    if state is None:
        return InstanceReport(link.address, name, reason=link.trouble)
    now_s = machine.board.now_s
    since_s = state.window_since_s if state.window_since_s is not None else math.inf
    rate = state.window_trials / (now_s - since_s) if now_s - since_s >= 5.0 else state.rate or 0.0
    return InstanceReport(
        address=link.address,
        name=name,
        state=state.state(now_s),
        trials=sum(task.by_instance[link.address] for task in machine.board.tasks.values() if task.plan.tunable),
        late=state.late,
        trials_per_s=rate,
        tasks=tuple(sorted(state.leases)),
        doing=link.doing,
        reason="" if state.alive else link.trouble or state.reason,
    )
