"""A gRPC server that speaks the real protocol and plays one job by script, for tests of the client's own behaviour.

Run as a process, so that it can be killed: ``python scripted_server.py SCRIPT_JSON``. It prints its port when it is up.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from tuner_core.proto.tuner.v1 import host_pb2, host_pb2_grpc, tuning_pb2, tuning_pb2_grpc
from tuner_core.transport.options import SERVER_CHANNEL_OPTIONS

TICK_S = 0.05
TARGET = '{"kind":"llvm","mcpu":"x86-64","num-cores":2}'
JOB = "job-0123abcd"
BUDGET = 64


class Play:
    """The job's state as a function of how many ticks have passed.

    Script keys: ``end`` (last status), ``ticks`` (how long it takes), ``from`` (tick to begin at), ``first`` (status
    before the end), ``calls`` (file that gets one line per call), ``token`` (demand it), ``tasks`` (how many).
    """

    def __init__(self, script: dict[str, Any]) -> None:
        self.script = script
        self.tick = int(script.get("from", 0))
        self.override = ""
        self.changed = asyncio.Condition()

    def called(self, name: str, **facts: Any) -> None:
        if path := self.script.get("calls"):
            with Path(path).open("a") as calls:
                calls.write(json.dumps({"call": name, "time": time.time(), **facts}) + "\n")

    @property
    def over(self) -> bool:
        return self.tick >= int(self.script.get("ticks", 10))

    def status(self) -> tuning_pb2.JobStatus:
        end = self.script.get("end", "done")
        state = self.override or (end if self.over else self.script.get("first", "running"))
        share = min(1.0, self.tick / int(self.script.get("ticks", 10)))
        status = tuning_pb2.JobStatus(
            job=JOB,
            model="tiny",
            model_digest=self.script.get("digest", "d" * 64),
            status=state,
            target_json=TARGET,
            sm_percent=100,
            sm_count=2,
            trials_measured=int(BUDGET * share),
            trials_failed=3,
            trials_reused=0,
            trials_budget=BUDGET,
            elapsed_s=self.tick * TICK_S,
            trials_per_s=12.5,
            phase="measuring candidates",
            device_model="Test CPU",
            error="the scripted reason" if state in ("failed", "stopped") else "",
        )
        final = state in ("done", "partly")
        if final:
            status.baseline_latency_us = 4200.0
            status.tuned_latency_us = 1400.0
            status.outputs_match = True
        names = ["conv2d 1x8x14x14 -> 16, 3x3, fp32, NCHW", "dense 64x128 -> 32, fp32"]
        for index in range(int(self.script.get("tasks", 3))):
            fallback = index >= 2
            failed = index == 1 and end == "partly"
            task = status.tasks.add(
                name=f"task{index}",
                state=("fallback" if fallback else "failed" if failed else "tuned") if final else "running",
                workload_digest=f"{index:064x}",
                description=names[index] if index < 2 else f"max_pool2d number {index}",
                weight=index + 1,
                trials=0 if fallback else status.trials_measured // 2,
                failed=3 if index == 0 else 0,
                verified=final and not fallback and not failed,
                error="no candidate could be built" if failed and final else "",
                failures={"build_error": 2, "run_timeout": 1} if index == 0 else {},
            )
            if not fallback:
                task.baseline_latency_us = 812.0
                task.best_latency_us = 812.0 / (1 + 2 * share)
        return status


class TuningServicer(tuning_pb2_grpc.TuningServiceServicer):
    def __init__(self, play: Play) -> None:
        self.play = play

    async def _check(self, name: str, context: grpc.aio.ServicerContext, job: str | None = None) -> None:
        self.play.called(name)
        token = self.play.script.get("token")
        if token and ("authorization", f"Bearer {token}") not in tuple(context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token; give --token-file")
        if job is not None and job != JOB:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no job {job} on this server")

    async def SubmitJob(self, request: Any, context: Any) -> Any:
        await self._check("SubmitJob", context)
        if path := self.play.script.get("request"):
            await asyncio.to_thread(Path(path).write_bytes, request.SerializeToString())
        self.play.script["digest"] = request.spec.model_digest
        return tuning_pb2.SubmitJobResponse(job=JOB)

    async def GetJob(self, request: Any, context: Any) -> Any:
        await self._check("GetJob", context, request.job)
        return tuning_pb2.GetJobResponse(status=self.play.status())

    async def ListJobs(self, request: Any, context: Any) -> Any:
        await self._check("ListJobs", context)
        return tuning_pb2.ListJobsResponse(jobs=[self.play.status()])

    async def CancelJob(self, request: Any, context: Any) -> Any:
        await self._check("CancelJob", context, request.job)
        self.play.override = "cancelled"
        return tuning_pb2.CancelJobResponse(status=self.play.status())

    async def ResumeJob(self, request: Any, context: Any) -> Any:
        await self._check("ResumeJob", context, request.job)
        self.play.override = ""
        self.play.script["first"] = "running"
        return tuning_pb2.ResumeJobResponse(status=self.play.status())

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._check("WatchJob", context, request.job)
        yield tuning_pb2.WatchJobResponse(status=self.play.status(), message="the scripted message")
        while True:
            status = self.play.status()
            yield tuning_pb2.WatchJobResponse(status=status)
            if status.status not in ("queued", "running"):
                return
            await asyncio.sleep(TICK_S)
            self.play.tick += 1


class HostServicer(host_pb2_grpc.HostServiceServicer):
    def __init__(self, play: Play) -> None:
        self.play = play

    async def GetHost(self, request: Any, context: Any) -> Any:
        self.play.called("GetHost", sm_percent=request.sm_percent)
        response = host_pb2.GetHostResponse(
            instance="scripted", version="0", protocol="tuner.v1", target_json=TARGET, sm_count=2, tvm_version="0.27"
        )
        response.devices.add(kind="cpu", model="Test CPU", arch="x86-64", uuid="cpu", sm_count=2, target_json=TARGET)
        response.workers.add(
            partition_kind="cpu", sm_percent=100, sm_count_seen=2, state="idle", pid=1, affinity=[0, 1]
        )
        return response

    async def Drain(self, request: Any, context: Any) -> Any:
        self.play.called("Drain")
        return host_pb2.DrainResponse(running_jobs=[JOB])


def credentials_of(files: dict[str, str]) -> grpc.ServerCredentials:
    """Mutual TLS from PEM files ``key``, ``cert`` and ``ca``."""
    key, cert, ca = (Path(files[name]).read_bytes() for name in ("key", "cert", "ca"))
    return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)


async def serve(script: dict[str, Any]) -> None:
    play = Play(script)
    server = grpc.aio.server(options=SERVER_CHANNEL_OPTIONS)
    tuning_pb2_grpc.add_TuningServiceServicer_to_server(TuningServicer(play), server)
    host_pb2_grpc.add_HostServiceServicer_to_server(HostServicer(play), server)
    address = f"127.0.0.1:{script.get('port', 0)}"
    if tls := script.get("tls"):
        port = server.add_secure_port(address, credentials_of(tls))
    else:
        port = server.add_insecure_port(address)
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(port, flush=True)
    await stopping.wait()
    play.override = "stopped"
    await asyncio.sleep(4 * TICK_S)
    await server.stop(0.5)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
