"""What builds on the host change about a measurement alone on the GPU: behind ``--pause-builds`` and ``--lend-cores``.

    python benchmarks/gpu_quiet_host.py [--rounds 12] [--kernels 24]
    python benchmarks/gpu_quiet_host.py --rehearse                  # on a CPU

Candidates of short and long operators are measured alone, as promotion does, each in every round under each of four
conditions, in turns: ``quiet``: search and build are stopped; ``apart``: the server's own build processes compile
without a break on the cores that no worker has (no physical core is shared with a worker); ``idle class everywhere``:
those on the workers' cores compile, too, in the scheduling class SCHED_IDLE; ``everywhere``: as many processes as
there are cores compute on all of them, in the normal class, which is what must be avoided. Reported for each condition
against ``quiet``, for kernels shorter and longer than the server's limit (50 us): ratio of medians, spread over the
rounds, Kendall's tau, and the regret of publishing by it. If ``apart`` is like ``quiet`` for the short kernels too,
``--pause-builds never`` loses nothing; if ``idle class everywhere`` is, nor does ``--lend-cores``. A minute and a half.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import results
from devices import use_only
from scipy.stats import kendalltau
from tasks import plain_workloads

from tuner_core.errors import TunerError
from tuner_core.model import EvaluatorSettings, Workload
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.measure.requests import MeasureRequest
from tuner_server.partitions.host import LAUNCH_BOUND_US
from tuner_server.trial import TrialFailed

CONDITIONS = ("quiet", "apart", "idle class everywhere", "everywhere")
CANDIDATES_TO_BUILD = 160
"""More than a build process remembers, so that the load is compilation."""
RUN_TIMEOUT_S = 10.0
_SETTLE_S = 0.2


def short_workloads(small: bool) -> list[Workload]:
    """Operators of a few microseconds: a matrix-vector product and a small convolution, fp32."""
    from tuner_core.compiler.tvm_setup import load_tvm

    load_tvm(intrinsics=True)
    import tvm
    from tvm import te, topi

    from tuner_core.compiler.workload import workload_from_module

    extent = 64 if small else 512
    a, b = te.placeholder((1, extent), "float32", name="A"), te.placeholder((extent, extent), "float32", name="B")
    k = te.reduce_axis((0, extent), name="k")
    vector = te.create_prim_func([a, b, te.compute((1, extent), lambda i, j: te.sum(a[i, k] * b[j, k], axis=k))])
    data = te.placeholder((1, 14, 14, 32), "float32", name="data")
    weight = te.placeholder((1, 1, 32, 64), "float32", name="weight")
    conv = te.create_prim_func([data, weight, topi.nn.conv2d_nhwc(data, weight, 1, 0, 1, out_dtype="float32")])
    modules = [tvm.IRModule({"main": one.with_attr("global_symbol", "main")}) for one in (vector, conv)]
    return [workload_from_module(module) for module in modules]


def spin() -> None:
    """Compute for ever, on any core, and touch memory beyond the caches."""
    import numpy as np

    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    block = np.ones(8 << 20, "float32")
    while True:
        block *= 1.0000001


class Load:
    """What runs on the host beside a measurement: everything is started once, and stopped when it is not its turn.

    Build processes on the workers' cores are the server's own: with autogroups (sched(7)), SCHED_IDLE counts only
    within a session, and they share theirs with the workers.

    Args:
        engine: Whose build processes work.
        todo: Candidates to build, again and again.
        target: For which target.
    """

    def __init__(self, engine: Engine, todo: list[tuple[Workload, str]], target: str) -> None:
        self._engine = engine
        self._todo = todo
        self._target = target
        self._spinning = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in _all_cores()]
        self._builders: list[asyncio.Task[None]] = []
        self.builds = 0

    async def __aenter__(self) -> Load:
        for process in self._spinning:
            process.start()
        self._builders = [asyncio.create_task(self._build(number)) for number in range(2 * len(self._spinning))]
        await asyncio.sleep(3.0)  # until they have imported
        self._spin(signal.SIGSTOP)
        self._engine.build.pause()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.build.resume()
        for builder in self._builders:
            builder.cancel()
        await asyncio.gather(*self._builders, return_exceptions=True)
        for process in self._spinning:
            process.kill()
            process.join()

    @contextlib.contextmanager
    def during(self, condition: str) -> Iterator[None]:
        """Hold a condition for the length of the block."""
        if condition in ("apart", "idle class everywhere"):
            self._engine.build.resume()
            if condition == "apart":
                for pid in standing_back():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)  # until the next resume()
        elif condition == "everywhere":
            self._spin(signal.SIGCONT)
        try:
            yield
        finally:
            self._engine.build.pause()
            self._spin(signal.SIGSTOP)

    def _spin(self, number: signal.Signals) -> None:
        for process in self._spinning:
            assert process.pid is not None
            os.kill(process.pid, number)

    async def _build(self, number: int) -> None:
        at = number
        while True:
            workload, trace = self._todo[at % len(self._todo)]
            at += 2 * len(self._spinning)
            try:
                built = await self._engine.build.build(workload, trace, self._target)
                shutil.rmtree(built.path.parent / "cubins", ignore_errors=True)  # or each would be compiled only once
                self._engine.build.release(built)
                self.builds += 1
            except TrialFailed as failure:
                if "ended before it answered" in str(failure):
                    await asyncio.sleep(0.1)  # the pool is being stopped


def standing_back() -> list[int]:
    """Process ids of this program's descendants in the idle scheduling class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(ProcessLookupError):
            if os.sched_getscheduler(process.pid) == os.SCHED_IDLE:
                found.append(process.pid)
    return found


