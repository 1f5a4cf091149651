"""Checks of a job's request before it is taken in."""

from __future__ import annotations

import hashlib
import json
import zlib

from tuner_core.errors import UsageError
from tuner_core.proto.tuner.v1 import tuning_pb2

MAX_TRIALS = 1_000_000
MAX_TASKS = 10_000
MAX_BODY_BYTES = 16 << 20
MAX_COST_WEIGHT = 10.0
EXPERIENCES = ("", "store", "job", "none")


def validate_spec(spec: tuning_pb2.JobSpec) -> None:
    """Check a job's request before it is taken in.

    Raises:
        UsageError: Says what is wrong.
    """
    if not 1 <= spec.sm_percent <= 100:
        raise UsageError(f"sm_percent is {spec.sm_percent}, but must be 1 to 100")
    if not 1 <= spec.trials <= MAX_TRIALS:
        raise UsageError(f"trials is {spec.trials}, but must be 1 to {MAX_TRIALS:,}")
    if len(spec.tasks) > MAX_TASKS:
        raise UsageError(f"the job has {len(spec.tasks)} tasks, over the limit of {MAX_TASKS:,}")
    for task in spec.tasks:
        body = _inflate(task.workload.body_zlib, f"the workload of task {task.name}")
        if hashlib.sha256(body).hexdigest() != task.workload.digest:
            raise UsageError(f"the workload of task {task.name} does not have the digest that it claims")
        if task.weight < 1:
            raise UsageError(f"the weight of task {task.name} is {task.weight}, but must be at least 1")
    if spec.HasField("evaluator"):
        asked = spec.evaluator
        if asked.number < 1 or asked.repeat < 1 or not 0 <= asked.min_repeat_ms <= 10_000:
            raise UsageError("evaluator settings are out of range: number and repeat from 1, min_repeat_ms 0 to 10000")
    if spec.early_stopping < 0:
        raise UsageError(f"early_stopping is {spec.early_stopping}, but must be a number of trials, or 0 for never")
    if not 0 <= spec.negligible_percent < 100:
        raise UsageError(f"negligible_percent is {spec.negligible_percent:g}, but must be 0 or more, and under 100")
    if not 0 <= spec.build_cost_weight <= MAX_COST_WEIGHT:
        raise UsageError(f"build_cost_weight is {spec.build_cost_weight:g}, but must be 0 to {MAX_COST_WEIGHT:g}")
    if spec.experience not in EXPERIENCES:
        raise UsageError(f"experience is '{spec.experience[:40]}', but must be one of {', '.join(EXPERIENCES[1:])}")
    if spec.target_json:
        try:
            json.loads(spec.target_json)
        except ValueError:
            raise UsageError("the target is not JSON") from None


def _inflate(data: bytes, what: str) -> bytes:
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(data, MAX_BODY_BYTES)
    except zlib.error:
        raise UsageError(f"{what} is not zlib data") from None
    if stream.unconsumed_tail:
        raise UsageError(f"{what} is over the limit of {MAX_BODY_BYTES >> 20} MiB")
    return body
