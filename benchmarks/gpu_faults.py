"""Every way to lose measurement workers on a GPU, several times: what is recorded, who else suffers, how long it takes.

    python benchmarks/gpu_faults.py [--out DIR] [--repeats 3] [--budget-s 170] [--only FAULT ...] [--stand-in]

Writes ``gpu-faults-DEVICE.json`` (default: into benchmarks/results), a row for each repetition. Exit code 0 when every
fault was recorded with its kind, no innocent measurement failed or came out poisoned, and all workers were back in
time: 5 s, 15 s after the death of the daemon. ``--stand-in`` rehearses on a CPU with a stand-in for NVIDIA's daemon;
its file goes to a temporary directory unless ``--out`` says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from tests.gpu import kernels  # noqa: E402
from tuner_core.errors import TunerError  # noqa: E402
from tuner_core.model import FailureKind  # noqa: E402
from tuner_server.gpu.inventory import GpuInfo, choose_gpus, find_gpus  # noqa: E402
from tuner_server.gpu.lock import LOCK_DIRECTORY  # noqa: E402
from tuner_server.measure.fleet import WorkerFleet  # noqa: E402
from tuner_server.measure.gate import CoreGate  # noqa: E402
from tuner_server.measure.requests import MeasureRequest  # noqa: E402
from tuner_server.partitions.interface import Partition  # noqa: E402
from tuner_server.partitions.mps import MpsPartitions  # noqa: E402
from tuner_server.processes.spawner import Spawner  # noqa: E402
from tuner_server.trial import TrialFailed  # noqa: E402

log = logging.getLogger("gpu_faults")

RECOVERY_S = 5.0
DAEMON_RECOVERY_S = 15.0
ENDLESS_DEADLINE_S = 2.0
_NOTICED_S = 3.0
_POISONED = 10.0  # a timing through a dying context is off by orders of magnitude; neighbours cost some percent
STANDIN = ROOT / "tests" / "gpu_standin"


class OnTheCpu(MpsPartitions):
    """Daemon, plans and stops are those of MPS; a worker measures on one core."""

    def plan_shares(self, shares: Sequence[int]) -> list[Partition]:
        core = min(os.sched_getaffinity(0))
        return [
            dataclasses.replace(part, tvm_device="cpu:0", expected_sm_count=1, affinity=(core,))
            for part in super().plan_shares(shares)
        ]


@dataclasses.dataclass(frozen=True)
class Host:
    """What the faults happen on."""

    fleet: WorkerFleet
    provider: MpsPartitions
    artifacts: Path

    def request(self, name: str, timeout_s: float = 10.0) -> MeasureRequest:
        """A measurement of a test kernel."""
        return kernels.request(kernels.built(self.artifacts, name), timeout_s)

    async def verdict(self, name: str, timeout_s: float = 10.0) -> str:
        """The kind of failure that is recorded, or ``measured``."""
        try:
            await self.fleet.measure(self.request(name, timeout_s))
        except TrialFailed as failure:
            log.info("%s: %s: %s", name, failure.kind, failure)
            return str(failure.kind)
        return "measured"


Hurt = Callable[[Host], Awaitable[str]]


def kernel(name: str, timeout_s: float = 10.0) -> Hurt:
    """Measure a kernel that misbehaves."""
    return lambda host: host.verdict(name, timeout_s)


async def kill_busy(host: Host) -> str:
    """SIGKILL from outside of a worker in the middle of a kernel; its trial is innocent."""
    victim = asyncio.create_task(host.verdict("slow", 60.0))
    await asyncio.sleep(0.1)
    busy = [worker for worker in host.fleet.workers() if worker.state == "measuring"]
    os.kill(busy[0].pid, signal.SIGKILL)
    return await victim


async def kill_server(host: Host) -> str:
    """SIGKILL of the MPS server, the daemon's child."""
    for pid in await host.provider.daemon.servers():
        os.kill(pid, signal.SIGKILL)
    return "killed"


async def kill_daemon(host: Host) -> str:
    """SIGKILL of the MPS control daemon."""
    assert host.provider.daemon.pid is not None
    os.kill(host.provider.daemon.pid, signal.SIGKILL)
    return "killed"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way to lose workers, what must come of it, and within how many seconds all workers must be back."""

    hurt: Hurt
    outcome: str
    limit_s: float = RECOVERY_S
    on_cpu: bool = True


FAULTS = {
    "illegal_access": Fault(kernel("illegal"), FailureKind.RUN_ERROR),
    "endless_kernel": Fault(kernel("endless", ENDLESS_DEADLINE_S), FailureKind.RUN_TIMEOUT),
    "out_of_memory": Fault(kernel("greedy"), FailureKind.OUT_OF_MEMORY),
    "over_the_workers_limit": Fault(kernel("hungry"), FailureKind.OUT_OF_MEMORY, on_cpu=False),
    "worker_killed": Fault(kill_busy, "measured"),
    "mps_server_killed": Fault(kill_server, "killed", on_cpu=False),
    "mps_daemon_killed": Fault(kill_daemon, "killed", DAEMON_RECOVERY_S),
}


class Steps(logging.Handler):
    """Keeps what the product's own log says of a recovery."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("tuner_server"):
            self.lines.append(record.getMessage()[:200])


