import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from tuner_core.proto.tuner.v1 import records_pb2 as _records_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskSpec(_message.Message):
    __slots__ = ("name", "workload", "weight", "tunable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TUNABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    workload: _records_pb2.Workload
    weight: int
    tunable: bool
    def __init__(self, name: _Optional[str] = ..., workload: _Optional[_Union[_records_pb2.Workload, _Mapping]] = ..., weight: _Optional[int] = ..., tunable: bool = ...) -> None: ...

class EvaluatorSettings(_message.Message):
    __slots__ = ("number", "repeat", "min_repeat_ms")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REPEAT_FIELD_NUMBER: _ClassVar[int]
    MIN_REPEAT_MS_FIELD_NUMBER: _ClassVar[int]
    number: int
    repeat: int
    min_repeat_ms: int
    def __init__(self, number: _Optional[int] = ..., repeat: _Optional[int] = ..., min_repeat_ms: _Optional[int] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("model", "model_digest", "lifted_module_zlib", "tasks", "target_json", "sm_percent", "trials", "team", "evaluator", "refresh", "seed", "request_id", "tags", "layout", "early_stopping", "negligible_percent", "experience", "build_cost_weight")
    class TagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LIFTED_MODULE_ZLIB_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TARGET_JSON_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    NEGLIGIBLE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    EXPERIENCE_FIELD_NUMBER: _ClassVar[int]
    BUILD_COST_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_digest: str
    lifted_module_zlib: bytes
    tasks: _containers.RepeatedCompositeFieldContainer[TaskSpec]
    target_json: str
    sm_percent: int
    trials: int
    team: str
    evaluator: EvaluatorSettings
    refresh: bool
    seed: int
    request_id: str
    tags: _containers.ScalarMap[str, str]
    layout: str
    early_stopping: int
    negligible_percent: float
    experience: str
    build_cost_weight: float
    def __init__(self, model: _Optional[str] = ..., model_digest: _Optional[str] = ..., lifted_module_zlib: _Optional[bytes] = ..., tasks: _Optional[_Iterable[_Union[TaskSpec, _Mapping]]] = ..., target_json: _Optional[str] = ..., sm_percent: _Optional[int] = ..., trials: _Optional[int] = ..., team: _Optional[str] = ..., evaluator: _Optional[_Union[EvaluatorSettings, _Mapping]] = ..., refresh: bool = ..., seed: _Optional[int] = ..., request_id: _Optional[str] = ..., tags: _Optional[_Mapping[str, str]] = ..., layout: _Optional[str] = ..., early_stopping: _Optional[int] = ..., negligible_percent: _Optional[float] = ..., experience: _Optional[str] = ..., build_cost_weight: _Optional[float] = ...) -> None: ...

class TaskStatus(_message.Message):
    __slots__ = ("name", "state", "workload_digest", "description", "weight", "trials", "reused", "failed", "baseline_latency_us", "best_latency_us", "verified", "instance", "error", "best_trial_id", "op", "failures", "stopped_early")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    BASELINE_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    BEST_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BEST_TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    STOPPED_EARLY_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    workload_digest: str
    description: str
    weight: int
    trials: int
    reused: int
    failed: int
    baseline_latency_us: float
    best_latency_us: float
    verified: bool
    instance: str
    error: str
    best_trial_id: str
    op: str
    failures: _containers.ScalarMap[str, int]
    stopped_early: bool
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., workload_digest: _Optional[str] = ..., description: _Optional[str] = ..., weight: _Optional[int] = ..., trials: _Optional[int] = ..., reused: _Optional[int] = ..., failed: _Optional[int] = ..., baseline_latency_us: _Optional[float] = ..., best_latency_us: _Optional[float] = ..., verified: bool = ..., instance: _Optional[str] = ..., error: _Optional[str] = ..., best_trial_id: _Optional[str] = ..., op: _Optional[str] = ..., failures: _Optional[_Mapping[str, int]] = ..., stopped_early: bool = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("job", "model", "model_digest", "status", "target_json", "sm_percent", "sm_count", "tasks", "baseline_latency_us", "tuned_latency_us", "outputs_match", "trials_measured", "trials_failed", "trials_reused", "trials_budget", "elapsed_s", "trials_per_s", "created_at", "error", "team", "phase", "device_model", "tvm_version", "instance", "device_uuids", "layout")
    JOB_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TARGET_JSON_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    BASELINE_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    TUNED_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_MATCH_FIELD_NUMBER: _ClassVar[int]
    TRIALS_MEASURED_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FAILED_FIELD_NUMBER: _ClassVar[int]
    TRIALS_REUSED_FIELD_NUMBER: _ClassVar[int]
    TRIALS_BUDGET_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    TRIALS_PER_S_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MODEL_FIELD_NUMBER: _ClassVar[int]
    TVM_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUIDS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    job: str
    model: str
    model_digest: str
    status: str
    target_json: str
    sm_percent: int
    sm_count: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskStatus]
    baseline_latency_us: float
    tuned_latency_us: float
    outputs_match: bool
    trials_measured: int
    trials_failed: int
    trials_reused: int
    trials_budget: int
    elapsed_s: float
    trials_per_s: float
    created_at: _timestamp_pb2.Timestamp
    error: str
    team: str
    phase: str
    device_model: str
    tvm_version: str
    instance: str
    device_uuids: _containers.RepeatedScalarFieldContainer[str]
    layout: str
    def __init__(self, job: _Optional[str] = ..., model: _Optional[str] = ..., model_digest: _Optional[str] = ..., status: _Optional[str] = ..., target_json: _Optional[str] = ..., sm_percent: _Optional[int] = ..., sm_count: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskStatus, _Mapping]]] = ..., baseline_latency_us: _Optional[float] = ..., tuned_latency_us: _Optional[float] = ..., outputs_match: bool = ..., trials_measured: _Optional[int] = ..., trials_failed: _Optional[int] = ..., trials_reused: _Optional[int] = ..., trials_budget: _Optional[int] = ..., elapsed_s: _Optional[float] = ..., trials_per_s: _Optional[float] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., error: _Optional[str] = ..., team: _Optional[str] = ..., phase: _Optional[str] = ..., device_model: _Optional[str] = ..., tvm_version: _Optional[str] = ..., instance: _Optional[str] = ..., device_uuids: _Optional[_Iterable[str]] = ..., layout: _Optional[str] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ...) -> None: ...

class SubmitJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: JobStatus
    def __init__(self, status: _Optional[_Union[JobStatus, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    def __init__(self, jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("status", "message")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    status: JobStatus
    message: str
    def __init__(self, status: _Optional[_Union[JobStatus, _Mapping]] = ..., message: _Optional[str] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: JobStatus
    def __init__(self, status: _Optional[_Union[JobStatus, _Mapping]] = ...) -> None: ...

class ResumeJobRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class ResumeJobResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: JobStatus
    def __init__(self, status: _Optional[_Union[JobStatus, _Mapping]] = ...) -> None: ...
