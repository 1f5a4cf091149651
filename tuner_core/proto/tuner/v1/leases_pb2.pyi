from tuner_core.proto.tuner.v1 import tuning_pb2 as _tuning_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenShardRequest(_message.Message):
    __slots__ = ("job", "spec", "lease_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    spec: _tuning_pb2.JobSpec
    lease_s: float
    def __init__(self, job: _Optional[str] = ..., spec: _Optional[_Union[_tuning_pb2.JobSpec, _Mapping]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class OpenShardResponse(_message.Message):
    __slots__ = ("instance", "incarnation", "workers", "batch", "draining", "in_flight")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    instance: str
    incarnation: str
    workers: int
    batch: int
    draining: bool
    in_flight: int
    def __init__(self, instance: _Optional[str] = ..., incarnation: _Optional[str] = ..., workers: _Optional[int] = ..., batch: _Optional[int] = ..., draining: bool = ..., in_flight: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("task", "token", "trials", "conclude", "claim", "take_over")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    CONCLUDE_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    TAKE_OVER_FIELD_NUMBER: _ClassVar[int]
    task: str
    token: int
    trials: int
    conclude: bool
    claim: bool
    take_over: bool
    def __init__(self, task: _Optional[str] = ..., token: _Optional[int] = ..., trials: _Optional[int] = ..., conclude: bool = ..., claim: bool = ..., take_over: bool = ...) -> None: ...

class GrantLeaseRequest(_message.Message):
    __slots__ = ("job", "lease")
    JOB_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    job: str
    lease: Lease
    def __init__(self, job: _Optional[str] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class GrantLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewLeasesRequest(_message.Message):
    __slots__ = ("job", "tokens", "tasks")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    job: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    tasks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., tasks: _Optional[_Iterable[str]] = ...) -> None: ...

class RenewLeasesResponse(_message.Message):
    __slots__ = ("lost", "draining")
    LOST_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    lost: _containers.RepeatedScalarFieldContainer[str]
    draining: bool
    def __init__(self, lost: _Optional[_Iterable[str]] = ..., draining: bool = ...) -> None: ...

class RevokeLeaseRequest(_message.Message):
    __slots__ = ("job", "task", "token")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    job: str
    task: str
    token: int
    def __init__(self, job: _Optional[str] = ..., task: _Optional[str] = ..., token: _Optional[int] = ...) -> None: ...

class RevokeLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MeasureModelRequest(_message.Message):
    __slots__ = ("job", "trial_ids")
    class TrialIdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    TRIAL_IDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    trial_ids: _containers.ScalarMap[str, str]
    def __init__(self, job: _Optional[str] = ..., trial_ids: _Optional[_Mapping[str, str]] = ...) -> None: ...

class MeasureModelResponse(_message.Message):
    __slots__ = ("baseline_latency_us", "tuned_latency_us", "outputs_match", "error")
    BASELINE_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    TUNED_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_MATCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    baseline_latency_us: float
    tuned_latency_us: float
    outputs_match: bool
    error: str
    def __init__(self, baseline_latency_us: _Optional[float] = ..., tuned_latency_us: _Optional[float] = ..., outputs_match: bool = ..., error: _Optional[str] = ...) -> None: ...

class CloseShardRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class CloseShardResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchShardRequest(_message.Message):
    __slots__ = ("job", "after_sequence", "heartbeat_s", "incarnation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    after_sequence: int
    heartbeat_s: float
    incarnation: str
    def __init__(self, job: _Optional[str] = ..., after_sequence: _Optional[int] = ..., heartbeat_s: _Optional[float] = ..., incarnation: _Optional[str] = ...) -> None: ...

class WatchShardResponse(_message.Message):
    __slots__ = ("sequence", "incarnation", "heartbeat", "baseline", "trial", "ended")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    BASELINE_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    incarnation: str
    heartbeat: ShardHeartbeat
    baseline: BaselineMeasured
    trial: TrialFinished
    ended: LeaseEnded
    def __init__(self, sequence: _Optional[int] = ..., incarnation: _Optional[str] = ..., heartbeat: _Optional[_Union[ShardHeartbeat, _Mapping]] = ..., baseline: _Optional[_Union[BaselineMeasured, _Mapping]] = ..., trial: _Optional[_Union[TrialFinished, _Mapping]] = ..., ended: _Optional[_Union[LeaseEnded, _Mapping]] = ...) -> None: ...

class ShardHeartbeat(_message.Message):
    __slots__ = ("draining", "doing", "in_flight")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DOING_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    doing: str
    in_flight: int
    def __init__(self, draining: bool = ..., doing: _Optional[str] = ..., in_flight: _Optional[int] = ...) -> None: ...

class BaselineMeasured(_message.Message):
    __slots__ = ("task", "token", "latency_us", "error", "trial_id")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    task: str
    token: int
    latency_us: float
    error: str
    trial_id: str
    def __init__(self, task: _Optional[str] = ..., token: _Optional[int] = ..., latency_us: _Optional[float] = ..., error: _Optional[str] = ..., trial_id: _Optional[str] = ...) -> None: ...

class TrialFinished(_message.Message):
    __slots__ = ("task", "token", "trial_id", "latency_us", "failure")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    task: str
    token: int
    trial_id: str
    latency_us: float
    failure: str
    def __init__(self, task: _Optional[str] = ..., token: _Optional[int] = ..., trial_id: _Optional[str] = ..., latency_us: _Optional[float] = ..., failure: _Optional[str] = ...) -> None: ...

class LeaseEnded(_message.Message):
    __slots__ = ("task", "token", "reason", "measured", "verified", "best_latency_us", "best_trial_id", "error", "fallback", "baseline_latency_us", "holder", "reused")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    BEST_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    BEST_TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    BASELINE_LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    task: str
    token: int
    reason: str
    measured: int
    verified: bool
    best_latency_us: float
    best_trial_id: str
    error: str
    fallback: bool
    baseline_latency_us: float
    holder: str
    reused: int
    def __init__(self, task: _Optional[str] = ..., token: _Optional[int] = ..., reason: _Optional[str] = ..., measured: _Optional[int] = ..., verified: bool = ..., best_latency_us: _Optional[float] = ..., best_trial_id: _Optional[str] = ..., error: _Optional[str] = ..., fallback: bool = ..., baseline_latency_us: _Optional[float] = ..., holder: _Optional[str] = ..., reused: _Optional[int] = ...) -> None: ...
