"""A gRPC server that replays recorded measurements: LeaseService and the record store as a real server has them.

Run as a process, so that it can be killed: ``python replay_server.py SETTINGS_JSON``. Prints its port when it is up.
Settings: ``folder`` (of its store), ``name``, ``port``, ``trial_s``, ``workers``, ``batch``, ``factor``, ``protocol``,
``device``, ``sm_percent``, ``host`` (to listen on), ``start_s`` (seconds before it answers), ``store`` (URL of a shared
one), ``claim_ttl_s``, ``tls_cert`` and ``tls_key`` (files), ``tokens`` (team by token).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import sys
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from tests.replay.instance import Refused, ReplayInstance, Said
from tests.replay.source import ReplayTask, replay_tasks
from tuner_core.model import (
    FailureKind,
    Origin,
    PartitionKind,
    Record,
    RecordKey,
    Workload,
    sha256_hex,
    target_digest,
    trial_id,
)
from tuner_core.proto.tuner.v1 import (
    host_pb2,
    host_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    records_pb2_grpc,
    tuning_pb2,
    tuning_pb2_grpc,
)
from tuner_core.store.open import open_store
from tuner_core.store.wire import workload_from_message, workload_to_message
from tuner_core.transport.options import SERVER_CHANNEL_OPTIONS
from tuner_server.scheduler.task_claims import TTL_S, TaskClaims
from tuner_server.services.auth import Authenticator
from tuner_server.services.records import RecordServicer

TARGET = '{"kind":"llvm","mcpu":"x86-64","num-cores":2}'
DEVICE = "Replayed CPU"
CORES = 2
_EVENTS = {"baseline": leases_pb2.BaselineMeasured, "trial": leases_pb2.TrialFinished}


def replay_spec(tunable: int, trials: int, *, untunable: int = 0) -> tuning_pb2.JobSpec:
    """A job whose tasks are recorded ones; their workloads are stand-ins."""
    spec = tuning_pb2.JobSpec(model="replayed", model_digest="0" * 64, target_json=TARGET, sm_percent=100)
    spec.trials = trials
    for task in replay_tasks(tunable, untunable=untunable):
        body = json.dumps({"replayed": task.name})
        workload = Workload(sha256_hex(body), body, op="replay", description=task.description)
        spec.tasks.add(name=task.name, workload=workload_to_message(workload), weight=task.weight, tunable=task.tunable)
    return spec


class Shard:
    """One job on this server: the replaying instance, its records, its events."""

    def __init__(
        self, job: str, spec: tuning_pb2.JobSpec, settings: dict[str, Any], store: Any, instance_name: str
    ) -> None:
        self.instance_name = instance_name
        self.job = job
        self.spec = spec
        self.store = store
        self.name = str(settings["name"])
        recorded = replay_tasks(sum(task.tunable for task in spec.tasks))
        self.tasks: dict[str, ReplayTask] = {}
        for task in spec.tasks:
            if task.tunable:
                source = recorded[len([one for one in self.tasks.values() if one.tunable])]
                self.tasks[task.name] = ReplayTask(
                    task.name, source.description, task.weight, True, source.baseline_us, source.trials
                )
            else:
                self.tasks[task.name] = ReplayTask(task.name, "plain", task.weight, False, 3.0, ())
        self.digests = {task.name: task.workload.digest for task in spec.tasks}
        self.instance = ReplayInstance(
            self.name,
            self.tasks,
            trial_s=settings.get("trial_s", 0.05),
            workers=settings.get("workers", 2),
            batch=settings.get("batch", 16),
            factor=settings.get("factor", 1.0),
            seed=zlib.crc32(f"{self.name}/{time.time()}".encode()),
        )
        self.incarnation = secrets.token_hex(4)
        self.events: list[leases_pb2.WatchShardResponse] = []
        self.changed = asyncio.Condition()
        self.wake = asyncio.Event()
        self.closed = False
        self.said = 0
        self.claims = TaskClaims(store, job, settings.get("claim_ttl_s", TTL_S))
        self.indices = {task.name: index for index, task in enumerate(spec.tasks)}
        self.holders: dict[str, str] = {}
        self.published: dict[str, Record] = {}

    async def begin(self) -> None:
        workloads = [workload_from_message(task.workload) for task in self.spec.tasks]
        await asyncio.to_thread(self.store.commit, [], workloads)
        self.pump = asyncio.create_task(self._pump())
        self.keeper = asyncio.create_task(self._keep_claims())

    async def _keep_claims(self) -> None:
        while True:
            await asyncio.sleep(self.claims.ttl_s / 3)
            for index in self.claims.held:
                await self.claims.renew(index)

    async def may_grant(self, lease: leases_pb2.Lease) -> bool:
        """Claim the lease's task; a lease that is held by another job, or done by it, ends at once."""
        if not lease.claim:
            return True
        taken = await self.claims.take(self.indices[lease.task], self.key(lease.task))
        if taken.holder:
            self.holders[lease.task] = taken.holder
            self.instance.end_at_once(lease.task, lease.token, "held")
            return False
        if lease.take_over and (best := self.store.top(self.key(lease.task), 1, verified_only=True)):
            self.published[lease.task] = best[0]
            self.instance.end_at_once(lease.task, lease.token, "published")
            return False
        return True

    async def _let_go(self, said: Said) -> None:
        if said.reason in ("concluded", "published"):
            await self.claims.release(self.indices[said.task])

    async def close(self) -> None:
        self.closed = True
        self.pump.cancel()
        self.keeper.cancel()
        await self.claims.release_all()
        async with self.changed:
            self.changed.notify_all()

    async def _pump(self) -> None:
        while not self.closed:
            self.instance.run_until(time.monotonic())
            fresh = self.instance.said[self.said :]
            self.said += len(fresh)
            if fresh:
                records = [record for said in fresh if (record := self.record(said)) is not None]
                await asyncio.to_thread(self.store.commit, records)
                self.events += [self.message(said) for said in fresh]
                for said in fresh:
                    await self._let_go(said)
                async with self.changed:
                    self.changed.notify_all()
            await asyncio.sleep(0.03)  # what happens meanwhile is stored together
            left_s = max(0.001, min(1.0, self.instance.next_due_s() - time.monotonic()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), left_s)
            self.wake.clear()

    def key(self, task: str) -> RecordKey:
        return RecordKey(self.digests[task], target_digest(TARGET), DEVICE, CORES)

    def identify(self, task: str, ours: str) -> tuple[str, str, bool, Origin]:
        """Trial id, trace, whether it is verified, and origin of a replayed trial's name."""
        verified = ours.endswith("/verified")
        which = ours.removesuffix("/verified").rpartition("/")[2]
        trace = json.dumps([which])
        origin = Origin.FALLBACK if which == "baseline" else Origin.SEARCH
        return trial_id(self.key(task), trace, self.job, verified), trace, verified, origin

    def record(self, said: Said) -> Record | None:
        if not said.trial_id:
            return None
        identity, trace, verified, origin = self.identify(said.task, said.trial_id)
        valid = said.latency_us is not None
        return Record(
            trial_id=identity,
            workload_digest=self.digests[said.task],
            trace=trace,
            target_json=TARGET,
            target_digest=target_digest(TARGET),
            device_model=DEVICE,
            device_arch="x86-64",
            sm_percent=100,
            sm_count=CORES,
            partition_kind=PartitionKind.CPU,
            verified=verified,
            latencies_us=(said.latency_us,) if said.latency_us is not None else (),
            median_us=said.latency_us,
            job=self.job,
            model=self.spec.model,
            failure=None if valid else FailureKind(said.failure),
            origin=origin,
            instance=self.instance_name,
            team=self.spec.team,
        )

    def message(self, said: Said) -> leases_pb2.WatchShardResponse:
        response = leases_pb2.WatchShardResponse(sequence=said.sequence, incarnation=self.incarnation)
        identity = self.identify(said.task, said.trial_id)[0] if said.trial_id else ""
        same = {"task": said.task, "token": said.token}
        if said.reason == "held":
            response.ended.CopyFrom(leases_pb2.LeaseEnded(**same, reason="held", holder=self.holders[said.task]))
        elif said.reason == "published":
            best = self.published[said.task]
            response.ended.CopyFrom(
                leases_pb2.LeaseEnded(
                    **same,
                    reason="published",
                    verified=True,
                    best_latency_us=best.median_us,
                    best_trial_id=best.trial_id,
                    baseline_latency_us=self.tasks[said.task].baseline_us,
                    reused=len(self.instance.records.get(said.task, ())),
                )
            )
        elif said.kind == "ended":
            response.ended.CopyFrom(
                leases_pb2.LeaseEnded(
                    **same,
                    reason=said.reason,
                    measured=said.measured,
                    verified=said.reason == "concluded",
                    best_latency_us=said.latency_us,
                    best_trial_id=identity,
                    fallback=said.trial_id.endswith("baseline/verified"),
                )
            )
        elif said.kind == "baseline":
            response.baseline.CopyFrom(
                leases_pb2.BaselineMeasured(**same, latency_us=said.latency_us, trial_id=identity)
            )
        else:
            response.trial.CopyFrom(
                leases_pb2.TrialFinished(**same, latency_us=said.latency_us, trial_id=identity, failure=said.failure)
            )
        return response

    def warm(self, task: str) -> None:
        """Know what the store holds, as a real server does when a task comes (back) to it."""
        from tuner_core.store.interface import RecordFilter

        found = self.store.query(RecordFilter(workload_digest=self.digests[task], include_failed=True), limit=10_000)
        for record in found.records:
            which = str(json.loads(record.trace)[0])
            name = f"{self.tasks[task].name}/{which}" + ("/verified" if record.verified else "")
            self.instance.warm(task, {name: record.median_us})


