"""LeaseService: this instance's part of jobs that clients shard over several instances, over gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from tuner_core.errors import NotFoundError, UsageError
from tuner_core.proto.tuner.v1 import leases_pb2 as pb
from tuner_core.proto.tuner.v1 import leases_pb2_grpc
from tuner_server.scheduler.supervisor import JobSupervisor
from tuner_server.services.auth import Authenticator
from tuner_server.services.status import mapped

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class LeaseServicer(leases_pb2_grpc.LeaseServiceServicer):
    """Hands requests to the supervisor's shards; with tokens, a team reaches its own only."""

    def __init__(self, jobs: JobSupervisor, authenticator: Authenticator, instance: str) -> None:
        self._jobs = jobs
        self._shards = jobs.shards
        self._authenticator = authenticator
        self._instance = instance

    @mapped
    async def OpenShard(self, request: pb.OpenShardRequest, context: Context) -> pb.OpenShardResponse:
        """Take in a job's tasks; for the caller's team."""
        with contextlib.suppress(NotFoundError):  # then it is new
            self._check_owner(request.job, context)
        team = self._authenticator.team(context.invocation_metadata())
        if team:
            request.spec.team = team
        opened = await self._shards.open(request.job, request.spec, request.lease_s)
        return pb.OpenShardResponse(
            instance=self._instance,
            incarnation=opened.incarnation,
            workers=opened.workers,
            batch=opened.batch,
            in_flight=opened.in_flight,
            draining=self._shards.draining,
        )

    @mapped
    async def GrantLease(self, request: pb.GrantLeaseRequest, context: Context) -> pb.GrantLeaseResponse:
        """Start a lease or extend one."""
        self._check_owner(request.job, context)
        await self._shards.grant(request.job, request.lease)
        return pb.GrantLeaseResponse()

    @mapped
    async def RenewLeases(self, request: pb.RenewLeasesRequest, context: Context) -> pb.RenewLeasesResponse:
        """Move deadlines."""
        self._check_owner(request.job, context)
        if len(request.tasks) != len(request.tokens):
            raise UsageError(f"{len(request.tasks)} tasks and {len(request.tokens)} tokens; give one for each")
        lost = self._shards.renew(request.job, list(zip(request.tasks, request.tokens, strict=True)))
        return pb.RenewLeasesResponse(lost=lost, draining=self._shards.draining)

    @mapped
    async def RevokeLease(self, request: pb.RevokeLeaseRequest, context: Context) -> pb.RevokeLeaseResponse:
        """End a lease early."""
        self._check_owner(request.job, context)
        self._shards.revoke(request.job, request.task, request.token)
        return pb.RevokeLeaseResponse()

    @mapped
    async def MeasureModel(self, request: pb.MeasureModelRequest, context: Context) -> pb.MeasureModelResponse:
        """Measure the whole model, untuned and with records."""
        self._check_owner(request.job, context)
        result = await self._shards.measure_model(request.job, request.trial_ids)
        response = pb.MeasureModelResponse(
            baseline_latency_us=result.baseline_us, tuned_latency_us=result.tuned_us, error=result.message
        )
        if result.outputs_match is not None:
            response.outputs_match = result.outputs_match
        return response

    @mapped
    async def CloseShard(self, request: pb.CloseShardRequest, context: Context) -> pb.CloseShardResponse:
        """End the job here."""
        self._check_owner(request.job, context)
        await self._shards.close(request.job)
        return pb.CloseShardResponse()

    @mapped
    async def WatchShard(self, request: pb.WatchShardRequest, context: Context) -> AsyncIterator[pb.WatchShardResponse]:
        """Events and heartbeats until the shard ends here."""
        self._check_owner(request.job, context)
        events = self._shards.watch(request.job, request.after_sequence, request.incarnation, request.heartbeat_s)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    def _check_owner(self, job: str, context: Context) -> None:
        status = self._jobs.get(job)
        self._authenticator.check_owner(context.invocation_metadata(), status.team, job)
