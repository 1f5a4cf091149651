"""Performs what a job's state machine asks for: search, build, measure, store; every outcome goes back as an event."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner_core.model import (
    EvaluatorSettings,
    FailureKind,
    JobState,
    Origin,
    Record,
    RecordKey,
    Workload,
    trial_id,
)
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.interface import RecordStore
from tuner_core.store.wire import workload_from_message
from tuner_server.build.pool import Artifact
from tuner_server.lanes.lane import Lane
from tuner_server.measure.requests import Measurement, MeasureRequest
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.history import known_trials
from tuner_server.scheduler.machine import JobMachine, TaskPlan
from tuner_server.scheduler.report import JobFacts, queued_status, running_status
from tuner_server.search.messages import SearchFailed, SearchLost
from tuner_server.trial import TrialFailed

log = logging.getLogger(__name__)


class JobRun:
    """One run of a job: from the start, or from where an earlier run was interrupted.

    Args:
        facts: The job.
        engine: Search and build, and the workers of the job's share.
        store: For look-ups; commits go through ``committer``.
        elapsed_s: Time that earlier runs took.
        on_change: Called after every event, with a line for people or an empty string.
    """

    def __init__(
        self,
        facts: JobFacts,
        engine: Lane,
        store: RecordStore,
        committer: Committer,
        elapsed_s: float,
        on_change: Callable[[str], None],
    ) -> None:
        self.facts = facts
        self._engine = engine
        self._store = store
        self._committer = committer
        self._elapsed_before_s = elapsed_s
        self._on_change = on_change
        self._started_at = time.monotonic()
        self._ended_at: float | None = None
        self._base = queued_status(facts)
        self._workloads = [workload_from_message(task.workload) for task in facts.spec.tasks]
        plans = [TaskPlan(task.name, task.weight, task.tunable) for task in facts.spec.tasks]
        self._machine = JobMachine(plans, facts.spec.trials, engine.limits)
        self._events: asyncio.Queue[m.Event | BaseException] = asyncio.Queue()
        self._work: set[asyncio.Task[None]] = set()
        self._artifacts: dict[tuple[int, str], Artifact] = {}
        self._alone: dict[tuple[int, str], Measurement] = {}
        self._opening: dict[int, asyncio.Task[None]] = {}
        self._references: dict[int, asyncio.Task[Path | None]] = {}
        self._evaluator = engine.evaluator
        if facts.spec.HasField("evaluator"):
            asked = facts.spec.evaluator
            self._evaluator = EvaluatorSettings(asked.number, asked.repeat, asked.min_repeat_ms)

    @property
    def status(self) -> tuning_pb2.JobStatus:
        """The job as it stands."""
        return running_status(self.facts, self._machine, self._base, self.elapsed_s)

    @property
    def elapsed_s(self) -> float:
        """Time spent running, earlier runs included."""
        now = self._ended_at if self._ended_at is not None else time.monotonic()
        return self._elapsed_before_s + now - self._started_at

    def cancel(self) -> None:
        """End the job; what was measured stays in the store."""
        self._events.put_nowait(m.CancelRequested())

    async def run(self) -> JobState:
        """Run to the end.

        Returns:
            How the job ended.

        Raises:
            TunerError: The store or a process pool refuses to go on; what was measured is stored.
            asyncio.CancelledError: The server stops; likewise.
        """
        try:
            await self._begin()
            while self._machine.finished is None:
                event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                self._handle(event)
            return self._machine.finished.state
        finally:
            self._ended_at = time.monotonic()
            await self._clean_up()

    async def _begin(self) -> None:
        engine, spec = self._engine, self.facts.spec
        self._base.target_json = engine.target_json
        self._base.sm_count = engine.sm_count
        self._base.device_model = engine.device.model
        self._base.device_uuids[:] = engine.device_uuids
        self._base.tvm_version = engine.tvm_version
        self._machine.limits = engine.limits
        await self._committer.add_workloads(self._workloads)
        known: dict[int, m.Known] = {}
        for index, workload in enumerate(self._workloads):
            known[index] = await asyncio.to_thread(
                known_trials, self._store, self._key(workload), self.facts.job, refresh=spec.refresh
            )
        self._handle(m.Started(known))

    def _key(self, workload: Workload) -> RecordKey:
        engine = self._engine
        return RecordKey(
            workload.digest, engine.target_digest, engine.device.model, engine.sm_count, engine.tvm_version
        )

    def _handle(self, event: m.Event) -> None:
        said = ""
        for instruction in self._machine.handle(event):
            if isinstance(instruction, m.Say):
                said = instruction.message
                log.info("%s: %s", self.facts.job, said)
                self._on_change(said)
            else:
                self._perform(instruction)
        if not said:
            self._on_change("")

    def _perform(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.MeasureBaseline():
                self._start(self._baseline(instruction))
            case m.OpenSession():
                self._opening[instruction.task] = self._start(self._open(instruction))
            case m.Generate():
                self._start(self._generate(instruction))
            case m.RunTrial():
                self._start(self._trial(instruction))
            case m.Report():
                self._start(self._report(instruction))
            case m.CloseSession():
                self._start(self._engine.search.close(self._session(instruction.task)))
            case m.Forget():
                for trace in instruction.traces:
                    self._forget(instruction.task, trace)
            case m.Promote():
                self._start(self._promote(instruction))
            case m.Check():
                self._start(self._check(instruction))
            case m.MeasureModel():
                self._start(self._measure_model(instruction))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._worked)
        return task

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._events.put_nowait(error)

    # Search

    def _session(self, index: int) -> str:
        return f"{self.facts.job}/{index}"

    async def _open(self, wanted: m.OpenSession) -> None:
        seed = (self.facts.spec.seed + wanted.task * 7919) % (2**31 - 2) + 1
        try:
            await self._engine.search.open(
                self._session(wanted.task),
                self._workloads[wanted.task],
                self._engine.target_json,
                seed=seed,
                known=wanted.known,
            )
        except (SearchFailed, SearchLost) as error:
            log.warning("%s: cannot open a search: %s", self.facts.spec.tasks[wanted.task].name, error)
            raise

    async def _generate(self, wanted: m.Generate) -> None:
        try:
            await asyncio.shield(self._opening[wanted.task])
            traces = await self._engine.search.generate(self._session(wanted.task), wanted.count)
        except SearchFailed as error:
            self._events.put_nowait(m.CannotSample(wanted.task, wanted.batch, str(error)))
        except SearchLost as error:
            self._events.put_nowait(m.SessionLost(wanted.task, wanted.batch, str(error)))
        else:
            self._events.put_nowait(m.CandidatesReady(wanted.task, wanted.batch, tuple(traces)))

    async def _report(self, wanted: m.Report) -> None:
        try:
            await self._engine.search.report(self._session(wanted.task), wanted.results)
        except SearchLost as error:  # the batch that it was generating says so too
            log.warning("%s: %s", self.facts.spec.tasks[wanted.task].name, error)

    # Trials

    async def _trial(self, wanted: m.RunTrial) -> None:
        workload = self._workloads[wanted.task]
        try:
            with self._engine.gathering.building():
                artifact = await self._engine.build.build(workload, wanted.trace, self._engine.target_json)
            request = self._request(workload, artifact, self._machine.tasks[wanted.task].hopeless_above_us)
            try:
                await self._engine.gathering.gathered()
                measurement = await self._engine.fleet.measure(request)
            except BaseException:
                self._engine.build.release(artifact)
                raise
        except TrialFailed as failure:
            await self._commit(self._record(workload, wanted.trace, failure=failure))
            self._events.put_nowait(m.TrialFailed(wanted.task, wanted.batch, wanted.trace, failure.kind, str(failure)))
            return
        self._keep(wanted.task, wanted.trace, artifact)
        await self._commit(self._record(workload, wanted.trace, measurement=measurement))
        self._events.put_nowait(m.TrialMeasured(wanted.task, wanted.batch, wanted.trace, measurement.median_us))

    async def _baseline(self, wanted: m.MeasureBaseline) -> None:
        workload = self._workloads[wanted.task]
        try:
            with self._engine.gathering.building():
                built = await self._engine.build.fallback(workload, self._engine.target_json)
            self._keep(wanted.task, built.trace, built.artifact)
            await self._engine.gathering.gathered()
            measurement = await self._engine.fleet.measure(self._request(workload, built.artifact))
        except TrialFailed as failure:
            self._events.put_nowait(m.BaselineFailed(wanted.task, str(failure)))
            return
        await self._commit(self._record(workload, built.trace, measurement=measurement, origin=Origin.FALLBACK))
        self._events.put_nowait(m.BaselineMeasured(wanted.task, built.trace, measurement.median_us))

    def _request(self, workload: Workload, artifact: Artifact, give_up_above_us: float | None = None) -> MeasureRequest:
        return MeasureRequest(
            artifact=artifact.path,
            args_info=workload.args_info,
            evaluator=self._evaluator,
            timeout_s=self._engine.run_timeout_s,
            give_up_above_us=give_up_above_us,
        )

    def _keep(self, index: int, trace: str, artifact: Artifact) -> None:
        old = self._artifacts.get((index, trace))
        if old is not None and old.path != artifact.path:
            self._engine.build.release(old)
        self._artifacts[index, trace] = artifact

    def _forget(self, index: int, trace: str) -> None:
        artifact = self._artifacts.pop((index, trace), None)
        if artifact is not None:
            self._engine.build.release(artifact)

    async def _commit(self, record: Record) -> None:
        await self._committer.commit(record)

    def _record(
        self,
        workload: Workload,
        trace: str,
        *,
        measurement: Measurement | None = None,
        failure: TrialFailed | None = None,
        origin: Origin = Origin.SEARCH,
        verified: bool = False,
    ) -> Record:
        engine, spec = self._engine, self.facts.spec
        key = self._key(workload)
        if measurement is not None:
            key = replace(key, sm_count=measurement.sm_count)
        return Record(
            trial_id=trial_id(key, trace, self.facts.job, verified),
            workload_digest=workload.digest,
            trace=trace,
            target_json=engine.target_json,
            target_digest=engine.target_digest,
            device_model=engine.device.model,
            device_arch=engine.device.arch,
            sm_percent=spec.sm_percent,
            sm_count=key.sm_count,
            partition_kind=measurement.partition.kind if measurement else engine.partition_kind,
            neighbours=measurement.neighbours if measurement else 0,
            verified=verified,
            latencies_us=measurement.latencies_us if measurement else (),
            median_us=measurement.median_us if measurement else None,
            ci_low_us=measurement.ci_low_us if measurement else None,
            ci_high_us=measurement.ci_high_us if measurement else None,
            evaluator=self._evaluator,
            tvm_version=engine.tvm_version,
            cuda_version=engine.device.cuda_version,
            driver_version=engine.device.driver_version,
            job=self.facts.job,
            team=spec.team,
            model=spec.model,
            failure=failure.kind if failure else None,
            failure_message=str(failure) if failure else "",
            origin=origin,
            instance=self.facts.instance,
            affinity=measurement.affinity if measurement else (),
            tags=dict(spec.tags),
            op=workload.op,
            description=workload.description,
        )

    # Promotion

    def _fallback_artifact(self, index: int) -> Artifact | None:
        trace = self._machine.tasks[index].baseline_trace
        return None if trace is None else self._artifacts.get((index, trace))

    async def _artifact(self, index: int, trace: str) -> Artifact:
        known = self._artifacts.get((index, trace))
        if known is None:
            known = await self._engine.build.build(self._workloads[index], trace, self._engine.target_json)
            self._keep(index, trace, known)
        return known

    async def _promote(self, wanted: m.Promote) -> None:
        index, workload = wanted.task, self._workloads[wanted.task]
        self._references[index] = asyncio.create_task(self._engine.build.reference(workload, seed=self.facts.spec.seed))
        built = await asyncio.gather(*(self._artifact(index, trace) for trace in wanted.traces), return_exceptions=True)
        results: list[m.KnownTrial] = []
        async with self._engine.fleet.exclusive() as alone:
            for trace, artifact in zip(wanted.traces, built, strict=True):
                median_us = None
                try:
                    if isinstance(artifact, BaseException):
                        raise artifact
                    measurement = await alone.measure(self._request(workload, artifact))
                    median_us = measurement.median_us
                    self._alone[index, trace] = measurement
                except TrialFailed as failure:
                    log.warning("%s: a candidate failed in promotion: %s", workload.description, failure)
                results.append(m.KnownTrial(trace, median_us))
        self._events.put_nowait(m.Promoted(index, tuple(results)))

    async def _check(self, wanted: m.Check) -> None:
        index, workload = wanted.task, self._workloads[wanted.task]
        verdict, message = "error", ""
        origin = Origin.FALLBACK if wanted.fallback else Origin.SEARCH
        measurement = self._alone[index, wanted.trace]
        trial = ""
        against = "llvm, unscheduled, on the host"
        try:
            reference = await self._references[index]
            if reference is None:
                against = "fallback schedule, on the device"
            outcome = await self._engine.check(
                self._artifacts[index, wanted.trace],
                workload,
                reference,
                fallback=None if wanted.fallback else self._fallback_artifact(index),
            )
            verdict, message = outcome.verdict, outcome.message
        except TrialFailed as failure:
            message = f"{failure.kind}: {failure}"
        if verdict == "ok":
            record = self._record(workload, wanted.trace, measurement=measurement, origin=origin, verified=True)
            record = replace(record, tags={**record.tags, "reference": against})
            await self._commit(record)
            trial = record.trial_id
        elif verdict == "wrong_result":
            wrong = TrialFailed(FailureKind.WRONG_RESULT, message)
            await self._commit(self._record(workload, wanted.trace, failure=wrong, origin=origin, verified=True))
        if verdict in ("ok", "inconclusive"):
            await self._drop_reference(index)
        self._events.put_nowait(m.Checked(index, wanted.trace, verdict, message, trial))

    async def _drop_reference(self, index: int) -> None:
        """Delete the task's reference: inputs and outputs of large operators take many megabytes."""
        reference = self._references.pop(index, None)
        if reference is None:
            return
        reference.cancel()
        with contextlib.suppress(asyncio.CancelledError, TrialFailed):
            path = await reference
            if path is not None:
                path.unlink(missing_ok=True)

    # Model

    async def _measure_model(self, wanted: m.MeasureModel) -> None:
        spec = self.facts.spec
        if not spec.lifted_module_zlib:
            self._events.put_nowait(m.ModelMeasured(None, None, None))
            return
        traces = {self._workloads[index].digest: trace for index, trace in wanted.traces.items()}
        artifacts: list[Artifact] = []
        try:
            module = zlib.decompress(spec.lifted_module_zlib).decode()
            built = await self._engine.build.build_model(module, self._engine.target_json, traces)
            artifacts = [built.baseline, built.tuned]
            async with self._engine.fleet.exclusive() as alone:
                result = await alone.measure_models(built.baseline.path, built.tuned.path, built.args_info)
            event = m.ModelMeasured(result.baseline_us, result.tuned_us, result.outputs_match)
        except TrialFailed as failure:
            event = m.ModelMeasured(None, None, None, f"the whole model could not be measured: {failure}")
        finally:
            for artifact in artifacts:
                self._engine.build.release(artifact)
        self._events.put_nowait(event)

    # End

    async def _clean_up(self) -> None:
        for work in list(self._work):
            work.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        for index in list(self._references):
            await self._drop_reference(index)
        for index, task in enumerate(self._machine.tasks):
            if task.session_open:
                await self._engine.search.close(self._session(index))
        for artifact in self._artifacts.values():
            self._engine.build.release(artifact)
        self._artifacts.clear()
        if self._machine.finished is None:
            log.info("%s: interrupted; what was measured is stored", self.facts.job)