class Watch:
    """When workers were missing and when all were there again, looked at every 2 ms."""

    def __init__(self, fleet: WorkerFleet) -> None:
        self.capacity = len(fleet.workers())
        self.lowest = self.capacity
        self.down: list[float] = []
        self.up: list[float] = []
        self._fleet = fleet
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            now = self._fleet.capacity
            self.lowest = min(self.lowest, now)
            if now < self.capacity and len(self.down) == len(self.up):
                self.down.append(time.perf_counter())
            elif now == self.capacity and len(self.down) > len(self.up):
                self.up.append(time.perf_counter())
            await asyncio.sleep(0.002)

    async def all_back(self, within_s: float) -> bool:
        """Wait for the loss to be noticed, then for the last worker."""
        noticed_until = time.perf_counter() + _NOTICED_S
        while not self.down and time.perf_counter() < noticed_until:
            await asyncio.sleep(0.01)
        deadline = time.perf_counter() + within_s
        while len(self.up) < len(self.down) and time.perf_counter() < deadline:
            await asyncio.sleep(0.01)
        return bool(self.down) and len(self.up) == len(self.down)

    @property
    def recoveries_s(self) -> list[float]:
        """How long each took."""
        return [round(up - down, 3) for down, up in zip(self.down, self.up, strict=False)]

    def end(self) -> None:
        """Look no more."""
        self._task.cancel()


