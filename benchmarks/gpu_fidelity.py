"""How well measurements beside neighbours rank candidates, and how many there are in a second.

    python benchmarks/gpu_fidelity.py [--candidates 40] [--out DIR] [--rehearse]

The same candidates of three operators are measured at each division of the GPU twice: alone on the device, and with
all workers busy. For each division: measurements per second, Kendall's tau between the two, and the regret of picking
by the shared timings (how much slower the pick is alone than the best alone), directly and after measuring the pick's
top 8 again alone, as promotion does. ``--rehearse`` runs on a CPU with small operators.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import results
from scipy.stats import kendalltau

from tuner_core.errors import TunerError
from tuner_core.model import EvaluatorSettings, Workload
from tuner_server.build.pool import BuildPool
from tuner_server.measure.fleet import WorkerFleet
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.requests import MeasureRequest
from tuner_server.partitions.select import select_provider
from tuner_server.processes.spawner import Spawner
from tuner_server.search.pool import SearchPool, SearchSettings
from tuner_server.trial import TrialFailed

DIVISIONS = ((100, 1), (50, 2), (25, 4), (12, 8))
TOP = 8


def workloads(small: bool) -> list[Workload]:
    """A 3x3 and a 1x1 convolution and a matrix product, fp32."""
    from tuner_core.compiler.tvm_setup import load_tvm

    load_tvm(intrinsics=True)
    import tvm
    from tvm import te, topi

    from tuner_core.compiler.workload import workload_from_module

    def conv(extent: int, channels: int, kernel: int) -> Any:
        data = te.placeholder((1, extent, extent, channels), "float32", name="data")
        weight = te.placeholder((kernel, kernel, channels, channels), "float32", name="weight")
        out = topi.nn.conv2d_nhwc(data, weight, 1, kernel // 2, 1, out_dtype="float32")
        return te.create_prim_func([data, weight, out])

    def product(extent: int) -> Any:
        a, b = (te.placeholder((extent, extent), "float32", name=name) for name in "AB")
        k = te.reduce_axis((0, extent), name="k")
        return te.create_prim_func([a, b, te.compute((extent, extent), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k))])

    functions = [conv(7, 16, 3), product(64)] if small else [conv(14, 256, 3), conv(56, 64, 1), product(1024)]
    modules = [tvm.IRModule({"main": function.with_attr("global_symbol", "main")}) for function in functions]
    return [workload_from_module(module) for module in modules]


async def candidates(
    spawner: Spawner, scratch: Path, tasks: list[Workload], target: str, count: int, cores: list[int]
) -> list[tuple[Workload, Path]]:
    """Built candidates of all tasks, as a search's first batch has them."""
    search = SearchPool(spawner, len(tasks), SearchSettings(), affinity=cores)
    build = BuildPool(spawner, max(1, len(cores)), scratch, timeout_s=60, affinity=cores)

    async def of(task: Workload) -> list[tuple[Workload, Path]]:
        await search.open(task.digest, task, target, seed=0, known=[])
        traces = await search.generate(task.digest, count)
        built = await asyncio.gather(*(build.build(task, trace, target) for trace in traces), return_exceptions=True)
        return [(task, artifact.path) for artifact in built if not isinstance(artifact, BaseException)]

    try:
        return [entry for entries in await asyncio.gather(*(of(task) for task in tasks)) for entry in entries]
    finally:
        await search.stop()
        await build.stop()


async def timed(fleet: Any, task: Workload, artifact: Path) -> float | None:
    """Median latency, or None for a candidate that does not run."""
    try:
        return (await fleet.measure(MeasureRequest(artifact, task.args_info, EvaluatorSettings(), 10.0))).median_us
    except (TrialFailed, TunerError):
        return None


def figures(alone: list[float], shared: list[float]) -> dict[str, float]:
    """Rank correlation and regret of one task."""
    best = min(alone)
    order = sorted(range(len(alone)), key=lambda index: shared[index])
    return {
        "tau": float(kendalltau(alone, shared).statistic),
        "regret": alone[order[0]] / best - 1,
        "regret_at_8": min(alone[index] for index in order[:TOP]) / best - 1,
        "latency_ratio": statistics.median(after / before for before, after in zip(alone, shared, strict=True)),
    }


async def run(count: int, rehearse: bool, out: Path) -> None:
    before = results.machine()
    work = Path(tempfile.mkdtemp(prefix="fidelity-"))
    spawner = Spawner(work / "logs")
    await spawner.start()
    provider, notes = await select_provider("cpu" if rehearse else "cuda", work, spawner)
    print(*notes, sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    fleet = None
    try:
        await provider.start()
        tasks = await asyncio.to_thread(workloads, rehearse)
        cores = provider.spare_cores(provider.plan(100))
        built = await candidates(spawner, work, tasks, await provider.target_json(100), count, cores)
        print(f"{len(built)} candidates built", flush=True)
        for share, workers in ((50, 2),) if rehearse else DIVISIONS:
            fleet = WorkerFleet(spawner, provider, CoreGate(spare=True))
            await fleet.start(provider.plan(share, workers))
            async with fleet.exclusive() as turn:
                alone = [await timed(turn, *entry) for entry in built]
            start = time.perf_counter()
            shared = await asyncio.gather(*(timed(fleet, *entry) for entry in built))
            seconds = time.perf_counter() - start
            by_task = {}
            for task in tasks:
                pairs = [
                    (one, other)
                    for (owner, _), one, other in zip(built, alone, shared, strict=True)
                    if owner is task and one is not None and other is not None
                ]
                by_task[task.description] = figures([one for one, _ in pairs], [other for _, other in pairs])
            rows.append(
                {
                    "workers": workers,
                    "sm_percent": share,
                    "sm_count_seen": fleet.workers()[0].sm_count_seen,
                    "trials_per_s": len(built) / seconds,
                    "tau": min(entry["tau"] for entry in by_task.values()),
                    "regret": max(entry["regret"] for entry in by_task.values()),
                    "regret_at_8": max(entry["regret_at_8"] for entry in by_task.values()),
                    "candidates": len(built),
                    "failed": sum(one is None or other is None for one, other in zip(alone, shared, strict=True)),
                    "tasks": by_task,
                }
            )
            row = rows[-1]
            print(
                f"{workers} x {share:3} % ({row['sm_count_seen']} SMs): {row['trials_per_s']:6.1f} trials/s, "
                f"tau {row['tau']:.3f}, regret {100 * row['regret']:.1f} %, at 8: {100 * row['regret_at_8']:.1f} %",
                flush=True,
            )
            await fleet.stop()
            fleet = None
    finally:
        if fleet is not None:
            await fleet.stop()
        await provider.stop()
        await spawner.stop()
        shutil.rmtree(work, ignore_errors=True)
        if rows:
            device = provider.device
            name = "rehearsal" if rehearse else "gpu-fidelity"
            print(results.write(name, rows, device=device.model, driver=device.driver_version or None,
                                machine_before=before, directory=out))  # fmt: skip


def main() -> None:
    """Run and write ``gpu-fidelity.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    asyncio.run(run(options.candidates, options.rehearse, options.out))


if __name__ == "__main__":
    main()
