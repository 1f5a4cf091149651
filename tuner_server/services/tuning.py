"""TuningService: jobs over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from tuner_core.proto.tuner.v1 import tuning_pb2 as pb
from tuner_core.proto.tuner.v1 import tuning_pb2_grpc
from tuner_server.scheduler.supervisor import JobSupervisor
from tuner_server.services.auth import Authenticator
from tuner_server.services.status import mapped

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class TuningServicer(tuning_pb2_grpc.TuningServiceServicer):
    """Hands requests to the supervisor."""

    def __init__(self, jobs: JobSupervisor, authenticator: Authenticator) -> None:
        self._jobs = jobs
        self._authenticator = authenticator

    @mapped
    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Context) -> pb.SubmitJobResponse:
        """Take in a job; with tokens, for the caller's team."""
        team = self._authenticator.team(context.invocation_metadata())
        if team:
            request.spec.team = team
        return pb.SubmitJobResponse(job=await self._jobs.submit(request.spec))

    @mapped
    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        """Status of one job."""
        return pb.GetJobResponse(status=self._jobs.get(request.job))

    @mapped
    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """All jobs, newest first."""
        return pb.ListJobsResponse(jobs=self._jobs.statuses(request.limit))

    @mapped
    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[pb.WatchJobResponse]:
        """A job's changes until it ends."""
        async for status, message in self._jobs.watch(request.job):
            yield pb.WatchJobResponse(status=status, message=message)

    @mapped
    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        """End a job of one's own team."""
        self._check_owner(request.job, context)
        return pb.CancelJobResponse(status=await self._jobs.cancel(request.job))

    @mapped
    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Context) -> pb.ResumeJobResponse:
        """Go on with a job of one's own team."""
        self._check_owner(request.job, context)
        return pb.ResumeJobResponse(status=await self._jobs.resume(request.job))

    def _check_owner(self, job: str, context: Context) -> None:
        status = self._jobs.get(job)
        self._authenticator.check_owner(context.invocation_metadata(), status.team, job)
