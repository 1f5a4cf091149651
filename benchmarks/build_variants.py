"""Would a cheaper way to compile CUDA candidates rank them the same? And are the ones that cost most ever the best?

    python benchmarks/build_variants.py [--candidates 24] [--no-gpu] [--out DIR]

The same candidates of a 3x3 and a 1x1 convolution and a matrix product are compiled in several ways and timed in turns
on the GPU. For each way: core-seconds per candidate, the ratio of latencies to today's way, Kendall's tau with it, and
the regret of picking by it. Then, for today's way: what it would cost in latency, and save in processor time, to refuse
candidates with more statements than a limit, and how good the best candidate is after a share of the core-seconds when
cheap ones are built first and when they are built in any order. ``--no-gpu`` compiles only. The candidates are drawn at
random, whatever they cost.

Core-seconds are those of warm processes, in which every way is the first, the second and so on equally often, without
the cache that NVRTC 12.9 and later keeps on disk where it finds a driver. ``today, again`` says how far to trust them.
Two to three minutes on a GPU with 16 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import results
from devices import use_only
from gpu_partitions import figures
from tasks import plain_workloads

from tuner_core.compiler.cuda_source import rewritten
from tuner_server.gpu.inventory import find_gpus

ARCH = "sm_90"
TARGET = {
    "kind": "cuda",
    "arch": ARCH,
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "registers_per_block": 65536,
    "thread_warp_size": 32,
}
LIMITS = (250, 500, 1000, 1500, 2000, 3000, 4000)
ROUNDS = 3
SAMPLE_S = 0.005
BUDGETS = (0.125, 0.25, 0.5)
ORDERS = 500


def keep_loops(source: str) -> str:
    """Loops that TVM did not unroll stay loops: NVRTC unrolls those with few iterations by itself."""
    return re.sub(r"(?m)^(?<!unroll\n)(\s*)(for \()", r"\1#pragma unroll 1\n\1\2", source)


VARIANTS: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "today": (rewritten, []),
    "today, again": (rewritten, []),
    "as TVM writes it": (str, []),
    "loops stay loops": (lambda source: keep_loops(rewritten(source)), []),
    "fast-compile mid": (rewritten, ["-Ofc=mid"]),
}


@dataclass(frozen=True)
class Built:
    """One candidate compiled in one way."""

    task: str
    candidate: int
    variant: str
    path: str
    order: int
    cpu_s: float
    nvrtc_cpu_s: float
    statements: int
    estimate: float = 1.0


Job = tuple[str, str, int, str, str, float]
"""Task, its body, number and trace of a candidate, folder for libraries, estimated cost of the build."""


def rotated(turn: int) -> list[str]:
    """The ways in an order in which each of them is at every place once in so many turns as there are ways."""
    names, first = list(VARIANTS), turn % len(VARIANTS)
    return names[first:] + names[:first]


def begin_to_build(warming: Job) -> None:
    """Make a process ready to be measured: what a first build loads, and what NVRTC finds on disk, is not counted.

    Args:
        warming: A candidate to build for nothing.
    """
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "CUDA_CACHE_DISABLE": "1"}  # before NVRTC looks
    with tempfile.TemporaryDirectory() as folder:
        compile_candidate((*warming[:4], folder, warming[5]))


def compile_candidate(job: Job) -> list[Built]:
    """Compile one candidate in all ways, in a process that :func:`begin_to_build` made ready."""
    task, body, number, trace, folder, estimate = job
    from tvm.target import Target

    from tuner_core.compiler import cuda_build, nvrtc
    from tuner_core.compiler.guard import load_workload
    from tuner_core.compiler.trace import apply_trace
    from tuner_server.build.compile import compile_module

    cuda_build.enable_cuda_builds()
    built = []
    for order, name in enumerate(rotated(number)):
        change, options = VARIANTS[name]
        said: dict[str, Any] = {}

        def build_cubin(
            source: str,
            _arch: str,
            change: Callable[[str], str] = change,
            options: list[str] = options,
            said: dict[str, Any] = said,
        ) -> bytes:
            start = time.process_time()
            light = cuda_build.light_source(source) or source
            cubin = nvrtc.compile_cubin(change(light), [*cuda_build.nvrtc_options(ARCH), *options])
            said.update(nvrtc=time.process_time() - start, statements=source.count(";"))
            return cubin

        path = Path(folder) / f"{task}-{number}-{order}.so"
        start = time.process_time()
        try:
            with patch.object(cuda_build, "build_cubin", build_cubin):
                path = compile_module(apply_trace(load_workload(body), trace).mod, Target(TARGET), path)
        except Exception as error:
            print(f"{task} {number} {name}: {str(error).strip().splitlines()[-1][:100]}", flush=True)
            return []
        cpu_s = time.process_time() - start
        built.append(Built(task, number, name, str(path), order, cpu_s, said["nvrtc"], said["statements"], estimate))
    return built


def latencies(built: list[Built], args_info: dict[str, Any]) -> dict[tuple[str, int, str], float]:
    """Best of some rounds in which all ways of a candidate take turns, in microseconds; failed candidates are left out.

    Args:
        built: Libraries.
        args_info: Arguments by task.
    """
    import numpy as np
    import tvm

    from tuner_core.compiler.cuda_libraries import load_tvm_cuda_runtime
    from tuner_server.measure.loaded import load_operator

    load_tvm_cuda_runtime(allow_stub=False)
    device = tvm.cuda(0)
    arguments = {
        task: [tvm.runtime.tensor(np.random.rand(*shape).astype(dtype), device) for _, dtype, shape in info]
        for task, info in args_info.items()
    }
    groups: dict[tuple[str, int], list[Built]] = {}
    for one in built:
        groups.setdefault((one.task, one.candidate), []).append(one)
    measured = {}
    for (task, number), ways in groups.items():
        try:
            operators = [load_operator(Path(way.path)) for way in ways]
            calls = [
                math.ceil(SAMPLE_S / min(operator.times(arguments[task], device, number=1, repeat=3)))
                for operator in operators
            ]
            samples: list[list[float]] = [[] for _ in ways]
            for _ in range(ROUNDS):
                for operator, number_of_calls, into in zip(operators, calls, samples, strict=True):
                    (seconds,) = operator.times(arguments[task], device, number=number_of_calls, repeat=1)
                    into.append(seconds * 1e6)
        except Exception as error:
            print(f"{task} {number}: {str(error).strip().splitlines()[-1][:100]}", flush=True)
            continue
        for way, times in zip(ways, samples, strict=True):
            measured[task, number, way.variant] = min(times)
    return measured


def quantiles(values: list[float]) -> dict[str, float]:
    """Mean, median, 90th percentile, largest."""
    ordered = sorted(values)
    return {
        "mean": statistics.mean(ordered),
        "p50": ordered[len(ordered) // 2],
        "p90": ordered[int(len(ordered) * 0.9)],
        "max": ordered[-1],
    }


def report(built: list[Built], measured: dict[tuple[str, int, str], float]) -> list[dict[str, Any]]:
    """Print the comparison, return its rows."""
    rows = []
    tasks = list(dict.fromkeys(one.task for one in built))
    for variant in VARIANTS:
        of_variant = [one for one in built if one.variant == variant]
        row: dict[str, Any] = {
            "variant": variant,
            "core_s": quantiles([one.cpu_s for one in of_variant]),
            "nvrtc_core_s": quantiles([one.nvrtc_cpu_s for one in of_variant]),
            "other_core_s": quantiles([one.cpu_s - one.nvrtc_cpu_s for one in of_variant]),
        }
        line = f"{variant:<18} core-s " + " ".join(f"{key} {value:6.3f}" for key, value in row["core_s"].items())
        line += "; mean of " + ", ".join(
            f"{part} {row[f'{key}_core_s']['mean']:.3f}" for part, key in (("NVRTC", "nvrtc"), ("the rest", "other"))
        )
        for task in tasks if measured else ():
            numbers = [number for name, number, way in measured if name == task and way == variant]
            before = [measured[task, number, "today"] for number in numbers]
            after = [measured[task, number, variant] for number in numbers]
            if len(numbers) < 2:
                continue
            ratios = sorted(b / a for a, b in zip(before, after, strict=True))
            row[task] = {**figures(before, after), "ratio_p10": ratios[len(ratios) // 10],
                         "ratio_p50": ratios[len(ratios) // 2], "ratio_p90": ratios[len(ratios) * 9 // 10],
                         "best_ratio": min(after) / min(before)}  # fmt: skip
            line += (
                f"\n    {task:<44} latency p10 {row[task]['ratio_p10']:.3f} p50 {row[task]['ratio_p50']:.3f} "
                f"p90 {row[task]['ratio_p90']:.3f}, of the best {row[task]['best_ratio']:.3f}; tau "
                f"{row[task]['tau']:.3f}; regret {100 * row[task]['regret']:.1f} %, at 8 "
                f"{100 * row[task]['regret_at_8']:.1f} %"
            )
        print(line)
        rows.append(row)
    today = [one for one in built if one.variant == "today"]
    spent = sum(one.cpu_s for one in today)
    for limit in LIMITS:
        kept = [one for one in today if one.statements <= limit]
        row = {"statement_limit": limit, "kept": len(kept), "of": len(today),
               "core_s_saved": 1 - sum(one.cpu_s for one in kept) / spent}  # fmt: skip
        for task in tasks if measured else ():
            everyone = {
                one.candidate: measured.get((task, one.candidate, "today")) for one in today if one.task == task
            }
            times = [value for value in everyone.values() if value]
            left = [everyone[one.candidate] or float("inf") for one in kept if one.task == task]
            if times and left:
                row[f"regret {task}"] = min(left) / min(times) - 1
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))  # fmt: skip
        rows.append(row)
    return rows


def estimated_cost(trace: str) -> float:
    """What the search expects a candidate to cost to build, relative to others."""
    from tuner_server.search.build_cost import UnrolledStatements
    from tuner_server.search.space import DesignSpace

    parsed = json.loads(trace)
    space = DesignSpace(0, parsed)
    point = space.point_of(parsed)
    return 1.0 if point is None else UnrolledStatements(space, parsed[0]).of(point)


def orders(built: list[Built], measured: dict[tuple[str, int, str], float]) -> list[dict[str, Any]]:
    """How far the best candidate so far is from the best of all, after shares of the core-seconds; mean of many orders.

    Args:
        built: Candidates as today's way builds them.
        measured: Their latencies.
    """
    rng = random.Random(0)
    rows = []
    for task in dict.fromkeys(one.task for one in built):
        timed = [
            (one, measured[key])
            for one in built
            if one.task == task and (key := (task, one.candidate, "today")) in measured
        ]
        if not timed:
            continue
        spent, best = sum(one.cpu_s for one, _ in timed), min(latency for _, latency in timed)
        for order, power in (("any", 0.0), ("cheap first", 1.0)):
            row: dict[str, Any] = {"task": task, "order": order}
            for share in BUDGETS:
                regrets = []
                for _ in range(ORDERS):
                    # a weighted shuffle: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006
                    shuffled = sorted(timed, key=lambda pair: rng.expovariate(pair[0].estimate ** -power))
                    left, found = share * spent, math.inf
                    for one, latency in shuffled:
                        left -= one.cpu_s
                        found = min(found, latency)
                        if left <= 0:
                            break
                    regrets.append(found / best - 1)
                row[f"regret at {share:.0%} of the core-seconds"] = statistics.mean(regrets)
            rows.append(row)
            print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else str(value)
                            for key, value in row.items()))  # fmt: skip
    return rows


def main() -> None:
    """Compile, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=24, help="of each operator (default: 24)")
    parser.add_argument("--no-gpu", action="store_true")
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    arguments = parser.parse_args()
    machine = results.machine()
    gpu = None
    if not arguments.no_gpu:
        use_only("cuda")
        gpu = find_gpus().gpus[0]

    from tuner_core.compiler.tvm_setup import leave_torch_out

    leave_torch_out()
    tasks = plain_workloads()
    from tuner_server.search.messages import SearchSettings
    from tuner_server.search.session import SearchSession

    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            session = SearchSession(task.body, json.dumps(TARGET), SearchSettings(cost_weight=0.0), 0)
            traces = session.generate(arguments.candidates)
            name = task.description.replace("/", "-")
            estimates = [estimated_cost(trace) for trace in traces]
            jobs += [
                (name, task.body, number, trace, folder, estimate)
                for number, (trace, estimate) in enumerate(zip(traces, estimates, strict=True))
            ]
        print(f"{len(jobs)} candidates drawn", flush=True)
        processes = max(1, len(os.sched_getaffinity(0)) - 1)
        # forked before this process touches the device, with TVM imported
        with ProcessPoolExecutor(
            processes, multiprocessing.get_context("fork"), initializer=begin_to_build, initargs=(jobs[0],)
        ) as pool:
            built = [one for ways in pool.map(compile_candidate, jobs) for one in ways]
        measured: dict[tuple[str, int, str], float] = {}
        if not arguments.no_gpu:
            info = {task.description.replace("/", "-"): task.args_info for task in tasks}
            measured = latencies(built, info)
    rows = report(built, measured)
    rows += orders([one for one in built if one.variant == "today"], measured)
    candidates = [
        {**{key: value for key, value in asdict(one).items() if key != "path"},
         "latency_us": measured.get((one.task, one.candidate, one.variant))}
        for one in built
    ]  # fmt: skip
    written = results.write(
        "build-variants",
        rows,
        device=gpu.name if gpu else ARCH,
        driver=gpu.driver_version if gpu else None,
        machine_before=machine,
        directory=arguments.out,
        target=TARGET,
        candidates=candidates,
    )
    print(f"written to {written}")


if __name__ == "__main__":
    main()
