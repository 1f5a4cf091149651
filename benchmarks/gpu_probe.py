"""What a GPU host really does: MPS, SM shares, four workers, an exclusive turn. Of faults, see gpu_faults.py.

    python benchmarks/gpu_probe.py OUT_DIR [--budget-s 220] [--only SECTION ...] [--rehearse]

Writes OUT_DIR/gpu_probe.json after every section, so that what was found survives a section that fails or hangs, and
the processes' logs into OUT_DIR/logs.txt. Exit code 0 when every section passed. ``--rehearse`` runs the same logic on
a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tuner_core.errors import TunerError  # noqa: E402
from tuner_server.gpu.inventory import GpuInfo, choose_gpus, find_gpus  # noqa: E402
from tuner_server.gpu.mps import MpsDaemon, find_control  # noqa: E402
from tuner_server.gpu.target import read_device_facts  # noqa: E402
from tuner_server.measure.fleet import WorkerFleet  # noqa: E402
from tuner_server.measure.gate import CoreGate  # noqa: E402
from tuner_server.measure.requests import MeasureRequest  # noqa: E402
from tuner_server.partitions.cpu import CpuPartitions  # noqa: E402
from tuner_server.partitions.interface import PartitionProvider  # noqa: E402
from tuner_server.partitions.mps import MpsPartitions  # noqa: E402
from tuner_server.processes.spawner import Spawner  # noqa: E402

log = logging.getLogger("gpu_probe")
Section = Callable[["Probe"], Awaitable[dict[str, Any]]]


def output_of(*command: str, timeout_s: float = 15) -> str:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        return f"{done.stdout}{done.stderr}".strip()[-3000:] + (f" [rc {done.returncode}]" if done.returncode else "")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def seen_from_outside(pid: int) -> dict[str, Any]:
    """A process's command line and CUDA environment."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError as error:
        return {"error": str(error)}
    return {"command": command, "environ": [item.decode() for item in environ if item.startswith(b"CUDA")]}


def build_kernels(directory: Path, target_json: str) -> None:
    """In a process of its own: builds every kernel of the tests."""
    from tests.gpu import kernels

    for name in kernels.BODIES:
        start = time.perf_counter()
        kernels.build(name, directory, target_json)
        print(f"{name}: {time.perf_counter() - start:.3f} s", flush=True)


class Probe:
    """What the sections share."""

    def __init__(self, out: Path, rehearse: bool) -> None:
        self.out = out
        self.rehearse = rehearse
        self.work = Path(tempfile.mkdtemp(prefix="gpu-probe-"))
        self.spawner = Spawner(self.work / "logs")
        self.gpu: GpuInfo | None = None
        self.provider: PartitionProvider | None = None
        self.fleet: WorkerFleet | None = None
        self.artifacts = self.work / "artifacts"
        self.artifacts.mkdir()

    def request(self, name: str, timeout_s: float = 10.0) -> MeasureRequest:
        from tests.gpu import kernels

        return kernels.request(kernels.built(self.artifacts, name), timeout_s)

    async def up(self) -> WorkerFleet:
        """The 4 x 25 % fleet, started if a section before has not."""
        if self.provider is None:
            if self.rehearse:
                self.provider = CpuPartitions(self.spawner)
            else:
                assert self.gpu is not None
                self.provider = MpsPartitions(self.gpu, self.work / "mps")
            await self.provider.start()
        if self.fleet is None:
            await self.partition(25, 4)
        assert self.fleet is not None
        return self.fleet

    async def partition(self, share: int, workers: int) -> WorkerFleet:
        assert self.provider is not None
        if self.rehearse:
            share, workers = 50, 2
        if self.fleet is not None:
            await self.fleet.stop()
        self.fleet = WorkerFleet(self.spawner, self.provider, CoreGate(spare=True))
        await self.fleet.start(self.provider.plan(share, workers))
        return self.fleet

    async def down(self) -> None:
        if self.fleet is not None:
            await self.fleet.stop()
        if self.provider is not None:
            await self.provider.stop()
        self.fleet = self.provider = None

    def logs(self) -> str:
        texts = []
        for path in sorted([*self.work.glob("logs/*.log"), *self.work.glob("mps*/log/*")]):
            texts.append(f"===== {path.relative_to(self.work)}\n{path.read_text(errors='replace')[-20000:]}")
        return "\n".join(texts)


# Sections


async def host(probe: Probe) -> dict[str, Any]:
    inventory = await asyncio.to_thread(find_gpus)
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "inventory": [vars(gpu) | {} if hasattr(gpu, "__dict__") else str(gpu) for gpu in inventory.gpus],
        "reason": inventory.reason,
        "mps_control": find_control(),
        "mps_version": output_of("nvidia-cuda-mps-control", "-v"),
        "nvidia_smi": output_of("nvidia-smi", "-L"),
    }
    from tuner_core.compiler.cuda_libraries import include_dirs, open_nvrtc

    facts["nvrtc"] = open_nvrtc()._name
    facts["headers"] = [str(path) for path in include_dirs()]
    if not probe.rehearse:
        (probe.gpu, *_) = choose_gpus(inventory, "cuda")
    return facts