def _all_cores() -> set[int]:
    return os.sched_getaffinity(0)


def autogroups() -> bool:
    """Whether the kernel divides its processors by session first."""
    try:
        return Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return False


def compared(quiet: list[list[float]], other: list[list[float]]) -> dict[str, float]:
    """One condition against the quiet host.

    Args:
        quiet, other: Latencies of every round, for each kernel.
    """
    before, after = [statistics.median(one) for one in quiet], [statistics.median(one) for one in other]
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    pick = min(range(len(after)), key=after.__getitem__)
    tau = float(kendalltau(before, after).statistic) if len(before) > 1 else 1.0
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_worst": max(ratios, key=lambda ratio: abs(math.log(ratio))),
        "spread": statistics.median(_spread(one) for one in other),
        "tau": tau,
        "regret": before[pick] / min(before) - 1,
    }


def _spread(latencies: list[float]) -> float:
    """Interquartile range, relative to the median."""
    if len(latencies) < 4:
        return (max(latencies) - min(latencies)) / statistics.median(latencies)
    first, middle, third = statistics.quantiles(latencies, n=4)
    return (third - first) / middle


async def measure(
    engine: Engine, load: Load, kernels: list[tuple[Workload, Path]], rounds: int, deadline: float
) -> dict[str, list[list[float]]]:
    """Latencies in microseconds by condition, for each kernel of each round; conditions take turns."""
    (device,) = engine.devices
    latencies: dict[str, list[list[float]]] = {condition: [[] for _ in kernels] for condition in CONDITIONS}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            print(f"no time left after {number} rounds", flush=True)
            break
        for condition in CONDITIONS if number % 2 == 0 else reversed(CONDITIONS):
            async with device.fleet.exclusive() as alone:
                with load.during(condition):
                    await asyncio.sleep(_SETTLE_S)
                    for index, (workload, artifact) in enumerate(kernels):
                        request = MeasureRequest(artifact, workload.args_info, EvaluatorSettings(), RUN_TIMEOUT_S)
                        latencies[condition][index].append((await alone.measure(request)).median_us)
    return latencies