class LeaseServicer(leases_pb2_grpc.LeaseServiceServicer):
    def __init__(self, settings: dict[str, Any], store: Any, host: HostServicer, authenticator: Authenticator) -> None:
        self.authenticator = authenticator
        self.settings = settings
        self.store = store
        self.host = host
        self.shards: dict[str, Shard] = {}
        self.grants = Path(settings["folder"]) / "grants"
        self.grants.touch()

    async def _shard(self, job: str, context: Any) -> Shard:
        if job not in self.shards:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such job", (("tuner-error", "NotFoundError"),))
        return self.shards[job]

    async def OpenShard(self, request: Any, context: Any) -> Any:
        if request.job not in self.shards:
            request.spec.team = self.authenticator.team(context.invocation_metadata()) or request.spec.team
            shard = Shard(request.job, request.spec, self.settings, self.store, self.host.name)
            shard.instance.lease_s = request.lease_s
            self.shards[request.job] = shard
            await shard.begin()
        shard = self.shards[request.job]
        return leases_pb2.OpenShardResponse(
            instance=self.host.name,
            incarnation=shard.incarnation,
            workers=shard.instance.workers,
            batch=shard.instance.batch,
            draining=self.host.draining,
        )

    async def GrantLease(self, request: Any, context: Any) -> Any:
        shard = await self._shard(request.job, context)
        lease = request.lease
        shard.instance.draining = self.host.draining
        if lease.task not in shard.instance.holds:
            await asyncio.to_thread(shard.warm, lease.task)
        if lease.token > shard.instance.newest(lease.task) and not await shard.may_grant(lease):
            shard.wake.set()
            return leases_pb2.GrantLeaseResponse()
        try:
            shard.instance.grant(time.monotonic(), lease.task, lease.token, lease.trials, lease.conclude)
        except Refused as refused:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(refused), (("tuner-error", "ConflictError"),))
        shard.wake.set()
        with self.grants.open("a") as file:
            file.write(f"{time.time()} {lease.task} {lease.token}\n")
        return leases_pb2.GrantLeaseResponse()

    async def RenewLeases(self, request: Any, context: Any) -> Any:
        shard = await self._shard(request.job, context)
        lost = shard.instance.renew(time.monotonic(), zip(request.tasks, request.tokens, strict=True))
        return leases_pb2.RenewLeasesResponse(lost=lost, draining=self.host.draining)

    async def RevokeLease(self, request: Any, context: Any) -> Any:
        shard = await self._shard(request.job, context)
        shard.instance.revoke(time.monotonic(), request.task, request.token)
        shard.wake.set()
        return leases_pb2.RevokeLeaseResponse()

    async def MeasureModel(self, request: Any, context: Any) -> Any:
        shard = await self._shard(request.job, context)
        for identity in request.trial_ids.values():
            if await asyncio.to_thread(self.store.get, identity) is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"no record {identity}", ())
        await asyncio.sleep(shard.instance.trial_s)
        return leases_pb2.MeasureModelResponse(baseline_latency_us=200.0, tuned_latency_us=100.0, outputs_match=True)

    async def CloseShard(self, request: Any, context: Any) -> Any:
        if shard := self.shards.pop(request.job, None):
            await shard.close()
        return leases_pb2.CloseShardResponse()

    async def WatchShard(self, request: Any, context: Any) -> AsyncIterator[Any]:
        shard = await self._shard(request.job, context)
        sent = request.after_sequence if request.incarnation in ("", shard.incarnation) else 0

        def heartbeat() -> leases_pb2.WatchShardResponse:
            doing = f"measuring {', '.join(sorted(shard.instance.holds))}" if shard.instance.holds else "idle"
            return leases_pb2.WatchShardResponse(
                sequence=sent,
                incarnation=shard.incarnation,
                heartbeat=leases_pb2.ShardHeartbeat(draining=self.host.draining, doing=doing),
            )

        yield heartbeat()
        while not shard.closed:
            for event in shard.events[sent:]:
                sent = event.sequence
                yield event
            async with shard.changed:
                with contextlib.suppress(TimeoutError):
                    if len(shard.events) == sent:
                        await asyncio.wait_for(shard.changed.wait(), request.heartbeat_s)
                    continue
            yield heartbeat()


