"""A model tuned on several instances: from the request to the report, and again after the client was killed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner_client.job import JobInterrupted, JobReport
from tuner_client.preparing import Quiet, import_model, prepare_model
from tuner_client.progress import Progress, Silent
from tuner_client.request import TuneRequest
from tuner_client.sharding.admission import Admission, JobFacts, admit
from tuner_client.sharding.driver import ShardDriver
from tuner_client.sharding.gathering import Gatherer
from tuner_client.sharding.history import records_of, task_history
from tuner_client.sharding.journal import ShardJournal, sharded_job
from tuner_client.sharding.link import InstanceLink
from tuner_client.sharding.report import ShardedJob
from tuner_core.allocation.budget import MIN_TRIALS
from tuner_core.allocation.options import negligible_share_of, stopping_of
from tuner_core.errors import ConflictError, TunerError
from tuner_core.leases.machine import LeaseMachine
from tuner_core.leases.state import LeaseSettings, TaskPlan
from tuner_core.model import JobState, RecordKey, target_digest
from tuner_core.store.interface import RecordStore
from tuner_core.store.open import open_store
from tuner_core.store.wire import workload_from_message
from tuner_core.transport.options import ConnectionOptions

if TYPE_CHECKING:
    from tuner_client.model.prepare import Prepared
    from tuner_core.proto.tuner.v1 import tuning_pb2

DEFAULT_HEARTBEAT_S = 5.0
GATHER_FIRST_S = 60.0


def default_store(data_dir: Path) -> str:
    """The client's own store: the one that a local server uses, too."""
    return f"sqlite:///{(data_dir / 'records.sqlite').absolute()}"


@dataclass(frozen=True)
class ShardingOptions:
    """How a job is sharded.

    Attributes:
        servers: The instances, in the order in which they were named.
        store: URL of the store for every record of the job; empty: the client's own.
        wait_s: For how long a job waits when no instance is left; None: for ever.
        heartbeat_s: How often leases are renewed; an instance that is silent for one and a half loses its leases.
    """

    servers: tuple[ConnectionOptions, ...]
    store: str = ""
    wait_s: float | None = None
    heartbeat_s: float = DEFAULT_HEARTBEAT_S


