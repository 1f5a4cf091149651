"""The vocabulary of the product as frozen values: workloads, targets, devices, partitions, records.

Nothing here imports TVM or gRPC, so that every room can. Latencies are microseconds (``_us``), durations seconds
(``_s``).
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROTOCOL = "tuner.v1"
TVM_VERSION = "0.27.0.post1"


class FailureKind(enum.StrEnum):
    """Why a trial has no latency."""

    BUILD_ERROR = "build_error"
    BUILD_TIMEOUT = "build_timeout"
    RUN_ERROR = "run_error"
    RUN_TIMEOUT = "run_timeout"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_LOST = "worker_lost"
    WRONG_RESULT = "wrong_result"
    INVALID_TRACE = "invalid_trace"


class PartitionKind(enum.StrEnum):
    """How a worker's share of its device is granted."""

    EXCLUSIVE = "exclusive"
    MPS = "mps"
    CPU = "cpu"


class Origin(enum.StrEnum):
    """Where a record's schedule comes from."""

    SEARCH = "search"
    FALLBACK = "fallback"
    IMPORT = "import"


class TaskState(enum.StrEnum):
    """What became of a task. ``pending`` and ``running`` are passing states; the others are final."""

    PENDING = "pending"
    RUNNING = "running"
    TUNED = "tuned"
    REUSED = "reused"
    FALLBACK = "fallback"
    FAILED = "failed"
    SKIPPED = "skipped"

    @property
    def final(self) -> bool:
        """Whether the task will not change any more."""
        return self not in (TaskState.PENDING, TaskState.RUNNING)


class JobState(enum.StrEnum):
    """What became of a job. ``stopped`` was saved by a stopping server and waits for ``resume``."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    PARTLY = "partly"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Whether the job will not go on by itself."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256_hex(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, lower-case hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def target_digest(target_json: str) -> str:
    """Digest of a target given as JSON, independent of key order and spacing."""
    return sha256_hex(canonical_json(json.loads(target_json)))


@dataclass(frozen=True)
class Workload:
    """One operator as a normalised TIR IRModule.

    Attributes:
        digest: sha256 of ``body``, lower-case hex.
        body: Canonical JSON of the IRModule (``tuner_core.compiler.workload`` writes and reads it).
        structural_hash: TVM's 64-bit structural hash, decimal: a hint for look-ups, never proof of equality.
        op: Operator kind, e.g. ``conv2d``, ``depthwise_conv2d``, ``dense``, ``max_pool2d``.
        description: For people, e.g. ``conv2d 1x56x56x64 -> 64, 3x3, fp32, NHWC``.
        args_info: One ``("TENSOR", dtype, shape)`` per parameter of ``main``, outputs last.
    """

    digest: str
    body: str = field(repr=False)
    structural_hash: str = ""
    op: str = ""
    description: str = ""
    args_info: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    @property
    def cost_guess(self) -> float:
        """What one call costs, of use only to put operators in order before anything is measured.

        The square root of the product of its three largest tensors: the number of multiplications of a matrix product,
        and close enough for a convolution.
        """
        sizes = sorted((math.prod(shape) for _, _, shape in self.args_info), reverse=True)
        return math.sqrt(math.prod(sizes[:3])) if sizes else 1.0


@dataclass(frozen=True)
class EvaluatorSettings:
    """How a latency is sampled: ``repeat`` samples, each a mean of ``number`` calls or more, for ``min_repeat_ms``."""

    number: int = 1
    repeat: int = 3
    min_repeat_ms: int = 10


@dataclass(frozen=True)
class DeviceInfo:
    """One device of a host. ``sm_count`` is SMs on a GPU, cores on a CPU."""

    kind: str
    model: str
    arch: str
    uuid: str
    sm_count: int
    driver_version: str = ""
    cuda_version: str = ""


@dataclass(frozen=True)
class RecordKey:
    """The strict look-up key: a record applies only where all five agree."""

    workload_digest: str
    target_digest: str
    device_model: str
    sm_count: int
    tvm_version: str = TVM_VERSION


@dataclass(frozen=True)
class Record:
    """One measured schedule (or one failed trial) with everything needed to trust, find and reapply it.

    Attributes:
        trial_id: Content address, see :func:`trial_id`.
        trace: JSON of the schedule's trace, as TVM's ``TuningRecord.as_json()[0]``.
        sm_percent: The share that was asked for, 1..100.
        sm_count: SMs (or cores) that the worker really saw.
        neighbours: Measurements that ran on the device at the same time.
        verified: Measured again alone on the device at the same share.
        latencies_us: Samples; empty for a failed trial.
        median_us, ci_low_us, ci_high_us: Median of the samples and its confidence interval; None for a failed trial.
        failure: Why the trial has no latency; None for a valid record.
        affinity: Cores that the worker was pinned to; empty on a GPU.
        layout: ``NCHW`` or ``NHWC``: of the model's 2-D convolutions when it was prepared. Empty: it has none, or the
            record is from before layouts were noted.
        created_at: Seconds since the epoch.
    """

    trial_id: str
    workload_digest: str
    trace: str = field(repr=False)
    target_json: str
    target_digest: str
    device_model: str
    device_arch: str
    sm_percent: int
    sm_count: int
    partition_kind: PartitionKind
    neighbours: int = 0
    verified: bool = False
    latencies_us: tuple[float, ...] = ()
    median_us: float | None = None
    ci_low_us: float | None = None
    ci_high_us: float | None = None
    evaluator: EvaluatorSettings = EvaluatorSettings()
    tvm_version: str = TVM_VERSION
    cuda_version: str = ""
    driver_version: str = ""
    job: str = ""
    team: str = ""
    model: str = ""
    created_at: float = field(default_factory=time.time)
    failure: FailureKind | None = None
    failure_message: str = ""
    origin: Origin = Origin.SEARCH
    instance: str = ""
    affinity: tuple[int, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    op: str = ""
    description: str = ""
    layout: str = ""

    @property
    def key(self) -> RecordKey:
        """The strict look-up key of this record."""
        return RecordKey(self.workload_digest, self.target_digest, self.device_model, self.sm_count, self.tvm_version)

    @property
    def valid(self) -> bool:
        """Whether the record has a latency and may be applied."""
        return self.failure is None and self.median_us is not None


def trial_id(key: RecordKey, trace: str, job: str, verified: bool) -> str:
    """Content address of a trial: the same trial stored twice is one record.

    Args:
        key: Look-up key of the record.
        trace: JSON of the trace; spacing and key order do not matter.
        job: Job that measured it.
        verified: A trial and its exclusive re-measurement are two records.

    Returns:
        sha256, lower-case hex.
    """
    return trial_id_of_digest(key, trace_digest(trace), job, verified)


def trace_digest(trace: str) -> str:
    """Digest of a trace given as JSON, independent of key order and spacing."""
    return sha256_hex(canonical_json(json.loads(trace)))


def trial_id_of_digest(key: RecordKey, digest: str, job: str, verified: bool) -> str:
    """:func:`trial_id` for a trace whose :func:`trace_digest` is known already."""
    parts = [
        key.workload_digest,
        key.target_digest,
        key.device_model,
        key.sm_count,
        key.tvm_version,
        digest,
        job,
        verified,
    ]
    return sha256_hex(canonical_json(parts))
