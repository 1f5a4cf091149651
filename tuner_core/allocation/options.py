"""What a job says about sharing out its trials, with the defaults for what it leaves open."""

from __future__ import annotations

from tuner_core.allocation.budget import DEFAULT_NEGLIGIBLE_SHARE
from tuner_core.allocation.stopping import DEFAULT_PATIENCE, EarlyStopping
from tuner_core.proto.tuner.v1 import tuning_pb2


def stopping_of(spec: tuning_pb2.JobSpec) -> EarlyStopping:
    """When a job stops a task."""
    return EarlyStopping(spec.early_stopping if spec.HasField("early_stopping") else DEFAULT_PATIENCE)


def negligible_share_of(spec: tuning_pb2.JobSpec) -> float:
    """The share of the untuned model below which a job's tasks get no trials."""
    return spec.negligible_percent / 100 if spec.HasField("negligible_percent") else DEFAULT_NEGLIGIBLE_SHARE