class ShardedTuner:
    """Tunes models on several instances.

    Args:
        options: Which, and how.
        data_dir: Where the job is remembered.
        progress: Hears what happens.
        quiet: Gives a context to open around work in libraries that print.

    Raises (any method):
        TunerError: With one line saying what is wrong and what to do.
    """

    def __init__(
        self,
        options: ShardingOptions,
        data_dir: Path,
        progress: Progress | None = None,
        quiet: Quiet = nullcontext,
    ) -> None:
        self._options = options
        self._data_dir = data_dir
        self._progress: Progress = progress or Silent()
        self._quiet = quiet

    def run(self, request: TuneRequest) -> JobReport:
        """Tune a model and wait for it.

        Raises:
            JobInterrupted: Ctrl-C; the job is saved and can be resumed.
        """
        from tuner_client.submit import job_spec

        if self._options.store:
            with _opened(self._options.store):  # refused now, not when there is something to lose
                pass
        imported = import_model(request.model, request.input_shapes, self._progress, self._quiet)
        with self._progress.step(f"asking {len(self._options.servers)} servers for their devices"):
            admission = asyncio.run(self._admission(request))
        request = dataclasses.replace(request, sm_percent=admission.job.sm_percent)
        prepared = prepare_model(imported, admission.job.target_json, self._progress, self._quiet, request.layout)
        spec = job_spec(request, prepared, digest=imported.digest, target_json=admission.job.target_json)
        report = self.drive(
            spec, admission.job, left_out=admission.left_out, target_given=request.target_json is not None
        )
        with _opened(self._store_url) as store:
            return self._build(report, prepared, store, request.output)

    @property
    def _store_url(self) -> str:
        return self._options.store or default_store(self._data_dir)

    def drive(
        self,
        spec: tuning_pb2.JobSpec,
        facts: JobFacts,
        *,
        left_out: Mapping[str, str] | None = None,
        target_given: bool = False,
    ) -> JobReport:
        """Run a job whose tasks are known.

        Args:
            spec: Its tasks, target and budget.
            facts: What every instance has to match.
            left_out: Instances that take no part: address to reason.
            target_given: The target was asked for, it need not be the instances' own.

        Raises:
            JobInterrupted: As :meth:`run`.
        """
        journal = ShardJournal(self._data_dir, f"job-{uuid.uuid4().hex[:8]}")
        try:
            known = dataclasses.asdict(facts) | {"target_given": target_given}
            journal.create(spec, known, [server.address for server in self._options.servers], self._store_url)
            with _opened(self._store_url) as store:
                return self._drive(journal, spec, store, left_out or {})
        finally:
            journal.close()

    def resume(
        self,
        job: str,
        *,
        output: Path | None = None,
        model: Path | None = None,
        input_shapes: Mapping[str, tuple[int, ...]] | None = None,
        drive: bool = True,
    ) -> JobReport:
        """Go on with a job from what the store and the instances have; a job that is done is left as it is.

        Args:
            job: The job.
            output: File to build at the end; needs ``model``.
            model: The file that was tuned.
            input_shapes: As given to ``tune``.
            drive: Go on measuring; False: only build from what there is.

        Raises:
            JobInterrupted: As :meth:`run`.
            ConflictError: Another process runs the job, or ``model`` is not the file that was tuned.
        """
        journal = ShardJournal(self._data_dir, job)
        try:
            spec = journal.spec
            imported = None
            if model is not None and output is not None:
                imported = import_model(model, input_shapes or {}, self._progress, self._quiet)
                if imported.digest != spec.model_digest:
                    raise ConflictError(f"{model} is not the file that {job} tuned (its sha256 differs)")
            with _opened(self._options.store or str(journal.state["store"])) as store:
                report = sharded_job(self._data_dir, job)
                if drive and report.status != JobState.DONE:
                    journal.state["servers"] = [server.address for server in self._options.servers]
                    report = self._drive(journal, spec, store, {})
                if imported is None:
                    return report
                prepared = prepare_model(imported, spec.target_json, self._progress, self._quiet, spec.layout or "auto")
                return self._build(report, prepared, store, output)
        finally:
            journal.close()

    # Who takes part

    async def _admission(self, request: TuneRequest) -> Admission:
        links = [InstanceLink(server) for server in self._options.servers]
        try:
            share = request.sm_percent
            answers = await asyncio.gather(*(link.ask(share or 0) for link in links), return_exceptions=True)
            reached = []
            left_out: dict[str, str] = {}
            for link, answer in zip(links, answers, strict=True):
                if isinstance(answer, ConflictError):
                    left_out[link.address] = str(answer)
                elif isinstance(answer, TunerError):
                    self._progress.note(f"{answer}; going on without it until it answers")
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    reached.append((link, answer))
            if not reached:
                failure = next(answer for answer in answers if isinstance(answer, BaseException))
                others = len(links) - 1
                more = f" (and {others} more {'server' if others == 1 else 'servers'})" if others else ""
                raise type(failure)(f"{failure}{more}")
            if share is None:
                first = reached[0][1]
                share = first.workers[0].sm_percent if first.workers else 100
                await asyncio.gather(*(link.ask(share) for link, _ in reached))
            facts = [link.facts for link, _ in reached if link.facts is not None]
            admission = admit(facts, sm_percent=share, target_json=request.target_json)
        finally:
            for link in links:
                await link.connection.close()
        left_out |= admission.left_out
        for address, reason in left_out.items():
            self._progress.note(f"{address} is left out: {reason}")
        return dataclasses.replace(admission, left_out=left_out)

    # The job

    def _drive(
        self, journal: ShardJournal, spec: tuning_pb2.JobSpec, store: RecordStore, left_out: Mapping[str, str]
    ) -> JobReport:
        driver_report, interrupted = asyncio.run(self._run(journal, spec, store, left_out))
        if interrupted:
            raise JobInterrupted(driver_report)
        self._progress.job(driver_report)
        return driver_report

    async def _run(
        self, journal: ShardJournal, spec: tuning_pb2.JobSpec, store: RecordStore, left_out: Mapping[str, str]
    ) -> tuple[JobReport, bool]:
        facts = dict(journal.state["facts"])
        target_given = bool(facts.pop("target_given"))
        job_facts = JobFacts(**facts)
        workloads = {task.name: workload_from_message(task.workload) for task in spec.tasks}
        await asyncio.to_thread(store.commit, [], list(workloads.values()))
        before = dict(journal.state.get("report") or {})
        job = ShardedJob(
            job=journal.job,
            spec=spec,
            facts=job_facts,
            workloads=workloads,
            created_at=before.get("created_at") or time.time(),
            spent_s=before.get("elapsed_s", 0.0),
        )
        settings = LeaseSettings(
            heartbeat_s=self._options.heartbeat_s,
            wait_s=self._options.wait_s,
            stopping=stopping_of(spec),
            negligible_share=negligible_share_of(spec),
        )
        store_url = self._options.store or str(journal.state["store"])
        gatherer = Gatherer(store, store_url, job.job, self._progress.note)
        links = [InstanceLink(server) for server in self._options.servers]
        for link in links:
            link.left_out = left_out.get(link.address, "")
        keys = {
            name: RecordKey(
                workload.digest, target_digest(job_facts.target_json), job_facts.device_model, job_facts.sm_count
            )
            for name, workload in workloads.items()
        }
        await self._gather_first(links, gatherer, settings, spec, keys, again=bool(journal.state["epoch"]))
        known = {}
        states = {task["name"]: task for task in before.get("tasks", ())}
        for name, key in keys.items():
            records = await asyncio.to_thread(records_of, store, key, job.job if spec.refresh else "")
            gatherer.note(record for record in records if record.job == job.job)
            history = task_history(records, job.job, journal.addresses)
            state = states.get(name, {})
            over = state.get("verified") and state.get("state") in ("tuned", "fallback") and history.published_id
            known[name] = dataclasses.replace(history, concluded=bool(over))
        machine = LeaseMachine(
            [TaskPlan(task.name, task.weight, task.tunable, workloads[task.name].cost_guess) for task in spec.tasks],
            spec.trials,
            settings,
            known=known,
            epoch=await asyncio.to_thread(journal.next_epoch),
        )
        driver = ShardDriver(
            job, links, machine, settings, store, gatherer, journal, self._progress, target_given=target_given
        )
        await asyncio.to_thread(journal.save, driver.report())
        report = await driver.run()
        return report, driver.interrupted

    async def _gather_first(
        self,
        links: Sequence[InstanceLink],
        gatherer: Gatherer,
        settings: LeaseSettings,
        spec: tuning_pb2.JobSpec,
        keys: Mapping[str, RecordKey],
        *,
        again: bool,
    ) -> None:
        """Before a job begins: what the servers know of its operators; before it goes on: what they have measured."""
        tunable = [task.name for task in spec.tasks if task.tunable and not spec.refresh]
        most = max(MIN_TRIALS, spec.trials // max(1, len(tunable)))
        stores: set[tuple[str, ...]] = set()

        async def gather(link: InstanceLink) -> None:
            with contextlib.suppress(TunerError, TimeoutError):
                await link.ask(0, settings.heartbeat_s)
                async with asyncio.timeout(GATHER_FIRST_S):
                    if again:
                        await gatherer.catch_up(link)
                    store = gatherer.store_of(link)
                    if store in stores:
                        return
                    stores.add(store)
                    await gatherer.fetch_all(link, [keys[name] for name in tunable], most)

        with self._progress.step("gathering what the servers know of these operators"):
            await asyncio.gather(*(gather(link) for link in links if not link.left_out))

    def _build(self, report: JobReport, prepared: Prepared, store: RecordStore, output: Path | None) -> JobReport:
        if output is None or report.status not in (JobState.DONE, JobState.PARTLY):
            return report
        from tuner_client.building import build_model, choose_for_job
        from tuner_client.selection import Place

        place = Place(report.device_model, report.sm_count, json.dumps(dict(report.target)))
        with self._progress.step(f"building {output.name}"):
            chosen = choose_for_job(prepared, store, report, place)
            with self._quiet():
                built = build_model(prepared, chosen, output, place)
        return dataclasses.replace(report, output=str(output), coverage=built.coverage())


@contextlib.contextmanager
def _opened(url: str) -> Iterator[RecordStore]:
    store = open_store(url)
    try:
        yield store
    finally:
        store.close()
