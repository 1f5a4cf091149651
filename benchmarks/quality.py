"""Final latency after equally many trials, this service against stock's evolutionary search, over several seeds.

    python benchmarks/quality.py [--device cpu|cuda] [--seeds 5] [--trials 64] [--alone] [--name quality-cpu]

For each seed, stock ``ms.tune_tasks`` with its defaults and this service with its defaults tune the same operators with
the same number of trials in all. Stock gives each operator as many; the service gives them where they shorten the
model most (``--alone``: a job for each operator, so that each has as many here, too). The winners of all runs are then
built alike and measured in one process in turns. A table and ``NAME.svg`` show every seed. On two cores three operators
and five seeds take 25 minutes, most of it stock's. On a GPU one operator is the default, the 3x3 convolution that
ResNet-50 calls most often, and takes 10.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import distribution
import results
from devices import use_only
from service import server_target, tune_with_service
from side_by_side import run_script
from tasks import OPERATORS, BenchTask, bench_tasks, extract, gpu_tasks

from tuner_client.model.prepare import ExtractedTask

Winners = dict[str, dict[str, Any]]
"""Trace by task and run."""


def server_arguments(device: str) -> list[str]:
    """For ``tuner-server``: on a GPU all of it, since that is what stock tunes for."""
    return ["--device", device, *(["--sm-percent", "100", "--workers", "1"] if device.startswith("cuda") else [])]


def stock_runs(
    tasks: Sequence[BenchTask],
    target: Mapping[str, Any],
    trials: int,
    seeds: Sequence[int],
    environment: Mapping[str, str],
    budget_s: float,
) -> list[dict[str, Any]]:
    """Stock's runs, one after the other in one process: its start-up is no matter here. As many as the time allows."""
    document = {
        "target": target,
        "trials_per_task": trials,
        "seeds": list(seeds),
        "budget_s": budget_s,
        "evaluator": None,
        "tasks": [task.document() for task in tasks],
    }
    runs: list[dict[str, Any]] = run_script("stock.py", document, environment)["runs"]
    return runs


def failure(run: Mapping[str, Any], tasks: Sequence[BenchTask]) -> str:
    """Why a run of stock's has no winner for every task; empty when it has."""
    missing = {task.name for task in tasks} - set(run["best"])
    if not missing:
        return ""
    why = {str(trial["error"]) for trial in run["trials"] if trial["task"] in missing}
    return f"no valid schedule for {', '.join(sorted(missing))}: {', '.join(sorted(why)) or 'no trial at all'}"


def service_run(
    tasks: Sequence[ExtractedTask], target_json: str, trials: int, seed: int, arguments: Sequence[str], *, alone: bool
) -> dict[str, dict[str, Any]]:
    """One seed of this service: winner's trace and number of trials by task."""
    found = {}
    for together in [[task] for task in tasks] if alone else [list(tasks)]:
        run = tune_with_service(
            together,
            target_json=target_json,
            trials=trials * len(together),
            seed=seed,
            server_arguments=arguments,
            options={"early_stopping": 0, "negligible_percent": 0.0},  # equally many trials
        )
        digests = [record.workload_digest for record in run.trials]
        for task in together:
            trace = json.loads(run.winner(task.workload.digest).trace)
            found[task.name] = {"trace": trace, "trials": digests.count(task.workload.digest)}
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print every seed's latencies and what they say."""
    seeds = len(rows[0]["us"]["stock"])
    print(
        f"\n{'latency, measured alike, us':<44}{'side':<10}"
        + "".join(f"{'run ' + str(n + 1):>10}" for n in range(seeds))
    )
    for row in rows:
        for side, values in row["us"].items():
            print(f"{row['description'][:42]:<44}{side:<10}" + "".join(f"{value:>10.1f}" for value in values))
    print(f"\n{'ours over stock':<44}{'median':>10}{'best':>10}{'worst':>10}{'chance to be faster':>22}")
    for row in rows:
        figures = row["figures"]
        print(
            f"{row['description'][:42]:<44}{figures['median_ratio']:>10.3f}{figures['best_ratio']:>10.3f}"
            f"{figures['worst_ratio']:>10.3f}{figures['superiority']:>22.2f}"
        )


