"""Client of the autotuning service: the Python API. The command is ``tuner-client``.

``tune`` tunes a model; ``Client`` does everything the commands do; ``RecordDatabase`` lets TVM apply records.
Nothing is imported before it is used: TVM and gRPC take seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner_client.api import Client, tune
    from tuner_client.job import JobInterrupted, JobReport, TaskReport
    from tuner_client.records import RecordDatabase
    from tuner_client.request import TuneRequest
    from tuner_client.sharding.tuning import ShardedTuner, ShardingOptions
    from tuner_core.errors import TunerError
    from tuner_core.store.interface import RecordFilter
    from tuner_core.transport.options import ConnectionOptions

__all__ = [
    "Client",
    "ConnectionOptions",
    "JobInterrupted",
    "JobReport",
    "RecordDatabase",
    "RecordFilter",
    "ShardedTuner",
    "ShardingOptions",
    "TaskReport",
    "TuneRequest",
    "TunerError",
    "tune",
]
_WHERE = {
    "Client": "tuner_client.api",
    "ConnectionOptions": "tuner_core.transport.options",
    "JobInterrupted": "tuner_client.job",
    "JobReport": "tuner_client.job",
    "RecordDatabase": "tuner_client.records",
    "RecordFilter": "tuner_core.store.interface",
    "ShardedTuner": "tuner_client.sharding.tuning",
    "ShardingOptions": "tuner_client.sharding.tuning",
    "TaskReport": "tuner_client.job",
    "TuneRequest": "tuner_client.request",
    "TunerError": "tuner_core.errors",
    "tune": "tuner_client.api",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
