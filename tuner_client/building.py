"""Build a model from records: look its operators up, apply what is found, export a file that stock TVM loads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_client.job import JobReport
from tuner_client.selection import Place, describe_looser
from tuner_core.errors import ConflictError, ModelError, TunerError
from tuner_core.model import Origin
from tuner_core.store.interface import RecordStore

if TYPE_CHECKING:
    from tuner_client.model.prepare import Prepared
    from tuner_client.records import RecordDatabase


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
        looser: Operators that run a record of another share, device or TVM version, with a line that says which.
        passed_over: Records that did not apply to their operator, with the reason, by trial id; the next best one does.
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
    looser: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def operators(self) -> int:
        """Operators of the model."""
        return len(self.tuned) + len(self.fallback)

    def line(self) -> str:
        """The coverage report."""
        text = f"{len(self.tuned)} of {self.operators} operators tuned"
        if self.tuned:
            text += f" ({self.verified} verified)"
        if self.looser:
            text += f", {len(self.looser)} by records of another share, device or version"
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
            "looser": dict(self.looser),
            "passed_over": dict(self.passed_over),
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
    """Traces by workload digest, and how many of them come from verified records. The rest as in a report."""

    traces: Mapping[str, str]
    verified: int
    missing: tuple[str, ...]
    looser: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)


def choose(prepared: Prepared, database: RecordDatabase) -> Chosen:
    """The best record of each operator that applies; ``missing`` names the tunable operators without any."""
    traces: dict[str, str] = {}
    verified = 0
    missing: list[str] = []
    looser: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    for task in prepared.tasks:
        record, problems = database.best_that_applies(task.workload.digest, task.workload.body)
        passed_over |= {trial: f"{task.workload.description}: {reason}" for trial, reason in problems.items()}
        if record is None:
            if task.tunable:
                missing.append(task.workload.description)
        elif record.origin is not Origin.FALLBACK:  # the build has the fallback schedule itself
            traces[task.workload.digest] = record.trace
            verified += record.verified
            if not database.place.exact(record):
                looser[task.name] = describe_looser(record, database.place)
    return Chosen(traces, verified, tuple(missing), looser, passed_over)


def choose_for_job(prepared: Prepared, store: RecordStore, report: JobReport, place: Place) -> Chosen:
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
    by_key = choose(prepared, open_database(store, place))
    traces = dict(by_key.traces)
    verified = by_key.verified
    for task in report.tasks:
        record = store.get(task.best_trial_id) if task.best_trial_id and task.workload not in traces else None
        if record is not None and record.valid and record.origin is not Origin.FALLBACK:
            traces[task.workload] = record.trace
            verified += record.verified
    return dataclasses.replace(by_key, traces=traces, verified=verified)


def open_database(store: RecordStore, place: Place, *, strict: bool = True) -> RecordDatabase:
    """The records of a store that apply at a place."""
    from tuner_client.records import RecordDatabase

    return RecordDatabase(
        store, device_model=place.device_model, sm_count=place.sm_count, target=place.target_json, strict=strict
    )


def build_model(prepared: Prepared, chosen: Chosen, output: Path, place: Place) -> BuildReport:
    """Apply the traces to the prepared module, fallback schedules to the rest, build and write the file.

    Raises:
        ModelError: It does not build.
        TunerError: The file cannot be written.
    """
    import json

    from tvm.target import Target

    from tuner_core.compiler.apply import apply_schedules
    from tuner_core.compiler.executable import build_executable, export_executable

    target = Target(json.loads(place.target_json))
    scheduled, coverage = apply_schedules(prepared.module, target, chosen.traces)
    partial = output.with_name(f".{output.name}.{os.getpid()}.so")
    try:
        executable = build_executable(scheduled, target, tuned=coverage.tuned)
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
        target=json.loads(place.target_json),
        device_model=place.device_model,
        sm_count=place.sm_count,
        tuned=tuple(coverage.tuned),
        fallback=tuple(coverage.fallback),
        verified=chosen.verified,
        calls=coverage.total_calls,
        tuned_calls=coverage.tuned_calls,
        missing=chosen.missing,
        invalid=dict(coverage.invalid),
        looser=chosen.looser,
        passed_over=chosen.passed_over,
    )