async def run(options: argparse.Namespace) -> None:
    before, began = results.machine(), time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="quiet-"))
    division: dict[str, Any] = {} if options.rehearse else {"sm_percent": 25, "workers": 4}
    device_settings = DeviceSettings(options.device, pause_builds="never", **division)
    engine = Engine(ServerConfig(data_dir=work, devices=(device_settings,)))
    try:
        await engine.start()
        (device,) = engine.devices
        target = await device.provider.target_json(25 if not options.rehearse else 100)
        tasks = [*short_workloads(options.rehearse), *await asyncio.to_thread(plain_workloads, options.rehearse)]
        each = max(2, options.kernels // len(tasks))
        built: list[tuple[Workload, Path]] = []
        todo: list[tuple[Workload, str]] = []
        for task in tasks:
            await engine.search.open(task.digest, task, target, seed=0, known=[])
            traces = await engine.search.generate(task.digest, max(2 * each, options.to_build // len(tasks)))
            await engine.search.close(task.digest)
            todo += [(task, trace) for trace in traces]
            done = await asyncio.gather(
                *(engine.build.build(task, trace, target) for trace in traces[: 2 * each]), return_exceptions=True
            )
            built += [(task, one.path) for one in done if not isinstance(one, BaseException)][:each]
        kernels = []
        for task, path in built:
            request = MeasureRequest(path, task.args_info, EvaluatorSettings(), RUN_TIMEOUT_S)
            with contextlib.suppress(TrialFailed):
                await device.fleet.measure(request)
                kernels.append((task, path))
        print(f"{len(kernels)} kernels after {time.monotonic() - began:.0f} s", flush=True)
        async with Load(engine, todo, target) as load:
            lent = len(standing_back())
            print(f"{lent} build processes on the workers' cores, in the idle class", flush=True)
            latencies = await measure(engine, load, kernels, options.rounds, began + options.budget_s)
        rows = []
        for label, longer in (("short", False), ("long", True)):
            chosen = [
                index
                for index, quiet in enumerate(latencies["quiet"])
                if (statistics.median(quiet) >= LAUNCH_BOUND_US) is longer
            ]
            for condition in CONDITIONS if chosen else ():
                quiet, other = ([latencies[name][index] for index in chosen] for name in ("quiet", condition))
                row = {"condition": condition, "kernels": label, "count": len(chosen), **compared(quiet, other)}
                rows.append(row)
                print(
                    f"{label:>6} ({len(chosen)}), {condition:<21} latency x {row['ratio_median']:.3f} "
                    f"(worst {row['ratio_worst']:.3f}), spread {100 * row['spread']:.1f} %, tau {row['tau']:.3f}, "
                    f"regret {100 * row['regret']:.1f} %",
                    flush=True,
                )
        partition = device.partitions[0]
        written = results.write(
            options.name,
            rows,
            device=device.info.model,
            driver=device.info.driver_version or None,
            machine_before=before,
            directory=options.out,
            worker_cores=list(partition.affinity),
            build_cores=list(device.provider.spare_cores(device.partitions)),
            build_processes_in_idle_class=lent,
            autogroups=autogroups(),
            limit_us=LAUNCH_BOUND_US,
            rounds=len(latencies["quiet"][0]),
            builds_meanwhile=load.builds,
            latencies_us=latencies,
            kernels=[task.description for task, _ in kernels],
        )
        print(f"{load.builds} builds meanwhile; written to {written}")
    finally:
        await engine.stop()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Run and write ``gpu-quiet-host.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--kernels", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument(
        "--device", default="", help="cuda, the first GPU that this process may see (default), cuda:INDEX or cuda:UUID"
    )
    parser.add_argument("--to-build", type=int, default=CANDIDATES_TO_BUILD, help="meanwhile (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=60, help="no round begins later (default: 60)")
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    parser.add_argument("--name", default="gpu-quiet-host", help="of the result file (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.device = use_only(options.device or (f"cpu:{min(_all_cores())}" if options.rehearse else "cuda"))
    logging.basicConfig(level=logging.WARNING)
    try:
        asyncio.run(run(options))
    except TunerError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