class HostServicer(host_pb2_grpc.HostServiceServicer):
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.name = f"{settings['name']}-{secrets.token_hex(2)}"
        self.draining = False

    async def GetHost(self, request: Any, context: Any) -> Any:
        device = self.settings.get("device", DEVICE)
        response = host_pb2.GetHostResponse(
            instance=self.name,
            version="0",
            protocol=self.settings.get("protocol", "tuner.v1"),
            tvm_version="0.27.0.post1",
            target_json=TARGET,
            sm_count=CORES,
            draining=self.draining,
            store=self.settings.get("store", ""),
        )
        response.devices.add(kind="cpu", model=device, arch="x86-64", uuid="cpu", sm_count=CORES, target_json=TARGET)
        response.workers.add(
            partition_kind="cpu", sm_percent=self.settings.get("sm_percent", 100), sm_count_seen=CORES, state="idle"
        )
        return response

    async def Drain(self, request: Any, context: Any) -> Any:
        self.draining = True
        return host_pb2.DrainResponse()


class TuningServicer(tuning_pb2_grpc.TuningServiceServicer):
    async def ListJobs(self, request: Any, context: Any) -> Any:
        return tuning_pb2.ListJobsResponse()


async def serve(settings: dict[str, Any]) -> None:
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(settings.get("store") or f"sqlite:///{folder / 'records.sqlite'}")
    await asyncio.sleep(settings.get("start_s", 0.0))
    host = HostServicer(settings)
    authenticator = Authenticator(settings.get("tokens", {}))
    leases = LeaseServicer(settings, store, host, authenticator)
    server = grpc.aio.server(interceptors=[authenticator], options=SERVER_CHANNEL_OPTIONS)
    host_pb2_grpc.add_HostServiceServicer_to_server(host, server)
    tuning_pb2_grpc.add_TuningServiceServicer_to_server(TuningServicer(), server)
    records_pb2_grpc.add_RecordServiceServicer_to_server(RecordServicer(store, authenticator), server)
    leases_pb2_grpc.add_LeaseServiceServicer_to_server(leases, server)
    place = f"{settings.get('host', '127.0.0.1')}:{settings.get('port', 0)}"
    if "tls_cert" in settings:
        pair = (Path(settings["tls_key"]).read_bytes(), Path(settings["tls_cert"]).read_bytes())
        port = server.add_secure_port(place, grpc.ssl_server_credentials([pair]))
    else:
        port = server.add_insecure_port(place)
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(port, flush=True)
    await stopping.wait()
    await server.stop(0.2)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
