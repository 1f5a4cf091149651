import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Workload(_message.Message):
    __slots__ = ("digest", "body_zlib", "structural_hash", "op", "description", "args_info_json")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BODY_ZLIB_FIELD_NUMBER: _ClassVar[int]
    STRUCTURAL_HASH_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    ARGS_INFO_JSON_FIELD_NUMBER: _ClassVar[int]
    digest: str
    body_zlib: bytes
    structural_hash: str
    op: str
    description: str
    args_info_json: str
    def __init__(self, digest: _Optional[str] = ..., body_zlib: _Optional[bytes] = ..., structural_hash: _Optional[str] = ..., op: _Optional[str] = ..., description: _Optional[str] = ..., args_info_json: _Optional[str] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("trial_id", "workload_digest", "trace_zlib", "target_json", "target_digest", "device_model", "device_arch", "sm_percent", "sm_count", "partition_kind", "neighbours", "verified", "latencies_us", "median_us", "ci_low_us", "ci_high_us", "evaluator_json", "tvm_version", "cuda_version", "driver_version", "job", "team", "model", "created_at", "failure", "failure_message", "origin", "instance", "affinity", "tags", "op", "description", "layout")
    class TagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRACE_ZLIB_FIELD_NUMBER: _ClassVar[int]
    TARGET_JSON_FIELD_NUMBER: _ClassVar[int]
    TARGET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ARCH_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_FIELD_NUMBER: _ClassVar[int]
    PARTITION_KIND_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_US_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_US_FIELD_NUMBER: _ClassVar[int]
    CI_LOW_US_FIELD_NUMBER: _ClassVar[int]
    CI_HIGH_US_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_JSON_FIELD_NUMBER: _ClassVar[int]
    TVM_VERSION_FIELD_NUMBER: _ClassVar[int]
    CUDA_VERSION_FIELD_NUMBER: _ClassVar[int]
    DRIVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    trial_id: str
    workload_digest: str
    trace_zlib: bytes
    target_json: str
    target_digest: str
    device_model: str
    device_arch: str
    sm_percent: int
    sm_count: int
    partition_kind: str
    neighbours: int
    verified: bool
    latencies_us: _containers.RepeatedScalarFieldContainer[float]
    median_us: float
    ci_low_us: float
    ci_high_us: float
    evaluator_json: str
    tvm_version: str
    cuda_version: str
    driver_version: str
    job: str
    team: str
    model: str
    created_at: _timestamp_pb2.Timestamp
    failure: str
    failure_message: str
    origin: str
    instance: str
    affinity: _containers.RepeatedScalarFieldContainer[int]
    tags: _containers.ScalarMap[str, str]
    op: str
    description: str
    layout: str
    def __init__(self, trial_id: _Optional[str] = ..., workload_digest: _Optional[str] = ..., trace_zlib: _Optional[bytes] = ..., target_json: _Optional[str] = ..., target_digest: _Optional[str] = ..., device_model: _Optional[str] = ..., device_arch: _Optional[str] = ..., sm_percent: _Optional[int] = ..., sm_count: _Optional[int] = ..., partition_kind: _Optional[str] = ..., neighbours: _Optional[int] = ..., verified: bool = ..., latencies_us: _Optional[_Iterable[float]] = ..., median_us: _Optional[float] = ..., ci_low_us: _Optional[float] = ..., ci_high_us: _Optional[float] = ..., evaluator_json: _Optional[str] = ..., tvm_version: _Optional[str] = ..., cuda_version: _Optional[str] = ..., driver_version: _Optional[str] = ..., job: _Optional[str] = ..., team: _Optional[str] = ..., model: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., failure: _Optional[str] = ..., failure_message: _Optional[str] = ..., origin: _Optional[str] = ..., instance: _Optional[str] = ..., affinity: _Optional[_Iterable[int]] = ..., tags: _Optional[_Mapping[str, str]] = ..., op: _Optional[str] = ..., description: _Optional[str] = ..., layout: _Optional[str] = ...) -> None: ...

class CommitRecordsRequest(_message.Message):
    __slots__ = ("workloads", "records")
    WORKLOADS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    workloads: _containers.RepeatedCompositeFieldContainer[Workload]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, workloads: _Optional[_Iterable[_Union[Workload, _Mapping]]] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class CommitRecordsResponse(_message.Message):
    __slots__ = ("stored", "known")
    STORED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    stored: int
    known: int
    def __init__(self, stored: _Optional[int] = ..., known: _Optional[int] = ...) -> None: ...

class GetRecordRequest(_message.Message):
    __slots__ = ("trial_id",)
    TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    trial_id: str
    def __init__(self, trial_id: _Optional[str] = ...) -> None: ...

class GetRecordResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: Record
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ...) -> None: ...

class GetWorkloadRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class GetWorkloadResponse(_message.Message):
    __slots__ = ("workload",)
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    workload: Workload
    def __init__(self, workload: _Optional[_Union[Workload, _Mapping]] = ...) -> None: ...

class RecordKey(_message.Message):
    __slots__ = ("workload_digest", "target_digest", "device_model", "sm_count", "tvm_version")
    WORKLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TARGET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MODEL_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_FIELD_NUMBER: _ClassVar[int]
    TVM_VERSION_FIELD_NUMBER: _ClassVar[int]
    workload_digest: str
    target_digest: str
    device_model: str
    sm_count: int
    tvm_version: str
    def __init__(self, workload_digest: _Optional[str] = ..., target_digest: _Optional[str] = ..., device_model: _Optional[str] = ..., sm_count: _Optional[int] = ..., tvm_version: _Optional[str] = ...) -> None: ...