async def daemon(probe: Probe) -> dict[str, Any]:
    """The bare daemon: start, commands, what its processes look like from outside, facts at each share, stop."""
    assert probe.gpu is not None
    control = find_control()
    assert control is not None
    mps = MpsDaemon(probe.gpu.uuid, probe.work / "mps-bare", control=control)
    facts: dict[str, Any] = {}
    start = time.perf_counter()
    await mps.start()
    facts["start_s"] = time.perf_counter() - start
    try:
        env = {**mps.client_env, "CUDA_VISIBLE_DEVICES": probe.gpu.uuid}
        facts["pipe_files"] = sorted(entry.name for entry in mps.pipe_directory.iterdir())
        shares: dict[str, Any] = {}
        for share in (100, 50, 30, 25, 12, 10):
            start = time.perf_counter()
            try:
                seen = await read_device_facts({**env, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)})
                shares[str(share)] = {**vars(seen), "seconds": time.perf_counter() - start}
            except TunerError as error:
                shares[str(share)] = {"error": str(error)}
        facts["shares"] = shares
        for limit in ("0=34000M", "0=2G"):
            try:
                seen = await read_device_facts({**env, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": limit})
                facts[f"memory_limit {limit}"] = f"ok, total {seen.memory_bytes}"
            except TunerError as error:
                facts[f"memory_limit {limit}"] = str(error)
        commands = ("get_server_list", "get_default_active_thread_percentage", "ps", "lspart", "get_device_client_list")
        said = {}
        for command in commands:
            try:
                said[command] = await mps.command(command)
            except TunerError as error:
                said[command] = f"refused: {error}"
        facts["commands"] = said
        facts["processes"] = [vars(found) | {} for found in mps._remaining()]
        facts["servers"] = await mps.servers()
        for pid in [*facts["servers"], *([mps.pid] if mps.pid else [])]:
            facts[f"process {pid}"] = seen_from_outside(pid)
    finally:
        start = time.perf_counter()
        await mps.stop()
        facts["stop_s"] = time.perf_counter() - start
    facts["left"] = [vars(found) | {} for found in mps._remaining()]
    assert not facts["left"], "processes are left after the stop"
    expected = {"100": 132, "50": 66, "30": 38, "25": 32, "12": 14, "10": 12}
    facts["as_measured_before"] = {key: shares[key].get("sm_count") == value for key, value in expected.items()}
    return facts


_SERVER = """
import asyncio, sys
from pathlib import Path
from tuner_server.gpu.mps import MpsDaemon, find_control
async def main():
    daemon = MpsDaemon(sys.argv[1], Path(sys.argv[2]), control=find_control())
    await daemon.start()
    print(daemon.pid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


async def killed_server(probe: Probe) -> dict[str, Any]:
    """SIGKILL of the owner, with a client attached; the next start clears up and takes over."""
    assert probe.gpu is not None
    directory = probe.work / "mps-killed"
    command = [sys.executable, "-c", _SERVER, probe.gpu.uuid, str(directory)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    first = await asyncio.wait_for(asyncio.to_thread(owner.stdout.readline), 30)
    control = find_control()
    assert control is not None
    mps = MpsDaemon(probe.gpu.uuid, directory, control=control)
    await read_device_facts({**mps.client_env, "CUDA_VISIBLE_DEVICES": probe.gpu.uuid})  # starts a server
    owner.kill()
    owner.wait()
    left = [vars(found) | {} for found in mps._remaining()]
    start = time.perf_counter()
    await mps.start()
    facts = {"first_daemon": first.strip(), "left_by_predecessor": left, "takeover_s": time.perf_counter() - start}
    now = [found.pid for found in mps._remaining()]
    await mps.stop()
    assert {entry["pid"] for entry in left}.isdisjoint(now), "a predecessor's process still runs"
    assert left, "the predecessor's daemon was not found"
    return facts


async def build(probe: Probe) -> dict[str, Any]:
    target = '{"kind": "llvm"}'
    if not probe.rehearse:
        from tests.gpu.kernels import H200_TARGET as target
    command = [sys.executable, str(Path(__file__)), "--build", str(probe.artifacts), target]
    start = time.perf_counter()
    said = await asyncio.to_thread(output_of, *command, timeout_s=100)
    names = sorted(path.name for path in probe.artifacts.glob("*.*"))
    assert "good" in {Path(name).stem for name in names}, said
    return {"seconds": time.perf_counter() - start, "said": said}


async def workers(probe: Probe) -> dict[str, Any]:
    """4 x 25 %: what each sees, and one measurement on each."""
    start = time.perf_counter()
    fleet = await probe.up()
    assert probe.provider is not None
    facts: dict[str, Any] = {"start_s": time.perf_counter() - start}
    facts["workers"] = [vars(worker) | {} for worker in fleet.workers()]
    facts["target"] = await probe.provider.target_json(25)
    facts["device"] = vars(probe.provider.device) | {}
    start = time.perf_counter()
    measured = await asyncio.gather(*(fleet.measure(probe.request("good")) for _ in range(40)))
    facts["forty_measurements_s"] = time.perf_counter() - start
    facts["good_us"] = sorted(round(one.median_us, 3) for one in measured)
    facts["neighbours"] = sorted({one.neighbours for one in measured})
    if isinstance(probe.provider, MpsPartitions):
        facts["clients"] = [vars(client) | {} for client in await probe.provider.daemon.clients()]
        facts["clients_are_workers"] = {client["pid"] for client in facts["clients"]} == {
            worker["pid"] for worker in facts["workers"]
        }
    return facts


async def alone(probe: Probe) -> dict[str, Any]:
    """How long the others stand still for eight measurements alone."""
    fleet = await probe.up()
    stop = asyncio.Event()

    async def busy() -> None:
        while not stop.is_set():
            await fleet.measure(probe.request("good"))

    loops = [asyncio.create_task(busy()) for _ in range(8)]
    await asyncio.sleep(0.3)
    asked = time.perf_counter()
    async with fleet.exclusive() as turn:
        began = time.perf_counter()
        neighbours = [(await turn.measure(probe.request("good"))).neighbours for _ in range(8)]
    ended = time.perf_counter()
    stop.set()
    await asyncio.gather(*loops)
    assert set(neighbours) == {0}
    return {"drain_s": began - asked, "pause_s": ended - began}


async def stopped(probe: Probe) -> dict[str, Any]:
    """Nothing is left."""
    provider = probe.provider
    start = time.perf_counter()
    await probe.down()
    facts: dict[str, Any] = {"stop_s": time.perf_counter() - start}
    if isinstance(provider, MpsPartitions):
        facts["left"] = [vars(found) | {} for found in provider.daemon._remaining()]
        assert not facts["left"]
        facts["nvidia_smi_processes"] = output_of("nvidia-smi", "--query-compute-apps=pid,name", "--format=csv")
    return facts


SECTIONS: dict[str, tuple[Section, float]] = {
    "host": (host, 30),
    "daemon": (daemon, 50),
    "killed_server": (killed_server, 40),
    "build": (build, 100),
    "workers": (workers, 60),
    "alone": (alone, 30),
    "stopped": (stopped, 30),
}
GPU_ONLY = {"daemon", "killed_server"}


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget-s", type=float, default=220)
    parser.add_argument("--only", nargs="*", default=list(SECTIONS))
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.FileHandler(options.out / "probe.log"), logging.StreamHandler()],
    )
    import tests.gpu.kernels  # noqa: F401  # now, and not in the middle of a measurement

    probe = Probe(options.out, options.rehearse)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"schema": "gpu-probe/1", "date": now, "command": sys.argv, "sections": {}}
    began = time.perf_counter()
    try:
        for name, (section, limit_s) in SECTIONS.items():
            if name not in options.only or (options.rehearse and name in GPU_ONLY):
                continue
            left = options.budget_s - (time.perf_counter() - began)
            if left < 5 and name != "stopped":
                report["sections"][name] = {"ok": None, "error": "no time left"}
                continue
            start = time.perf_counter()
            entry: dict[str, Any] = {"ok": True}
            try:
                entry["facts"] = await asyncio.wait_for(section(probe), limit_s)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                entry = {
                    "ok": False,
                    "error": f"{type(error).__name__}: {error}",
                    "trace": traceback.format_exc()[-3000:],
                }
            entry["seconds"] = time.perf_counter() - start
            report["sections"][name] = entry
            log.info("SECTION %s: %s in %.1f s", name, "ok" if entry["ok"] else entry["error"], entry["seconds"])
            (options.out / "gpu_probe.json").write_text(json.dumps(report, indent=1, default=str))
    finally:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(probe.down(), 20)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(probe.spawner.stop(), 20)
        (options.out / "logs.txt").write_text(probe.logs())
        shutil.rmtree(probe.work, ignore_errors=True)
    for name, entry in report["sections"].items():
        facts = entry.get("facts", {})
        times = ", ".join(
            f"{key} {facts[key]:.2f}" for key in facts if key.endswith("_s") and isinstance(facts[key], float)
        )
        word = {True: "ok", False: "FAIL", None: "skip"}[entry["ok"]]
        print(f"{word:4} {name:16} {times} {entry.get('error', '')}")
    return 0 if all(entry["ok"] for entry in report["sections"].values()) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build_kernels(Path(sys.argv[2]), sys.argv[3])
        sys.exit(0)
    sys.exit(asyncio.run(main()))
