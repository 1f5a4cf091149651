"""The Python API: what the commands do, as functions."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tuner_client.job import DETACHED, JobReport, job_report
from tuner_client.preparing import import_model, prepare_model
from tuner_client.progress import Progress, Silent
from tuner_client.request import TuneRequest, check_layout, check_model_path, check_output, check_sm_percent
from tuner_core.datadir import default_data_dir, read_holder
from tuner_core.errors import ConflictError, DeadlineError, UnavailableError, UsageError
from tuner_core.model import JobState, Record
from tuner_core.store.interface import Page, RecordFilter
from tuner_core.transport.options import ConnectionOptions

if TYPE_CHECKING:
    from tuner_client.building import BuildReport
    from tuner_client.connection import Connection
    from tuner_client.model.load import ImportedModel
    from tuner_client.model.prepare import Prepared
    from tuner_core.proto.tuner.v1 import host_pb2
    from tuner_core.store.remote import RemoteStore
    from tuner_core.store.tvm_folder import ExportReport, ImportReport

HOST_TIMEOUT_S = 120.0
SUBMIT_TIMEOUT_S = 120.0
RECONNECT_S = 60.0
_FOLLOW_AGAIN_S = 1.0
_SUBMIT_PAUSES_S = (0.5, 1.0, 2.0, 4.0)


class JobInterrupted(KeyboardInterrupt):
    """Ctrl-C while a job was being followed.

    Attributes:
        report: The job's last known state; its status is ``detached`` when the server goes on with it, ``stopped``
            when the local server saved it and ended.
    """

    def __init__(self, report: JobReport) -> None:
        super().__init__(f"job {report.job} {report.status}")
        self.report = report


class Client:
    """A client of one server. It connects at the first call that needs the server.

    Args:
        server: ``HOST:PORT``, or how to connect to it; None: the server that runs on the data directory, else one of
            our own for as long as this client is open.
        data_dir: The data directory; None: the user's.
        progress: Hears what happens; None: nobody.
        reconnect_s: For how long a job that is followed waits for a lost server.
        quiet: Gives a context to open around work in libraries that print (import, preparation, build).
        server_arguments: Command-line arguments for a server of our own.

    Raises (any method):
        TunerError: With one line saying what is wrong and what to do.
    """

    def __init__(
        self,
        server: str | ConnectionOptions | None = None,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        reconnect_s: float = RECONNECT_S,
        quiet: Callable[[], AbstractContextManager[Any]] = nullcontext,
        server_arguments: Sequence[str] = (),
    ) -> None:
        self._options = ConnectionOptions(server) if isinstance(server, str) else server
        self._data_dir = Path(data_dir) if data_dir is not None else default_data_dir()
        self._progress: Progress = progress or Silent()
        self._reconnect_s = reconnect_s
        self._quiet = quiet
        self._server_arguments = list(server_arguments)
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a server of our own saves its jobs and ends."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    @property
    def connection(self) -> Connection:
        """The connection, opened now when it was not."""
        if self._connection is None:
            from tuner_client.connection import Connection

            running = read_holder(self._data_dir) if self._options is None else self._options
            what = f"connecting to {running.address}" if running else "starting the local server"
            with self._progress.step(what):
                self._connection = Connection(self._options, self._data_dir, self._server_arguments)
        return self._connection

    @property
    def store(self) -> RemoteStore:
        """The server's record store."""
        return self._store_for("")

    def _store_for(self, team: str) -> RemoteStore:
        from tuner_core.store.remote import RemoteStore

        connection = self.connection
        return RemoteStore(connection.channel, address=connection.address, team=team)

    # Jobs

    def tune(
        self,
        model: str | os.PathLike[str],
        *,
        sm_percent: int | None = None,
        trials: int | None = None,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        target: Mapping[str, Any] | None = None,
        output: str | os.PathLike[str] | None = None,
        name: str | None = None,
        team: str = "",
        refresh: bool = False,
        seed: int = 0,
        tags: Mapping[str, str] | None = None,
        layout: str = "auto",
        detach: bool = False,
    ) -> JobReport:
        """Tune a model; see :func:`tuner_client.tune` for the arguments.

        Args:
            detach: Return as soon as the server has the job.

        Returns:
            How the job ended; ``document()`` gives the JSON document of the command.

        Raises:
            JobInterrupted: Ctrl-C; the job is saved and goes on, or can be resumed.
        """
        request = TuneRequest(
            model=Path(model),
            sm_percent=sm_percent,
            trials=trials,
            input_shapes={key: tuple(shape) for key, shape in (input_shapes or {}).items()},
            target_json=json.dumps(dict(target)) if target is not None else None,
            output=Path(output) if output is not None else None,
            name=name,
            team=team,
            refresh=refresh,
            seed=seed,
            tags=dict(tags or {}),
            layout=layout,
        )
        return self.run(request, detach=detach)

    def run(self, request: TuneRequest, *, detach: bool = False) -> JobReport:
        """:meth:`tune` for a request that was checked already."""
        if detach and request.output is not None:
            raise UsageError(
                "--detach leaves nobody to build --output; build it later with: "
                "tuner-client watch JOB --output F --model M"
            )
        if detach and self._options is None:
            raise UsageError("--detach needs a server that stays: give --server HOST:PORT (or set TUNER_SERVER)")
        imported = self._import(request.model, request.input_shapes)
        host = self.host(request.sm_percent)
        if request.sm_percent is None:
            request = dataclasses.replace(request, sm_percent=_first_share(host))
        target_json = request.target_json or host.target_json
        prepared = self._prepare(imported, target_json, request.layout)
        job = self._submit(request, prepared, imported.digest, target_json)
        if detach:
            return dataclasses.replace(self.job(job), status=DETACHED)
        report = self._follow(job)
        if request.output is not None and report.status in (JobState.DONE, JobState.PARTLY):
            report = self._build_for_job(report, prepared, request.output)
        return report

    def _submit(self, request: TuneRequest, prepared: Prepared, digest: str, target_json: str) -> str:
        from tuner_client.submit import job_spec
        from tuner_core.proto.tuner.v1 import tuning_pb2

        spec = job_spec(request, prepared, digest=digest, target_json=target_json)
        message = tuning_pb2.SubmitJobRequest(spec=spec)
        with self._progress.step("submitting the job"):
            moved = False
            for pause_s in (*_SUBMIT_PAUSES_S, None):
                try:
                    response = self.connection.call(self.connection.tuning.SubmitJob, message, SUBMIT_TIMEOUT_S)
                    if moved:  # a local server does not go on by itself with what another one had taken in
                        self.resume(response.job)
                    return str(response.job)
                except UnavailableError:  # the same request_id gives the same job
                    if pause_s is None:
                        raise
                    time.sleep(pause_s)
                    moved = self.connection.reopen() or moved
        raise AssertionError("unreachable")

    def watch(
        self,
        job: str,
        *,
        output: str | os.PathLike[str] | None = None,
        model: str | os.PathLike[str] | None = None,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        resume: bool = False,
    ) -> JobReport:
        """Follow a job to its end.

        Args:
            job: The job.
            output: File to build from its records when it has ended; needs ``model``.
            model: The file that was tuned; its digest is compared with the job's.
            input_shapes: As given to ``tune``.
            resume: Let a stopped, cancelled or failed job go on first.

        Raises:
            JobInterrupted: As :meth:`tune`.
            ConflictError: ``model`` is not the file that was tuned.
        """
        if (output is None) != (model is None):
            raise UsageError("--output and --model go together: the weights to build with are only in the model's file")
        imported = None
        if output is not None and model is not None:
            check_model_path(Path(model))
            check_output(Path(output))
            imported = self._import(Path(model), {key: tuple(shape) for key, shape in (input_shapes or {}).items()})
            known = self.job(job)
            if known.model_digest != imported.digest:
                raise ConflictError(
                    f"{model} is not the file that job {job} tuned (its sha256 differs); give that file"
                )
        if resume:
            self.resume(job)
        report = self._follow(job)
        if imported is not None and output is not None and report.status in (JobState.DONE, JobState.PARTLY):
            prepared = self._prepare(imported, json.dumps(dict(report.target)), report.layout or "auto")
            report = self._build_for_job(report, prepared, Path(output))
        return report

    def _follow(self, job: str) -> JobReport:
        from tuner_client.follow import follow

        try:
            return follow(self.connection, job, self._progress, reconnect_s=self._reconnect_s)
        except KeyboardInterrupt as interrupt:
            raise JobInterrupted(self._leave(job)) from interrupt

    def _leave(self, job: str) -> JobReport:
        """After Ctrl-C: a server of our own saves the job and ends; any other goes on."""
        report = JobReport(job=job, model="", status=JobState.RUNNING)
        with suppress(UnavailableError, DeadlineError):
            report = self.job(job, timeout_s=2.0)
        if report.ended:
            return report
        if not self.connection.embedded:
            return dataclasses.replace(report, status=DETACHED)
        with self._progress.step("saving the job"):
            self.close()
        return dataclasses.replace(report, status=JobState.STOPPED.value)

    def job(self, job: str, *, timeout_s: float = 30.0) -> JobReport:
        """State of one job."""
        from tuner_core.proto.tuner.v1 import tuning_pb2

        request = tuning_pb2.GetJobRequest(job=job)
        return job_report(self.connection.call(self.connection.tuning.GetJob, request, timeout_s).status)

    def jobs(self, limit: int = 20) -> list[JobReport]:
        """The newest jobs, newest first, without their tasks."""
        from tuner_core.proto.tuner.v1 import tuning_pb2

        request = tuning_pb2.ListJobsRequest(limit=limit)
        return [job_report(job) for job in self.connection.call(self.connection.tuning.ListJobs, request).jobs]

    def cancel(self, job: str) -> JobReport:
        """End a job; what it measured stays."""
        from tuner_core.proto.tuner.v1 import tuning_pb2

        request = tuning_pb2.CancelJobRequest(job=job)
        return job_report(self.connection.call(self.connection.tuning.CancelJob, request).status)

    def resume(self, job: str) -> JobReport:
        """Let a stopped, cancelled or failed job go on from what it measured; does not follow it."""
        from tuner_core.proto.tuner.v1 import tuning_pb2

        request = tuning_pb2.ResumeJobRequest(job=job)
        return job_report(self.connection.call(self.connection.tuning.ResumeJob, request, HOST_TIMEOUT_S).status)

    # Models

    def _import(self, path: Path, input_shapes: Mapping[str, tuple[int, ...]]) -> ImportedModel:
        return import_model(path, input_shapes, self._progress, self._quiet)

    def _prepare(self, imported: ImportedModel, target_json: str, layout: str) -> Prepared:
        return prepare_model(imported, target_json, self._progress, self._quiet, layout)

    def _build_for_job(self, report: JobReport, prepared: Prepared, output: Path) -> JobReport:
        from tuner_client.building import build_model, choose_for_job
        from tuner_client.selection import Place

        target_json = json.dumps(dict(report.target))
        with self._progress.step(f"building {output.name}"):
            place = Place(report.device_model, report.sm_count, target_json)
            with self._quiet():
                chosen = choose_for_job(prepared, self.store, report, place)
                built = build_model(prepared, chosen, output, place)
        return dataclasses.replace(report, output=str(output), coverage=built.coverage())

    def build(
        self,
        model: str | os.PathLike[str],
        *,
        sm_percent: int,
        output: str | os.PathLike[str],
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        target: Mapping[str, Any] | None = None,
        layout: str = "auto",
        strict: bool = True,
    ) -> BuildReport:
        """Build a model from records, without measuring anything.

        Args:
            model: ``.onnx`` or ``.pt2`` file.
            sm_percent: Share to build for, 1..100.
            output: File to write.
            input_shapes: Shapes of inputs by name, where the model leaves them open.
            target: Target; None: the server's own at this share.
            layout: Of 2-D convolutions, as given to ``tune``.
            strict: Only records of exactly this device, SM count, target and TVM version. When False, an operator
                without any takes the nearest, see :class:`tuner_client.RecordDatabase`; the report names these.

        Returns:
            What was built, with the coverage: N of M operators tuned.
        """
        from tuner_client.building import build_model, choose, open_database
        from tuner_client.selection import Place

        check_sm_percent(sm_percent)
        check_layout(layout)
        check_model_path(Path(model))
        check_output(Path(output))
        imported = self._import(Path(model), {key: tuple(shape) for key, shape in (input_shapes or {}).items()})
        host = self.host(sm_percent)
        target_json = json.dumps(dict(target)) if target is not None else host.target_json
        if not host.devices:
            raise ConflictError(f"the server at {self.connection.address} has no device to build for")
        prepared = self._prepare(imported, target_json, layout)
        place = Place(host.devices[0].model, host.sm_count, target_json)
        with self._progress.step(f"building {Path(output).name}"), self._quiet():
            chosen = choose(prepared, open_database(self.store, place, strict=strict))
            return build_model(prepared, chosen, Path(output), place)

    # Hosts

    def host(self, sm_percent: int | None = None) -> host_pb2.GetHostResponse:
        """What the server offers and is doing; ``target_json`` and ``sm_count`` are those of the share."""
        from tuner_core.proto.tuner.v1 import host_pb2

        request = host_pb2.GetHostRequest(sm_percent=sm_percent or 0)
        connection = self.connection
        with self._progress.step("asking the server for its target"):
            response: host_pb2.GetHostResponse = connection.call(connection.host.GetHost, request, HOST_TIMEOUT_S)
        return response

    def drain(self) -> list[str]:
        """Let the server finish what it holds and take no more.

        Returns:
            The jobs it still holds.
        """
        from tuner_core.proto.tuner.v1 import host_pb2

        return list(self.connection.call(self.connection.host.Drain, host_pb2.DrainRequest()).running_jobs)

    # Records

    def query(
        self,
        where: RecordFilter | None = None,
        *,
        order: str = "latency",
        top_per_key: int = 0,
        limit: int | None = None,
        with_traces: bool = True,
    ) -> Iterator[Record]:
        """Records that match, streamed: all of them, as they stood at the beginning.

        Args:
            where: The filter; None: everything that is valid.
            order: ``latency`` or ``newest``.
            top_per_key: When positive, only the best so many of each operator, target, device and SM count.
            limit: At most so many; None: all.
            with_traces: Without, records come with an empty trace, and faster.
        """
        return self.store.stream(
            where or RecordFilter(), order=order, top_per_key=top_per_key, limit=limit, with_traces=with_traces
        )

    def page(
        self,
        where: RecordFilter | None = None,
        *,
        limit: int = 100,
        cursor: str | None = None,
        order: str = "latency",
        top_per_key: int = 0,
    ) -> Page:
        """One page of :meth:`query`; see :meth:`tuner_core.store.interface.RecordStore.query`."""
        return self.store.query(
            where or RecordFilter(), limit=limit, cursor=cursor, order=order, top_per_key=top_per_key
        )

    def follow(self, where: RecordFilter | None = None, *, last: int = 0) -> Iterator[Record]:
        """Records as they are committed, without an end: none twice, none left out, over lost connections too.

        Args:
            where: The filter.
            last: Begin with so many of the newest records that are there already, at most 10,000.
        """
        where = where or RecordFilter()
        cursor = self.store.follow(where).cursor
        shown = set()
        for record in reversed(self.page(where, limit=last, order="newest").records if last else ()):
            shown.add(record.trial_id)
            yield record
        lost_at: float | None = None
        while True:
            try:
                for followed in self.store.following(where, cursor):
                    lost_at = None
                    cursor = followed.cursor
                    for record in followed.records:
                        if record.trial_id not in shown:  # committed between the two questions above
                            yield record
            except UnavailableError:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at >= self._reconnect_s:
                    raise
                time.sleep(_FOLLOW_AGAIN_S)
                self.connection.reopen()

    def stats(self) -> dict[str, Any]:
        """Counts, coverage and growth; see :meth:`tuner_core.store.interface.RecordStore.stats`."""
        return self.store.stats()

    def prune(self, older_than: float, team: str = "", *, dry_run: bool = False) -> int:
        """Delete old records; see :meth:`tuner_core.store.interface.RecordStore.prune`.

        Raises:
            PermissionDeniedError: The token is of another team than ``team``.
        """
        return self.store.prune(older_than, team, dry_run=dry_run)

    def tag(self, trial_id: str, tags: Mapping[str, str | None], *, team: str = "") -> Record:
        """Set tags of a record; None removes one.

        Args:
            trial_id: The record.
            tags: Value by name.
            team: For whom, on a server without tokens.

        Raises:
            NotFoundError: There is no such record.
            PermissionDeniedError: It belongs to another team.
        """
        return self._store_for(team).tag(trial_id, tags)

    def export_records(
        self, folder: str | os.PathLike[str], where: RecordFilter | None = None, *, split: bool = False
    ) -> ExportReport:
        """Write valid records as a folder that stock TVM's ``JSONDatabase`` reads.

        Args:
            folder: Made when missing.
            where: Which records.
            split: A folder in ``folder`` for each target, device and SM count, instead of refusing more than one.
        """
        from tuner_core.store.tvm_folder import export_folder

        store = self.store
        with self._progress.step("exporting"), self._quiet():
            return export_folder(Path(folder), store, where or RecordFilter(), split=split)

    def import_records(
        self, folder: str | os.PathLike[str], *, sm_percent: int | None = None, team: str = ""
    ) -> ImportReport:
        """Read a folder written by stock TVM's ``JSONDatabase``, as measured on the server's device.

        Args:
            folder: The folder.
            sm_percent: Share that it was measured with; None: the whole device.
            team: Team that the records belong to.
        """
        from tuner_core.model import DeviceInfo

        check_sm_percent(sm_percent)
        if not Path(folder).is_dir():
            raise UsageError(f"there is no folder {folder}")
        host = self.host(sm_percent or 100)
        if not host.devices:
            raise ConflictError(f"the server at {self.connection.address} has no device to import for")
        first = host.devices[0]
        device = DeviceInfo(
            first.kind, first.model, first.arch, first.uuid, first.sm_count, first.driver_version, host.cuda_version
        )
        store = self.store
        with self._progress.step("importing"), self._quiet():
            from tuner_core.compiler.tvm_setup import load_tvm
            from tuner_core.store.tvm_folder import import_folder

            load_tvm()
            return import_folder(
                Path(folder),
                store,
                device=device,
                sm_percent=sm_percent or 100,
                sm_count=host.sm_count or first.sm_count,
                team=team,
            )


