"""Performs what a state machine asks for: search, build, measure, check, store; every outcome goes back as an event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from tuner_core.model import EvaluatorSettings, FailureKind, Origin, Record, RecordKey, Workload, trial_id
from tuner_server import timeline
from tuner_server.build.pool import Artifact
from tuner_server.lanes.lane import Lane
from tuner_server.measure.fleet import Alone
from tuner_server.measure.requests import Measurement, MeasureRequest
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.committer import Committer
from tuner_server.scheduler.progress import TaskProgress
from tuner_server.scheduler.references import References
from tuner_server.scheduler.report import JobFacts
from tuner_server.scheduler.transfer import Transfer
from tuner_server.scheduler.whole_model import WholeModel
from tuner_server.search.messages import SearchFailed, SearchLost
from tuner_server.trial import TrialFailed

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLOSE_CALL = 1.05
"""Alone on the device, samples of a kernel differ by about one per cent: what is slower than the best by more than
this will not turn out to be the fastest."""


class Performer:
    """Works for one job, on one lane.

    Args:
        facts: The job.
        workloads: Of its tasks, in their order.
        lane: Search and build, and the workers of the job's share.
        committer: Stores what was measured before it counts.
        tasks: What is known of the job's tasks; read only.
        emit: Takes events, and exceptions that nothing can be made of.
        transfer: What past records of other operators and shares give to a search; None: nothing.
    """

    def __init__(
        self,
        facts: JobFacts,
        workloads: Sequence[Workload],
        lane: Lane,
        committer: Committer,
        tasks: Sequence[TaskProgress],
        emit: Callable[[m.Event | BaseException], None],
        transfer: Transfer | None = None,
    ) -> None:
        self.facts = facts
        self.lane = lane
        self.workloads = workloads
        self._committer = committer
        self._tasks = tasks
        self._emit = emit
        self._transfer = transfer
        self._work: set[asyncio.Task[None]] = set()
        self._artifacts: dict[tuple[int, str], Artifact] = {}
        self._alone: dict[tuple[int, str], Measurement] = {}
        self._unbuilt: dict[tuple[int, str], asyncio.Task[None]] = {}
        self._opening: dict[int, asyncio.Task[None]] = {}
        self._references = References(lane.build, self.workloads, facts.spec.seed)
        self._model = WholeModel(facts.spec, lane)
        self._evaluator = lane.evaluator
        if facts.spec.HasField("evaluator"):
            asked = facts.spec.evaluator
            self._evaluator = EvaluatorSettings(asked.number, asked.repeat, asked.min_repeat_ms)

    def key(self, index: int) -> RecordKey:
        """Strict look-up key of a task."""
        lane = self.lane
        return RecordKey(
            self.workloads[index].digest, lane.target_digest, lane.device.model, lane.sm_count, lane.tvm_version
        )

    async def add_workloads(self) -> None:
        """Store the job's workloads, so that records may refer to them."""
        await self._committer.add_workloads(self.workloads)

    def perform(self, instruction: m.Instruction) -> None:
        """Begin with an instruction; what comes of it is emitted later."""
        index = getattr(instruction, "task", None)
        with timeline.of_task("whole model" if index is None else self.workloads[index].description):
            self._begin(instruction)

    def _begin(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.MeasureBaseline():
                self._start(self._baseline(instruction))
            case m.OpenSession():
                self.lane.prestart(sum(task.tunable for task in self.facts.spec.tasks))
                self._opening[instruction.task] = self._start(self._open(instruction))
                self._references.foresee(instruction.task)
            case m.Generate():
                self._start(self._generate(instruction))
            case m.RunTrial():
                self._unbuilt[instruction.task, instruction.trace] = self._start(self._trial(instruction))
            case m.Abandon():
                self._abandon(instruction)
            case m.Report():
                self._start(self._report(instruction))
            case m.CloseSession():
                self._opening.pop(instruction.task, None)
                self._start(self.lane.search.close(self._session(instruction.task)))
            case m.Forget():
                for trace in instruction.traces:
                    self._forget(instruction.task, trace)
            case m.Promote():
                self._start(self._promote(instruction))
            case m.Check():
                self._start(self._check(instruction))
            case m.PrepareModel():
                self._model.prepare()
            case m.MeasureModel():
                self._start(self._measure_model(instruction))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._worked)
        return task

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, (SearchFailed, SearchLost)):  # whoever waits for candidates has got these
            self._emit(error)

    # Search

    def _session(self, index: int) -> str:
        return f"{self.facts.job}/{index}"

    async def _open(self, wanted: m.OpenSession) -> None:
        seed = (self.facts.spec.seed + wanted.task * 7919) % (2**31 - 2) + 1
        key = self.key(wanted.task)
        spec = self.facts.spec
        asked = spec.experience or "store"
        past = self._transfer if asked != "none" else None
        try:
            await self.lane.search.open(
                self._session(wanted.task),
                self.workloads[wanted.task],
                self.lane.target_json,
                seed=seed,
                known=wanted.known,
                seeds=await past.seeds(key) if past else (),
                lessons=await past.lessons(key) if past and asked == "store" else (),
                shared_with={"store": "", "job": self.facts.job}.get(asked),
                cost_weight=spec.build_cost_weight if spec.HasField("build_cost_weight") else None,
            )
        except (SearchFailed, SearchLost) as error:
            log.warning("%s: cannot open a search: %s", self.facts.spec.tasks[wanted.task].name, error)
            raise

    async def _generate(self, wanted: m.Generate) -> None:
        try:
            await asyncio.shield(self._opening[wanted.task])
            async for traces, more in self.lane.search.generate_in_pieces(self._session(wanted.task), wanted.count):
                self._emit(m.CandidatesReady(wanted.task, wanted.batch, tuple(traces), more=more))
        except SearchFailed as error:
            self._emit(m.CannotSample(wanted.task, wanted.batch, str(error)))
        except SearchLost as error:
            self._emit(m.SessionLost(wanted.task, wanted.batch, str(error)))

    async def _report(self, wanted: m.Report) -> None:
        try:
            await self.lane.search.report(self._session(wanted.task), wanted.results)
        except SearchLost as error:  # the batch that it was generating says so too
            log.warning("%s: %s", self.facts.spec.tasks[wanted.task].name, error)

    # Trials

    async def _trial(self, wanted: m.RunTrial) -> None:
        workload = self.workloads[wanted.task]
        try:
            try:
                with self.lane.gathering.building():
                    artifact = await self.lane.build.build(workload, wanted.trace, self.lane.target_json)
            finally:
                self._unbuilt.pop((wanted.task, wanted.trace), None)
            request = self._request(workload, artifact, self._tasks[wanted.task].hopeless_above_us)
            try:
                await self.lane.gathering.gathered()
                measurement = await self.lane.fleet.measure(request)
            except BaseException:
                self.lane.build.release(artifact)
                raise
        except TrialFailed as failure:
            record = await self._commit(self._record(workload, wanted.trace, failure=failure))
            self._emit(
                m.TrialFailed(wanted.task, wanted.batch, wanted.trace, failure.kind, str(failure), record.trial_id)
            )
            return
        self._keep(wanted.task, wanted.trace, artifact)
        record = await self._commit(self._record(workload, wanted.trace, measurement=measurement))
        self._emit(m.TrialMeasured(wanted.task, wanted.batch, wanted.trace, measurement.median_us, record.trial_id))

    def _abandon(self, wanted: m.Abandon) -> None:
        for trace in wanted.traces:
            work = self._unbuilt.pop((wanted.task, trace), None)
            if work is not None:
                work.cancel()
                self._emit(m.TrialDropped(wanted.task, wanted.batch, trace))

    async def _baseline(self, wanted: m.MeasureBaseline) -> None:
        workload = self.workloads[wanted.task]
        try:
            with self.lane.gathering.building():
                built = await self.lane.build.fallback(workload, self.lane.target_json)
            self._keep(wanted.task, built.trace, built.artifact)
            await self.lane.gathering.gathered()
            measurement = await self.lane.fleet.measure(self._request(workload, built.artifact))
        except TrialFailed as failure:
            self._emit(m.BaselineFailed(wanted.task, str(failure)))
            return
        record = await self._commit(
            self._record(workload, built.trace, measurement=measurement, origin=Origin.FALLBACK)
        )
        self._emit(m.BaselineMeasured(wanted.task, built.trace, measurement.median_us, record.trial_id))

    def _request(self, workload: Workload, artifact: Artifact, give_up_above_us: float | None = None) -> MeasureRequest:
        return MeasureRequest(
            artifact=artifact.path,
            args_info=workload.args_info,
            evaluator=self._evaluator,
            timeout_s=self.lane.run_timeout_s,
            give_up_above_us=give_up_above_us,
        )

    def _keep(self, index: int, trace: str, artifact: Artifact) -> None:
        old = self._artifacts.get((index, trace))
        if old is not None and old.path != artifact.path:
            self.lane.build.release(old)
        self._artifacts[index, trace] = artifact

    def _forget(self, index: int, trace: str) -> None:
        artifact = self._artifacts.pop((index, trace), None)
        if artifact is not None:
            self.lane.build.release(artifact)

    async def _commit(self, record: Record) -> Record:
        await self._committer.commit(record)
        return record

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
        lane, spec = self.lane, self.facts.spec
        key = RecordKey(workload.digest, lane.target_digest, lane.device.model, lane.sm_count, lane.tvm_version)
        if measurement is not None:
            key = replace(key, sm_count=measurement.sm_count)
        return Record(
            trial_id=trial_id(key, trace, self.facts.job, verified),
            workload_digest=workload.digest,
            trace=trace,
            target_json=lane.target_json,
            target_digest=lane.target_digest,
            device_model=lane.device.model,
            device_arch=lane.device.arch,
            sm_percent=spec.sm_percent,
            sm_count=key.sm_count,
            partition_kind=measurement.partition.kind if measurement else lane.partition_kind,
            neighbours=measurement.neighbours if measurement else 0,
            verified=verified,
            latencies_us=measurement.latencies_us if measurement else (),
            median_us=measurement.median_us if measurement else None,
            ci_low_us=measurement.ci_low_us if measurement else None,
            ci_high_us=measurement.ci_high_us if measurement else None,
            evaluator=self._evaluator,
            tvm_version=lane.tvm_version,
            cuda_version=lane.device.cuda_version,
            driver_version=lane.device.driver_version,
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
            layout=spec.layout,
        )

    # Promotion

    def _fallback_artifact(self, index: int) -> Artifact | None:
        trace = self._tasks[index].baseline_trace
        return None if trace is None else self._artifacts.get((index, trace))

    def _expected_us(self, index: int, trace: str) -> float | None:
        task = self._tasks[index]
        return task.baseline_us if trace == task.baseline_trace else task.results.get(trace)

    async def _artifact(self, index: int, trace: str) -> Artifact:
        known = self._artifacts.get((index, trace))
        if known is None:
            known = await self.lane.build.build(self.workloads[index], trace, self.lane.target_json)
            self._keep(index, trace, known)
        return known

    async def _promote(self, wanted: m.Promote) -> None:
        index = wanted.task
        self._references.begin(index)
        built = await asyncio.gather(*(self._artifact(index, trace) for trace in wanted.traces), return_exceptions=True)
        alone = await self.lane.fleet.alone(
            partial(self._measure_alone, index, dict(zip(wanted.traces, built, strict=True)))
        )
        self._alone.update({(index, trace): measurement for trace, measurement in alone.items()})
        medians = {trace: measurement.median_us for trace, measurement in alone.items()}
        self._emit(m.Promoted(index, tuple(m.KnownTrial(trace, medians.get(trace)) for trace in wanted.traces)))

    async def _measure_alone(
        self, index: int, built: Mapping[str, Artifact | BaseException], alone: Alone
    ) -> dict[str, Measurement]:
        """Those that could be measured, by trace. What is no close call with the best of them gets one sample."""
        workload, baseline = self.workloads[index], self._tasks[index].baseline_trace
        measured: dict[str, Measurement] = {}
        for trace, artifact in built.items():
            try:
                if isinstance(artifact, BaseException):
                    raise artifact
                best_us = min((one.median_us for one in measured.values()), default=None)
                request = replace(
                    self._request(workload, artifact),
                    expected_us=self._expected_us(index, trace),
                    give_up_above_us=None if best_us is None or trace == baseline else _CLOSE_CALL * best_us,
                )
                measured[trace] = await _insist(partial(alone.measure, request))
            except TrialFailed as failure:
                log.warning("%s: a candidate failed in promotion: %s", workload.description, failure)
        return measured

    async def _check(self, wanted: m.Check) -> None:
        index, workload = wanted.task, self.workloads[wanted.task]
        verdict, message = "error", ""
        origin = Origin.FALLBACK if wanted.fallback else Origin.SEARCH
        measurement = self._alone[index, wanted.trace]
        trial = ""
        against = "llvm, unscheduled, on the host"
        try:
            reference = await self._references.get(index)
            if reference is None:
                against = "fallback schedule, on the device"
            artifact = self._artifacts[index, wanted.trace]
            fallback = None if wanted.fallback else self._fallback_artifact(index)
            outcome = await _insist(partial(self.lane.check, artifact, workload, reference, fallback))
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
            await self._references.drop(index)
        self._emit(m.Checked(index, wanted.trace, verdict, message, trial))

    # Model

    async def _measure_model(self, wanted: m.MeasureModel) -> None:
        traces = {self.workloads[index].digest: trace for index, trace in wanted.traces.items()}
        self._emit(await self._model.measure(traces))

    # End

    async def stop(self) -> None:
        """Cancel what is under way, close sessions, delete what was built."""
        self._unbuilt.clear()
        for work in list(self._work):
            work.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._model.stop()
        await self._references.drop_all()
        for index in list(self._opening):
            await self.lane.search.close(self._session(index))
        self._opening.clear()
        for artifact in self._artifacts.values():
            self.lane.build.release(artifact)
        self._artifacts.clear()


async def _insist(work: Callable[[], Awaitable[T]]) -> T:
    """Once more when workers were lost: a candidate that was measured before is hardly to blame."""
    try:
        return await work()
    except TrialFailed as failure:
        if failure.kind is not FailureKind.WORKER_LOST:
            raise
        log.warning("%s; trying again", failure)
    return await work()
