"""HostService: what this instance offers and is doing."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import grpc.aio

from tuner_core.model import PROTOCOL
from tuner_core.proto.tuner.v1 import host_pb2 as pb
from tuner_core.proto.tuner.v1 import host_pb2_grpc
from tuner_server import __version__
from tuner_server.engine import Engine
from tuner_server.measure.metrics import FleetFacts
from tuner_server.scheduler.supervisor import JobSupervisor
from tuner_server.services.status import mapped

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class HostServicer(host_pb2_grpc.HostServiceServicer):
    """Answers from the engine's and the supervisor's state."""

    def __init__(self, engine: Engine, jobs: JobSupervisor, instance: str, store_url: str) -> None:
        self._engine = engine
        self._jobs = jobs
        self._instance = instance
        self._store = store_url.split("@")[-1] if "@" in store_url else store_url

    @mapped
    async def GetHost(self, request: pb.GetHostRequest, context: Context) -> pb.GetHostResponse:
        """Devices, workers, jobs; and the target at the share that is asked for."""
        engine = self._engine
        await engine.start()
        share = request.sm_percent or engine.default_share
        offer = await engine.offer(share)
        response = pb.GetHostResponse(
            instance=self._instance,
            version=__version__,
            protocol=PROTOCOL,
            tvm_version=engine.tvm_version,
            cuda_version=offer.device.cuda_version,
            running_jobs=self._jobs.running(),
            draining=self._jobs.draining,
            store=self._store,
            partition_kinds=sorted({str(kind) for device in engine.devices for kind in device.provider.kinds_on_offer}),
            target_json=offer.target_json,
            sm_count=offer.sm_count,
            sm_percent=share,
            trials_measured=self._jobs.trials_measured,
        )
        for place in await engine.offers(share):
            response.places.add(
                device_model=place.device.model,
                device_kind=place.device.kind,
                device_arch=place.device.arch,
                target_json=place.target_json,
                sm_count=place.sm_count,
                devices=[device.name for device in place.devices],
                on_offer=place.on_offer,
            )
        for device in engine.devices:
            info = device.info
            response.devices.add(
                kind=info.kind,
                model=info.model,
                arch=info.arch,
                uuid=info.uuid,
                sm_count=info.sm_count,
                driver_version=info.driver_version,
                target_json=await device.provider.target_json(100),
                name=device.name,
                shares=device.configured,
                present_shares=device.shares,
                partition_kinds=[str(kind) for kind in device.provider.kinds_on_offer],
                cuda_version=info.cuda_version,
                notes=device.provider.describe(),
                measuring=measuring_message(device.fleet.facts()),
            )
        for worker in engine.workers():
            response.workers.add(
                index=worker.index,
                device_uuid=worker.device_uuid,
                partition_kind=worker.kind,
                sm_percent=worker.sm_percent,
                sm_count_seen=worker.sm_count_seen,
                state=worker.state,
                pid=worker.pid,
                affinity=worker.affinity,
            )
        return response

    @mapped
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Finish what runs, take no more."""
        self._jobs.drain()
        return pb.DrainResponse(running_jobs=self._jobs.running())


def measuring_message(facts: FleetFacts) -> pb.Measuring:
    """What measuring on a device has cost, for the wire."""
    return pb.Measuring(
        pauses=pb.Spans(**dataclasses.asdict(facts.pauses)),
        pause_bound_s=facts.pause_bound_s,
        recoveries=pb.Spans(**dataclasses.asdict(facts.recoveries)),
        worker_restarts=facts.worker_restarts,
        voided_measurements=facts.voided,
        faults=facts.faults,
    )
