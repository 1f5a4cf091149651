"""What each division of a GPU gives: measurements per second, and how well shared measurements rank candidates.

    python benchmarks/gpu_partitions.py [--candidates 40] [--divisions 100 50x2 25x4 12x8 50,25,25] [--rehearse]

The same candidates of three operators are measured at each division twice: alone on the device, and with all workers of
all its shares busy. For each share of a division: measurements per second, Kendall's tau between the two, and the
regret of picking by the shared timings (how much slower the pick is alone than the best alone), directly and after
measuring the pick's top 8 again alone, as promotion does. The division of one worker shows how much two measurements of
the same kind differ. Runs through the server's own engine, device and lanes. Written after each division, so that what
was found survives a run that is cut off. ``--rehearse`` runs on a CPU with small operators.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import results
from devices import use_only
from scipy.stats import kendalltau
from tasks import plain_workloads

from tuner_core.errors import TunerError
from tuner_core.model import EvaluatorSettings, Workload
from tuner_server.config import DeviceSettings, ServerConfig
from tuner_server.engine import Engine
from tuner_server.lanes.device import SharedDevice
from tuner_server.lanes.fleet import LaneFleet
from tuner_server.measure.requests import MeasureRequest
from tuner_server.trial import TrialFailed

DIVISIONS = ("100", "50x2", "25x4", "12x8", "50,25,25")
REHEARSED = ("100", "50x2", "50,25")
TOP = 8
RUN_TIMEOUT_S = 10.0


def parse_division(text: str) -> tuple[int, ...]:
    """Shares of a division: ``25x4`` or ``50,25,25``."""
    share, times, count = text.partition("x")
    return (int(share),) * int(count) if times else tuple(int(part) for part in text.split(","))


async def candidates(engine: Engine, tasks: list[Workload], target: str, count: int) -> list[tuple[Workload, Path]]:
    """Built candidates of all tasks, as a search's first batch has them."""

    async def of(task: Workload) -> list[tuple[Workload, Path]]:
        await engine.search.open(task.digest, task, target, seed=0, known=[])
        traces = await engine.search.generate(task.digest, count)
        built = await asyncio.gather(
            *(engine.build.build(task, trace, target) for trace in traces), return_exceptions=True
        )
        await engine.search.close(task.digest)
        return [(task, artifact.path) for artifact in built if not isinstance(artifact, BaseException)]

    return [entry for entries in await asyncio.gather(*(of(task) for task in tasks)) for entry in entries]


async def timed(fleet: Any, task: Workload, artifact: Path) -> float | None:
    """Median latency, or None for a candidate that does not run."""
    request = MeasureRequest(artifact, task.args_info, EvaluatorSettings(), RUN_TIMEOUT_S)
    try:
        return (await fleet.measure(request)).median_us
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


async def measure_division(
    device: SharedDevice, shares: tuple[int, ...], built: list[tuple[Workload, Path]]
) -> list[dict[str, Any]]:
    """One row for each share: all candidates at that share, alone, then beside the workers of all shares."""
    start = time.perf_counter()
    await device.divide(shares)
    divided_s = time.perf_counter() - start
    lanes = {share: LaneFleet([device], share) for share in dict.fromkeys(shares)}
    alone: dict[int, list[float | None]] = {}
    for share, fleet in lanes.items():
        async with fleet.exclusive() as turn:
            alone[share] = [await timed(turn, *entry) for entry in built]

    stop = asyncio.Event()

    async def all_of(share: int) -> tuple[list[float | None], float]:
        start = time.perf_counter()
        shared = await asyncio.gather(*(timed(lanes[share], *entry) for entry in built))
        return shared, time.perf_counter() - start

    async def keep_busy(share: int) -> None:  # so that the slower share has its neighbours to the end
        while not stop.is_set():
            await asyncio.gather(*(timed(lanes[share], *entry) for entry in built[: shares.count(share)]))

    async def all_then_busy(share: int) -> tuple[list[float | None], float]:
        outcome = await all_of(share)
        pending.discard(share)
        if pending:
            await keep_busy(share)
        else:
            stop.set()
        return outcome

    pending = set(lanes)
    shared = dict(zip(lanes, await asyncio.gather(*(all_then_busy(share) for share in lanes)), strict=True))

    rows = []
    for share, fleet in lanes.items():
        beside, seconds = shared[share]
        by_task = {}
        for task in dict.fromkeys(task for task, _ in built):
            pairs = [
                (one, other)
                for (owner, _), one, other in zip(built, alone[share], beside, strict=True)
                if owner is task and one is not None and other is not None
            ]
            by_task[task.description] = figures([one for one, _ in pairs], [other for _, other in pairs])
        rows.append(
            {
                "partitions": list(shares),
                "workers": shares.count(share),
                "sm_percent": share,
                "sm_count_seen": fleet.workers()[0].sm_count_seen,
                "trials_per_s": len(built) / seconds,
                "tau": min(entry["tau"] for entry in by_task.values()),
                "regret": max(entry["regret"] for entry in by_task.values()),
                "regret_at_8": max(entry["regret_at_8"] for entry in by_task.values()),
                "candidates": len(built),
                "failed": sum(one is None or other is None for one, other in zip(alone[share], beside, strict=True)),
                "divided_s": divided_s,
                "tasks": by_task,
            }
        )
    return rows


async def run(options: argparse.Namespace) -> None:
    before = results.machine()
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="partitions-"))
    engine = Engine(ServerConfig(data_dir=work, devices=(DeviceSettings(options.device),)))
    rows: list[dict[str, Any]] = []
    written: Path | None = None
    try:
        await engine.start()
        (device,) = engine.devices
        print(*engine.notes, *device.provider.describe(), sep="\n", flush=True)
        tasks = await asyncio.to_thread(plain_workloads, options.rehearse)
        built = await candidates(engine, tasks, await device.provider.target_json(100), options.candidates)
        print(f"{len(built)} candidates built after {time.monotonic() - began:.0f} s", flush=True)
        for text in options.divisions or (REHEARSED if options.rehearse else DIVISIONS):
            if time.monotonic() - began > options.budget_s:
                print(f"no time left for {text}", flush=True)
                continue
            rows += await measure_division(device, parse_division(text), built)
            for row in rows[-len(set(parse_division(text))) :]:
                print(
                    f"{text:>8}: {row['workers']} x {row['sm_percent']:3} % ({row['sm_count_seen']} SMs): "
                    f"{row['trials_per_s']:6.1f} trials/s, tau {row['tau']:.3f}, regret {100 * row['regret']:.1f} %, "
                    f"at 8: {100 * row['regret_at_8']:.1f} %",
                    flush=True,
                )
            written = results.write(
                options.name,
                rows,
                device=device.info.model,
                driver=device.info.driver_version or None,
                machine_before=before,
                directory=options.out,
            )
        print(f"written to {written}")
    finally:
        await engine.stop()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Run and write ``gpu-partitions.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=40, help="per operator (default: 40)")
    parser.add_argument("--divisions", nargs="*", help=f"default: {' '.join(DIVISIONS)}")
    parser.add_argument(
        "--device", default="", help="cuda, the first GPU that this process may see (default), cuda:INDEX or cuda:UUID"
    )
    parser.add_argument("--budget-s", type=float, default=360, help="no division begins later (default: 360)")
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    parser.add_argument("--name", default="gpu-partitions", help="of the result file (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.device = use_only(options.device or ("cpu" if options.rehearse else "cuda"))
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
