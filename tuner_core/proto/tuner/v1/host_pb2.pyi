from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Device(_message.Message):
    __slots__ = ("kind", "model", "arch", "uuid", "sm_count", "driver_version", "target_json", "name", "shares", "present_shares", "partition_kinds", "cuda_version", "notes", "measuring")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCH_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_FIELD_NUMBER: _ClassVar[int]
    DRIVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_JSON_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    PRESENT_SHARES_FIELD_NUMBER: _ClassVar[int]
    PARTITION_KINDS_FIELD_NUMBER: _ClassVar[int]
    CUDA_VERSION_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    MEASURING_FIELD_NUMBER: _ClassVar[int]
    kind: str
    model: str
    arch: str
    uuid: str
    sm_count: int
    driver_version: str
    target_json: str
    name: str
    shares: _containers.RepeatedScalarFieldContainer[int]
    present_shares: _containers.RepeatedScalarFieldContainer[int]
    partition_kinds: _containers.RepeatedScalarFieldContainer[str]
    cuda_version: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    measuring: Measuring
    def __init__(self, kind: _Optional[str] = ..., model: _Optional[str] = ..., arch: _Optional[str] = ..., uuid: _Optional[str] = ..., sm_count: _Optional[int] = ..., driver_version: _Optional[str] = ..., target_json: _Optional[str] = ..., name: _Optional[str] = ..., shares: _Optional[_Iterable[int]] = ..., present_shares: _Optional[_Iterable[int]] = ..., partition_kinds: _Optional[_Iterable[str]] = ..., cuda_version: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ..., measuring: _Optional[_Union[Measuring, _Mapping]] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("device_model", "device_kind", "device_arch", "target_json", "sm_count", "devices", "on_offer")
    DEVICE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ARCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_JSON_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    ON_OFFER_FIELD_NUMBER: _ClassVar[int]
    device_model: str
    device_kind: str
    device_arch: str
    target_json: str
    sm_count: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    on_offer: bool
    def __init__(self, device_model: _Optional[str] = ..., device_kind: _Optional[str] = ..., device_arch: _Optional[str] = ..., target_json: _Optional[str] = ..., sm_count: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ..., on_offer: bool = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("count", "last_s", "longest_s", "total_s")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_S_FIELD_NUMBER: _ClassVar[int]
    LONGEST_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    count: int
    last_s: float
    longest_s: float
    total_s: float
    def __init__(self, count: _Optional[int] = ..., last_s: _Optional[float] = ..., longest_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...

class Measuring(_message.Message):
    __slots__ = ("pauses", "pause_bound_s", "recoveries", "worker_restarts", "voided_measurements", "faults")
    class FaultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PAUSES_FIELD_NUMBER: _ClassVar[int]
    PAUSE_BOUND_S_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    WORKER_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    VOIDED_MEASUREMENTS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    pauses: Spans
    pause_bound_s: float
    recoveries: Spans
    worker_restarts: int
    voided_measurements: int
    faults: _containers.ScalarMap[str, int]
    def __init__(self, pauses: _Optional[_Union[Spans, _Mapping]] = ..., pause_bound_s: _Optional[float] = ..., recoveries: _Optional[_Union[Spans, _Mapping]] = ..., worker_restarts: _Optional[int] = ..., voided_measurements: _Optional[int] = ..., faults: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("index", "device_uuid", "partition_kind", "sm_percent", "sm_count_seen", "state", "pid", "affinity")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    PARTITION_KIND_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_SEEN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    AFFINITY_FIELD_NUMBER: _ClassVar[int]
    index: int
    device_uuid: str
    partition_kind: str
    sm_percent: int
    sm_count_seen: int
    state: str
    pid: int
    affinity: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., device_uuid: _Optional[str] = ..., partition_kind: _Optional[str] = ..., sm_percent: _Optional[int] = ..., sm_count_seen: _Optional[int] = ..., state: _Optional[str] = ..., pid: _Optional[int] = ..., affinity: _Optional[_Iterable[int]] = ...) -> None: ...

class GetHostRequest(_message.Message):
    __slots__ = ("sm_percent",)
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    sm_percent: int
    def __init__(self, sm_percent: _Optional[int] = ...) -> None: ...

class GetHostResponse(_message.Message):
    __slots__ = ("instance", "version", "protocol", "tvm_version", "cuda_version", "devices", "workers", "running_jobs", "draining", "store", "partition_kinds", "target_json", "sm_count", "trials_measured", "sm_percent", "places")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TVM_VERSION_FIELD_NUMBER: _ClassVar[int]
    CUDA_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_JOBS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    PARTITION_KINDS_FIELD_NUMBER: _ClassVar[int]
    TARGET_JSON_FIELD_NUMBER: _ClassVar[int]
    SM_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRIALS_MEASURED_FIELD_NUMBER: _ClassVar[int]
    SM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    instance: str
    version: str
    protocol: str
    tvm_version: str
    cuda_version: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    running_jobs: _containers.RepeatedScalarFieldContainer[str]
    draining: bool
    store: str
    partition_kinds: _containers.RepeatedScalarFieldContainer[str]
    target_json: str
    sm_count: int
    trials_measured: int
    sm_percent: int
    places: _containers.RepeatedCompositeFieldContainer[Place]
    def __init__(self, instance: _Optional[str] = ..., version: _Optional[str] = ..., protocol: _Optional[str] = ..., tvm_version: _Optional[str] = ..., cuda_version: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., running_jobs: _Optional[_Iterable[str]] = ..., draining: bool = ..., store: _Optional[str] = ..., partition_kinds: _Optional[_Iterable[str]] = ..., target_json: _Optional[str] = ..., sm_count: _Optional[int] = ..., trials_measured: _Optional[int] = ..., sm_percent: _Optional[int] = ..., places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("running_jobs",)
    RUNNING_JOBS_FIELD_NUMBER: _ClassVar[int]
    running_jobs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, running_jobs: _Optional[_Iterable[str]] = ...) -> None: ...