class TopRecordsRequest(_message.Message):
    __slots__ = ("key", "limit", "verified_only")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_ONLY_FIELD_NUMBER: _ClassVar[int]
    key: RecordKey
    limit: int
    verified_only: bool
    def __init__(self, key: _Optional[_Union[RecordKey, _Mapping]] = ..., limit: _Optional[int] = ..., verified_only: bool = ...) -> None: ...

class TopRecordsResponse(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class RecordFilter(_message.Message):
    __slots__ = ("op", "model", "device_model", "sm_percent", "min_sm_percent", "max_sm_percent", "team", "verified_only", "job", "workload_digest", "target_digest", "tvm_version", "include_failed", "since", "tags", "text", "sm_count", "dtype", "shape", "nearest_sm_percent")
    class TagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    OP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MODEL_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MIN_SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MAX_SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_ONLY_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TARGET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TVM_VERSION_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FAILED_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NEAREST_SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    op: str
    model: str
    device_model: str
    sm_percent: int
    min_sm_percent: int
    max_sm_percent: int
    team: str
    verified_only: bool
    job: str
    workload_digest: str
    target_digest: str
    tvm_version: str
    include_failed: bool
    since: _timestamp_pb2.Timestamp
    tags: _containers.ScalarMap[str, str]
    text: str
    sm_count: int
    dtype: str
    shape: str
    nearest_sm_percent: int
    def __init__(self, op: _Optional[str] = ..., model: _Optional[str] = ..., device_model: _Optional[str] = ..., sm_percent: _Optional[int] = ..., min_sm_percent: _Optional[int] = ..., max_sm_percent: _Optional[int] = ..., team: _Optional[str] = ..., verified_only: bool = ..., job: _Optional[str] = ..., workload_digest: _Optional[str] = ..., target_digest: _Optional[str] = ..., tvm_version: _Optional[str] = ..., include_failed: bool = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tags: _Optional[_Mapping[str, str]] = ..., text: _Optional[str] = ..., sm_count: _Optional[int] = ..., dtype: _Optional[str] = ..., shape: _Optional[str] = ..., nearest_sm_percent: _Optional[int] = ...) -> None: ...

class QueryRecordsRequest(_message.Message):
    __slots__ = ("filter", "limit", "cursor", "order", "top_per_key", "omit_traces")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TOP_PER_KEY_FIELD_NUMBER: _ClassVar[int]
    OMIT_TRACES_FIELD_NUMBER: _ClassVar[int]
    filter: RecordFilter
    limit: int
    cursor: str
    order: str
    top_per_key: int
    omit_traces: bool
    def __init__(self, filter: _Optional[_Union[RecordFilter, _Mapping]] = ..., limit: _Optional[int] = ..., cursor: _Optional[str] = ..., order: _Optional[str] = ..., top_per_key: _Optional[int] = ..., omit_traces: bool = ...) -> None: ...

class QueryRecordsResponse(_message.Message):
    __slots__ = ("records", "next_cursor")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    next_cursor: str
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., next_cursor: _Optional[str] = ...) -> None: ...

class StreamRecordsRequest(_message.Message):
    __slots__ = ("filter", "order", "top_per_key", "limit", "omit_traces", "cursor")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TOP_PER_KEY_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OMIT_TRACES_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    filter: RecordFilter
    order: str
    top_per_key: int
    limit: int
    omit_traces: bool
    cursor: str
    def __init__(self, filter: _Optional[_Union[RecordFilter, _Mapping]] = ..., order: _Optional[str] = ..., top_per_key: _Optional[int] = ..., limit: _Optional[int] = ..., omit_traces: bool = ..., cursor: _Optional[str] = ...) -> None: ...

class StreamRecordsResponse(_message.Message):
    __slots__ = ("records", "cursor")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    cursor: str
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., cursor: _Optional[str] = ...) -> None: ...

class FollowRecordsRequest(_message.Message):
    __slots__ = ("filter", "after", "limit", "wait_s", "omit_traces")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    OMIT_TRACES_FIELD_NUMBER: _ClassVar[int]
    filter: RecordFilter
    after: str
    limit: int
    wait_s: float
    omit_traces: bool
    def __init__(self, filter: _Optional[_Union[RecordFilter, _Mapping]] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ..., wait_s: _Optional[float] = ..., omit_traces: bool = ...) -> None: ...

class FollowRecordsResponse(_message.Message):
    __slots__ = ("records", "cursor")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    cursor: str
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., cursor: _Optional[str] = ...) -> None: ...

class TagRecordRequest(_message.Message):
    __slots__ = ("trial_id", "set", "remove", "team")
    class SetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRIAL_ID_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    trial_id: str
    set: _containers.ScalarMap[str, str]
    remove: _containers.RepeatedScalarFieldContainer[str]
    team: str
    def __init__(self, trial_id: _Optional[str] = ..., set: _Optional[_Mapping[str, str]] = ..., remove: _Optional[_Iterable[str]] = ..., team: _Optional[str] = ...) -> None: ...

class TagRecordResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: Record
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("stats_json",)
    STATS_JSON_FIELD_NUMBER: _ClassVar[int]
    stats_json: str
    def __init__(self, stats_json: _Optional[str] = ...) -> None: ...

class PruneRecordsRequest(_message.Message):
    __slots__ = ("older_than", "team", "dry_run")
    OLDER_THAN_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    older_than: _timestamp_pb2.Timestamp
    team: str
    dry_run: bool
    def __init__(self, older_than: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., team: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class PruneRecordsResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: int
    def __init__(self, deleted: _Optional[int] = ...) -> None: ...