def main() -> None:
    """Run everything, print, write the result file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda (the first visible GPU), cuda:N or cuda:UUID (default: cpu)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--trials", type=int, default=64, help="per operator (default: 64)")
    parser.add_argument(
        "--operators", help=f"kinds of ShuffleNet's, by commas (default: {','.join(OPERATORS)}; on a GPU see above)"
    )
    parser.add_argument("--alone", action="store_true", help="a job of this service for each operator")
    parser.add_argument("--rounds", type=int, default=9, help="of the final measurement (default: 9)")
    parser.add_argument(
        "--budget-s", type=float, default=3600.0, help="for stock's runs; seeds that take longer are left out"
    )
    parser.add_argument("--name", help="of the result file (default: quality-cpu or quality-cuda)")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the result file")
    arguments = parser.parse_args()
    arguments.device = use_only(arguments.device)
    kind = arguments.device.partition(":")[0]
    operators = arguments.operators.split(",") if arguments.operators else OPERATORS
    name = arguments.name or f"quality-{kind}"
    seeds = list(range(1, arguments.seeds + 1))

    machine = results.machine()
    for_server = server_arguments(arguments.device)
    target_json, device = server_target(for_server)
    target = json.loads(target_json)
    on_gpu = kind == "cuda" and not arguments.operators
    extracted = gpu_tasks(target_json)[-1:] if on_gpu else extract(target_json, operators)
    tasks = bench_tasks(extracted)
    cores = target.get("num-cores")  # see side_by_side.py
    environment = {"TVM_NUM_THREADS": str(cores)} if cores else {}
    print(f"{device.model}, {len(tasks)} operators, {arguments.trials} trials each, {len(seeds)} seeds")
    ours = []
    for seed in seeds:
        print(f"this service, seed {seed} ...", flush=True)
        ours.append(service_run(extracted, target_json, arguments.trials, seed, for_server, alone=arguments.alone))
    print(f"stock ms.tune_tasks, {len(seeds)} seeds ...", flush=True)
    stock = stock_runs(tasks, target, arguments.trials, seeds, environment, arguments.budget_s)
    if len(stock) < len(seeds):
        print(f"the time was enough for {len(stock)} of {len(seeds)} seeds", file=sys.stderr)
        seeds, ours = seeds[: len(stock)], ours[: len(stock)]

    troubles = {seed: why for seed, run in zip(seeds, stock, strict=True) if (why := failure(run, tasks))}
    for seed, why in troubles.items():
        print(f"seed {seed} is left out on both sides: stock found {why}", file=sys.stderr)
    if len(troubles) == len(seeds):
        sys.exit("error: stock found no schedules with any seed; its builds need a quiet machine (NOTES.md)")
    kept = [number for number, seed in enumerate(seeds) if seed not in troubles]
    seeds, stock, ours = [seeds[n] for n in kept], [stock[n] for n in kept], [ours[n] for n in kept]

    print("measuring the winners side by side ...", flush=True)
    traces: Winners = {task.name: {} for task in tasks}
    for task in tasks:
        for seed, theirs, found in zip(seeds, stock, ours, strict=True):
            traces[task.name][f"stock {seed}"] = theirs["best"][task.name]["trace"]
            traces[task.name][f"service {seed}"] = found[task.name]["trace"]
    with tempfile.TemporaryDirectory() as libraries:
        measured = run_script(
            "remeasure.py",
            {
                "target": target,
                "device": kind,
                "rounds": arguments.rounds,
                "libraries": libraries,
                "tasks": [{"name": task.name, "body": task.body, "traces": traces[task.name]} for task in tasks],
            },
            environment,
        )["tasks"]
    rows = []
    for task in tasks:
        us = {side: [measured[task.name][f"{side} {n}"]["median_us"] for n in seeds] for side in ("stock", "service")}
        counts = {
            "stock": [sum(t["task"] == task.name and t["error"] is None for t in run["trials"]) for run in stock],
            "service": [found[task.name]["trials"] for found in ours],
        }
        rows.append(
            {"task": task.name, "description": task.description, "weight": task.weight, "us": us, "trials": counts}
        )
    weighted = {
        side: [sum(row["weight"] * row["us"][side][n] for row in rows) for n in range(len(seeds))]
        for side in ("stock", "service")
    }
    rows.append({"task": "weighted", "description": "weighted sum", "weight": 1, "us": weighted})
    for row in rows:
        row["figures"] = distribution.compare(row["us"]["service"], row["us"]["stock"])
    show(rows)
    path = results.write(
        name,
        rows,
        device=device.model,
        driver=device.driver_version or None,
        machine_before=machine,
        directory=arguments.results,
        trials_per_task=arguments.trials,
        seeds=seeds,
        left_out={str(seed): why for seed, why in troubles.items()},
        alone=arguments.alone,
        target=target,
        server_arguments=for_server,
    )
    picture = path.with_suffix(".svg")
    title = f"{device.model}: {arguments.trials} trials per operator, {len(seeds)} seeds"
    distribution.draw(picture, title, {row["description"]: row["us"] for row in rows})
    print(f"\nwritten to {os.path.relpath(path)} and {os.path.relpath(picture)}")
    ratio = statistics.median(weighted["service"]) / statistics.median(weighted["stock"])
    print(f"ratio to stock, median of the weighted latency: {ratio:.3f}")


if __name__ == "__main__":
    main()
