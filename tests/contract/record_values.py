"""Workloads and records for store tests: true content addresses, everything else by choice."""

from __future__ import annotations

import dataclasses
from typing import Any

from tuner_core.model import (
    EvaluatorSettings,
    PartitionKind,
    Record,
    Workload,
    canonical_json,
    sha256_hex,
    target_digest,
    trial_id,
)

TARGET = '{"kind":"llvm","mcpu":"znver4","num-cores":2}'


def make_workload(name: str = "matmul", op: str = "dense", description: str = "", dtype: str = "float32") -> Workload:
    """A workload of that name; the store never looks into bodies, so any text serves as one."""
    body = canonical_json({"operator": name})
    return Workload(
        digest=sha256_hex(body),
        body=body,
        structural_hash="12345678901234567890",
        op=op,
        description=description or f"{op} {name}",
        args_info=(("TENSOR", dtype, (64, 64)), ("TENSOR", dtype, (64,))),
    )


def make_trace(number: int) -> str:
    """A trace in TVM's form that differs from all others by one decision."""
    return canonical_json([[["SampleCategorical", [], [[0, 16], [0.5, 0.5]], ["v0"]]], [[0, number]]])


def make_record(workload: Workload, number: int = 0, **changes: Any) -> Record:
    """A valid record of the workload; ``number`` chooses its schedule, ``changes`` replace fields."""
    median_us = changes.pop("median_us", 100.0 + number)
    if changes.get("failure"):
        median_us = None
    target_json = changes.get("target_json", TARGET)
    record = Record(
        **{
            "trial_id": "",
            "workload_digest": workload.digest,
            "trace": make_trace(number),
            "target_json": target_json,
            "target_digest": target_digest(target_json),
            "device_model": "AMD EPYC 9B14",
            "device_arch": "znver4",
            "sm_percent": 50,
            "sm_count": 1,
            "partition_kind": PartitionKind.CPU,
            "neighbours": 1,
            "latencies_us": (median_us - 0.5, median_us, median_us + 0.25) if median_us else (),
            "median_us": median_us,
            "ci_low_us": median_us and median_us - 0.5,
            "ci_high_us": median_us and median_us + 0.25,
            "evaluator": EvaluatorSettings(2, 4, 20),
            "cuda_version": "",
            "job": "job-1",
            "team": "vision",
            "model": "squeezenet",
            "created_at": 1_790_000_000.123456 + number,
            "instance": "host-a",
            "affinity": (1,),
            "tags": {"branch": "main"},
            "op": workload.op,
            "description": workload.description,
            "layout": "NHWC",
            **changes,
        }
    )
    return dataclasses.replace(record, trial_id=trial_id(record.key, record.trace, record.job, record.verified))
