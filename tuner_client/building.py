"""Build a model from records: look its operators up, apply what is found, export a file that stock TVM loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_client.job import JobReport
from tuner_core.errors import ConflictError, ModelError, TunerError
from tuner_core.model import Origin, RecordKey, target_digest
from tuner_core.store.interface import RecordStore

if TYPE_CHECKING:
    from tuner_client.model.prepare import Prepared


@dataclass(frozen=True)
class BuildReport:
    """What a build used.

    Attributes:
        output: The file.
        tuned: Operators that run a schedule from a record.
        fallback: Operators that run the fallback schedule.
        verified: How many of the tuned ones run a verified record.
        missing: Operators worth tuning that have no record.
        invalid: Operators whose record did not apply, with the reason; they run the fallback schedule.
        calls, tuned_calls: The same counted by how often the model calls them.
    """

    output: Path
    target: Mapping[str, Any]
    device_model: str
    sm_count: int
    tuned: tuple[str, ...]
    fallback: tuple[str, ...]
    verified: int
    calls: int
    tuned_calls: int
    missing: tuple[str, ...] = ()
    invalid: Mapping[str, str] = field(default_factory=dict)

    @property
    def operators(self) -> int:
        """Operators of the model."""
        return len(self.tuned) + len(self.fallback)

    def line(self) -> str:
        """The coverage report."""
        text = f"{len(self.tuned)} of {self.operators} operators tuned"
        if self.tuned:
            text += f" ({self.verified} verified)"
        return text

    def coverage(self) -> dict[str, Any]:
        """The coverage report for a JSON document."""
        return {
            "operators": self.operators,
            "tuned": len(self.tuned),
            "verified": self.verified,
            "fallback": len(self.fallback),
            "calls": self.calls,
            "tuned_calls": self.tuned_calls,
            "tuned_operators": list(self.tuned),
            "fallback_operators": list(self.fallback),
            "missing": list(self.missing),
            "invalid": dict(self.invalid),
        }

    def document(self) -> dict[str, Any]:
        """The JSON document of ``build``."""
        return {
            "output": str(self.output),
            "target": dict(self.target),
            "device": self.device_model,
            "sm_count": self.sm_count,
            "coverage": self.coverage(),
        }


@dataclass(frozen=True)
class Chosen:
    """Traces by workload digest, and how many of them come from verified records."""

    traces: Mapping[str, str]
    verified: int
    missing: tuple[str, ...]


def choose_by_key(
    prepared: Prepared, store: RecordStore, *, target_json: str, device_model: str, sm_count: int
) -> Chosen:
    """The best record of each operator under the strict key; ``missing`` names the tunable ones without any."""
    digest = target_digest(target_json)
    traces: dict[str, str] = {}
    verified = 0
    missing = []
    for task in prepared.tasks:
        found = store.top(RecordKey(task.workload.digest, digest, device_model, sm_count))
        if found and found[0].origin is not Origin.FALLBACK:  # the build has the fallback schedule itself
            traces[task.workload.digest] = found[0].trace
            verified += found[0].verified
        elif not found and task.tunable:
            missing.append(task.workload.description)
    return Chosen(traces, verified, tuple(missing))


def choose_for_job(prepared: Prepared, store: RecordStore, report: JobReport, target_json: str) -> Chosen:
    """The records that a job published, and those of the strict key for operators that it has none for.

    Raises:
        ConflictError: The model has other operators than the job's.
    """
    ours = {task.workload.digest for task in prepared.tasks}
    theirs = {task.workload for task in report.tasks}
    if ours != theirs:
        raise ConflictError(
            f"the model has other operators than {report.job} tuned ({len(ours - theirs)} of {len(ours)} differ); "
            "use the same file and the same --input-shape"
        )
    by_key = choose_by_key(
        prepared, store, target_json=target_json, device_model=report.device_model, sm_count=report.sm_count
    )
    traces = dict(by_key.traces)
    verified = by_key.verified
    for task in report.tasks:
        record = store.get(task.best_trial_id) if task.best_trial_id and task.workload not in traces else None
        if record is not None and record.valid and record.origin is not Origin.FALLBACK:
            traces[task.workload] = record.trace
            verified += record.verified
    return Chosen(traces, verified, by_key.missing)


def build_model(
    prepared: Prepared, chosen: Chosen, output: Path, *, target_json: str, device_model: str, sm_count: int
) -> BuildReport:
    """Apply the traces to the prepared module, fallback schedules to the rest, build and write the file.

    Raises:
        ModelError: It does not build.
        TunerError: The file cannot be written.
    """
    import json

    from tvm.target import Target

    from tuner_core.compiler.apply import apply_schedules
    from tuner_core.compiler.executable import build_executable, export_executable

    target = Target(json.loads(target_json))
    scheduled, coverage = apply_schedules(prepared.module, target, chosen.traces)
    partial = output.with_name(f".{output.name}.{os.getpid()}.so")
    try:
        executable = build_executable(scheduled, target)
        export_executable(executable, partial)
        os.replace(partial, output)
    except OSError as error:
        raise TunerError(f"cannot write {output} ({error.strerror or error})") from error
    except TunerError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelError(f"the model does not build for this target: {reason[-1] if reason else error!r}") from error
    finally:
        partial.unlink(missing_ok=True)
    return BuildReport(
        output=output,
        target=json.loads(target_json),
        device_model=device_model,
        sm_count=sm_count,
        tuned=tuple(coverage.tuned),
        fallback=tuple(coverage.fallback),
        verified=chosen.verified,
        calls=coverage.total_calls,
        tuned_calls=coverage.tuned_calls,
        missing=chosen.missing,
        invalid=dict(coverage.invalid),
    )
