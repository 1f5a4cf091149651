"""Jobs of one server: tune, watch, cancel, resume."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_client.client.models import ModelClient
from tuner_client.client.server import HOST_TIMEOUT_S
from tuner_client.job import DETACHED, JobInterrupted, JobReport, job_report
from tuner_client.request import TuneRequest, check_model_path, check_output
from tuner_core.allocation.budget import DEFAULT_NEGLIGIBLE_SHARE
from tuner_core.allocation.stopping import DEFAULT_PATIENCE
from tuner_core.errors import ConflictError, DeadlineError, UnavailableError, UsageError
from tuner_core.model import JobState

if TYPE_CHECKING:
    from tuner_client.model.prepare import Prepared
    from tuner_core.proto.tuner.v1 import host_pb2

SUBMIT_TIMEOUT_S = 120.0
_SUBMIT_PAUSES_S = (0.5, 1.0, 2.0, 4.0)


class JobClient(ModelClient):
    """Submits, follows, lists and ends jobs of the server."""

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
        early_stopping: int = DEFAULT_PATIENCE,
        negligible_percent: float = 100 * DEFAULT_NEGLIGIBLE_SHARE,
        experience: str = "store",
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
            early_stopping=early_stopping,
            negligible_percent=negligible_percent,
            experience=experience,
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
        if not self.connection.embedded and not self.connection.lost:
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


def _first_share(host: host_pb2.GetHostResponse) -> int:
    """The share that a server measures at when none is asked for."""
    if host.sm_percent:
        return host.sm_percent
    return host.workers[0].sm_percent if host.workers else 100