async def repetition(host: Host, name: str, number: int) -> dict[str, Any]:
    """Let a fault happen while innocent measurements run on all the other workers."""
    fault, fleet = FAULTS[name], host.fleet
    good = host.request("good", 10.0)
    before_us = statistics.median([(await fleet.measure(good)).median_us for _ in range(5)])
    pids, facts = {worker.pid for worker in fleet.workers()}, fleet.facts()
    stop, latencies, failures = asyncio.Event(), list[float](), list[str]()

    async def innocent() -> None:
        while not stop.is_set():
            try:
                latencies.append((await fleet.measure(good)).median_us)
            except (TrialFailed, TunerError) as error:
                failures.append(f"{getattr(error, 'kind', type(error).__name__)}: {error}")
                await asyncio.sleep(0.05)

    steps, watch = Steps(), Watch(fleet)
    logging.getLogger().addHandler(steps)
    loops = [asyncio.create_task(innocent()) for _ in range(watch.capacity - 1)]
    try:
        await asyncio.sleep(0.2)
        start = time.perf_counter()
        outcome = await asyncio.wait_for(fault.hurt(host), 60)
        back = await watch.all_back(fault.limit_s + 15)
        await asyncio.sleep(0.3)
    finally:
        stop.set()
        await asyncio.gather(*loops, return_exceptions=True)
        watch.end()
        logging.getLogger().removeHandler(steps)
    after_us = statistics.median([(await fleet.measure(good)).median_us for _ in range(5)])
    after, worst_us = fleet.facts(), max(latencies, default=0.0)
    longest_s = max(watch.recoveries_s, default=None)
    problems = [
        f"recorded as {outcome}, not {fault.outcome}" if outcome != fault.outcome else "",
        "not all workers came back" if not back else "",
        f"back after {longest_s} s, limit {fault.limit_s} s" if longest_s and longest_s > fault.limit_s else "",
        f"an innocent measurement failed: {failures[0]}" if failures else "",
        f"a timing was poisoned: {worst_us:.1f} us" if worst_us > _POISONED * before_us else "",
        f"{after_us:.1f} us afterwards, {before_us:.1f} before" if not 0.5 < after_us / before_us < 2 else "",
    ]
    return {
        "fault": name,
        "repetition": number,
        "recorded": outcome,
        "recovery_s": longest_s,
        "recoveries_s": watch.recoveries_s,
        "limit_s": fault.limit_s,
        "workers_lost_after_s": round(watch.down[0] - start, 3) if watch.down else None,
        "lowest_capacity": watch.lowest,
        "workers_replaced": len({worker.pid for worker in fleet.workers()} - pids),
        "voided": after.voided - facts.voided,
        "innocent_measurements": len(latencies),
        "innocent_failures": len(failures),
        "good_us": {"before": before_us, "worst_during": worst_us, "after": after_us},
        "steps": steps.lines,
        "problems": [problem for problem in problems if problem],
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each fault."""
    lines = []
    for name in dict.fromkeys(row["fault"] for row in rows):
        ours = [row for row in rows if row["fault"] == name]
        times = [row["recovery_s"] for row in ours if row.get("recovery_s") is not None]
        lines.append(
            {
                "fault": name,
                "repetitions": len(ours),
                "recorded": sorted({str(row.get("recorded")) for row in ours}),
                "recovery_median_s": statistics.median(times) if times else None,
                "recovery_worst_s": max(times, default=None),
                "limit_s": FAULTS[name].limit_s,
                "ok": not any(row["problems"] for row in ours),
            }
        )
    return lines


def target_of(gpu: GpuInfo, stand_in: bool) -> str:
    """What to build the kernels for."""
    return '{"kind": "llvm"}' if stand_in else json.dumps({**json.loads(kernels.H200_TARGET), "arch": gpu.arch})


def provider_of(gpu: GpuInfo, directory: Path, stand_in: bool) -> MpsPartitions:
    """What divides the GPU."""
    if not stand_in:
        return MpsPartitions(gpu, directory)
    probe = (sys.executable, str(STANDIN / "mps_client.py"), "probe")
    return OnTheCpu(gpu, directory, control=str(STANDIN / "nvidia-cuda-mps-control"), probe=probe)


async def run(options: argparse.Namespace, gpu: GpuInfo, work: Path) -> list[dict[str, Any]]:
    """Every repetition of every fault; rounds of all faults, so that a short budget still sees each of them."""
    began = time.perf_counter()
    names = [name for name in options.only if FAULTS[name].on_cpu or not options.stand_in]
    artifacts = work / "artifacts"
    artifacts.mkdir()
    for name in kernels.BODIES:
        await asyncio.to_thread(kernels.build, name, artifacts, target_of(gpu, options.stand_in))
    spawner, provider = Spawner(work / "logs"), provider_of(gpu, work / "mps", options.stand_in)
    fleet = WorkerFleet(spawner, provider, CoreGate(spare=True))
    rows: list[dict[str, Any]] = []
    await spawner.start()
    try:
        await provider.start()
        share = 50 if options.stand_in else 25
        await fleet.start(provider.plan(share))
        host = Host(fleet, provider, artifacts)
        for number in range(1, options.repeats + 1):
            for name in names:
                if time.perf_counter() - began > options.budget_s:
                    rows.append({"fault": name, "repetition": number, "problems": ["no time left"]})
                    continue
                try:
                    row = await asyncio.wait_for(repetition(host, name, number), 90)
                except Exception as error:
                    log.exception("%s", name)
                    row = {"fault": name, "repetition": number, "problems": [f"{type(error).__name__}: {error}"]}
                rows.append(row)
                said = "; ".join(row["problems"]) or "ok"
                print(f"{name:24} {number}: back after {row.get('recovery_s')} s, {said}", flush=True)
    finally:
        await fleet.stop()
        await provider.stop()
        await spawner.stop()
    return rows


def main() -> int:
    """Run, write, say how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=170)
    parser.add_argument("--only", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    machine = results.machine()
    work = Path(tempfile.mkdtemp(prefix="gpu-faults-"))
    out = options.out or (work if options.stand_in else results.DIRECTORY)
    logging.basicConfig(level=logging.INFO, filename=work / "run.log", format="%(asctime)s %(name)s %(message)s")
    if options.stand_in:
        gpu = GpuInfo(0, f"GPU-{uuid.uuid4()}", "stand-in", "sm_90", 139 << 30, "default", False, "none", "13.0")
    else:
        (gpu, *_) = choose_gpus(find_gpus(), "cuda")
    try:
        rows = asyncio.run(run(options, gpu, work))
        lines = summary(rows)
        name = "gpu-faults-" + gpu.name.lower().replace("nvidia ", "").replace(" ", "-")
        path = results.write(
            name,
            rows,
            device=gpu.name,
            driver=gpu.driver_version,
            machine_before=machine,
            directory=out,
            summary=lines,
        )
    finally:
        if options.stand_in:
            (LOCK_DIRECTORY / f"tuner-{gpu.uuid}.lock").unlink(missing_ok=True)
    print(f"\n{'fault':24} {'recorded':16} median  worst  limit  (seconds until all workers measure again)")
    for line in lines:
        median, worst = line["recovery_median_s"], line["recovery_worst_s"]
        times = f"{median:6.2f} {worst:6.2f} {line['limit_s']:6.1f}" if worst is not None else " " * 20
        print(f"{line['fault']:24} {', '.join(line['recorded']):16} {times}  {'ok' if line['ok'] else 'FAIL'}")
    good = all(line["ok"] for line in lines)
    print(f"wrote {path}" if good else f"wrote {path}; logs in {work}")
    if good and options.out:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