def _first_share(host: host_pb2.GetHostResponse) -> int:
    """The share that a server measures at when none is asked for."""
    if host.sm_percent:
        return host.sm_percent
    return host.workers[0].sm_percent if host.workers else 100


def tune(
    model: str | os.PathLike[str],
    *,
    server: str | ConnectionOptions | None = None,
    sm_percent: int | None = None,
    trials: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    target: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    team: str = "",
    refresh: bool = False,
    seed: int = 0,
    tags: Mapping[str, str] | None = None,
    layout: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> JobReport:
    """Tune a model and wait for it.

    Args:
        model: ``.onnx`` or torch.export ``.pt2`` file.
        server: ``HOST:PORT`` or how to connect; None: ``TUNER_SERVER``, else a local server for as long as this takes.
        sm_percent: Share of the device's SMs (of the cores, on a CPU), 1..100; None: the server's first share.
        trials: Budget of the whole job; None: 64 for each operator worth tuning.
        input_shapes: Shapes of inputs by name, where the model leaves them open.
        target: TVM target; None: the server's own.
        output: File to build, which stock TVM loads.
        name: Name of the model in records; None: the file's.
        team: Team that the records belong to.
        refresh: Measure again what the store already holds.
        seed: Of the search.
        tags: Stored with every record.
        layout: Of 2-D convolutions: ``NCHW`` (as the model has them), ``NHWC``, or ``auto``: NHWC for fp16 on GPUs with
            tensor cores.
        data_dir: The data directory; None: the user's.
        progress: Hears what happens.

    Returns:
        How the job ended.

    Raises:
        UsageError: An argument is wrong.
        ModelError: The model cannot be read or imported.
        UnavailableError: The server cannot be reached, or went away and stayed away.
        JobInterrupted: Ctrl-C.
    """
    chosen = server if server is not None else os.environ.get("TUNER_SERVER") or None
    arguments = ["--sm-percent", str(sm_percent)] if sm_percent is not None else []
    with Client(chosen, data_dir=data_dir, progress=progress, server_arguments=arguments) as client:
        return client.tune(
            model,
            sm_percent=sm_percent,
            trials=trials,
            input_shapes=input_shapes,
            target=target,
            output=output,
            name=name,
            team=team,
            refresh=refresh,
            seed=seed,
            tags=tags,
            layout=layout,
        )
