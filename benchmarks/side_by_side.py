"""This service beside stock MetaSchedule on one device: same operators, same number of trials, one run.

Three runs, one after the other: stock ``ms.tune_tasks`` with its defaults; this service with its defaults; this service
with stock's evaluator settings. Only valid, new, distinct trials count. The winners of all runs are then measured in
one process in turns. NOTES.md says what is fair about it and what is not. ``bench_cpu.py`` and ``bench_gpu.py`` call
this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results
from convergence import Sample, time_to_reach, weighted_curve
from service import ServiceRun, server_target, tune_with_service
from tasks import BenchTask, bench_tasks, extract

from tuner_core.model import EvaluatorSettings

STOCK_EVALUATOR = EvaluatorSettings(number=3, repeat=1, min_repeat_ms=100)


def run_script(name: str, document: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run one of this folder's scripts in a process of its own and return what it wrote.

    Args:
        name: ``stock.py`` or ``remeasure.py``.
        document: Its input.
        environment: Set for it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, sink, log = (Path(scratch) / part for part in ("in.json", "out.json", "log"))
        source.write_text(json.dumps(document))
        with log.open("wb") as output:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).parent / name), str(source), str(sink)],
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                check=False,
            )
        if done.returncode != 0:
            sys.exit(f"error: {name} failed:\n{log.read_text(errors='replace')[-3000:]}")
        return dict(json.loads(sink.read_text()))


def stock_row(run: Mapping[str, Any], tasks: Sequence[BenchTask]) -> tuple[dict[str, Any], list[Sample]]:
    """Figures of a stock run, and its valid trials."""
    valid = [trial for trial in run["trials"] if trial["error"] is None and not trial["duplicate"]]
    samples = [Sample(trial["task"], trial["at"] - run["tuning_from"], trial["latency_us"]) for trial in valid]
    tuning_s = run["tuning_to"] - run["tuning_from"]
    row = {
        "side": "stock",
        "evaluator": "stock",
        "trials": len(valid),
        "failed": sum(trial["error"] is not None for trial in run["trials"]),
        "duplicates": sum(trial["duplicate"] for trial in run["trials"]),
        "tuning_s": tuning_s,
        "start_up_s": run["tuning_from"] - run["started_at"],
        "trials_per_s": len(valid) / tuning_s,
        "trials_per_s_with_start_up": len(valid) / (run["tuning_to"] - run["started_at"]),
        "trials_by_task": {task.name: sum(trial["task"] == task.name for trial in valid) for task in tasks},
    }
    return row, samples


def service_row(run: ServiceRun, evaluator: str, names: Mapping[str, str]) -> tuple[dict[str, Any], list[Sample]]:
    """Figures of a run of this service, and all latencies that it knew: of its trials, and of the fallback schedules.

    Args:
        run: The run.
        evaluator: Whose evaluator settings it used: ``own`` or ``stock``.
        names: Task by workload digest.
    """
    known = [
        Sample(names[record.workload_digest], record.created_at - run.tuning_from, record.median_us or 0.0)
        for record in run.records
        if record.valid and not record.verified
    ]
    trials = [names[record.workload_digest] for record in run.trials]
    tuning_s = run.tuning_to - run.tuning_from
    row = {
        "side": "service",
        "evaluator": evaluator,
        "trials": len(trials),
        "failed": sum(record.failure is not None for record in run.records),
        "duplicates": 0,
        "tuning_s": tuning_s,
        "start_up_s": run.tuning_from - run.started_at,
        "trials_per_s": len(trials) / tuning_s,
        "trials_per_s_with_start_up": len(trials) / (run.tuning_to - run.started_at),
        "trials_by_task": {name: trials.count(name) for name in names.values()},
        "job_status": run.report.status,
        "timeline": run.timeline,
        "verified": {task.name: task.verified for task in run.report.tasks},
    }
    return row, known


def show(rows: Sequence[Mapping[str, Any]], tasks: Sequence[BenchTask]) -> None:
    """Print the figures as tables."""
    print(f"\n{'run':<30}{'trials':>8}{'failed':>8}{'start-up':>10}{'tuning':>10}{'trials/s':>10}{'with start-up':>15}")
    for row in rows:
        label = f"{row['side']}, {row['evaluator']} evaluator"
        print(
            f"{label:<30}{row['trials']:>8}{row['failed']:>8}{row['start_up_s']:>8.1f} s{row['tuning_s']:>8.1f} s"
            f"{row['trials_per_s']:>10.2f}{row['trials_per_s_with_start_up']:>15.2f}"
        )
    print(f"\n{'final latency, measured alike, us':<48}" + "".join(f"{row['label']:>18}" for row in rows))
    for task in tasks:
        print(
            f"{task.description[:42]:<42}{'x' + str(task.weight):>6}"
            + "".join(f"{row['final_us'][task.name]['median_us']:>18.1f}" for row in rows)
        )
    print(f"{'weighted':<48}" + "".join(f"{row['weighted_final_us']:>18.1f}" for row in rows))
    print(
        f"{'seconds to the same weighted best':<48}" + "".join(f"{_seconds(row['s_to_same_best']):>18}" for row in rows)
    )


def show_timeline(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print where the service's processor time went, and how busy the partitions and stages were."""
    for row in rows:
        figures = row.get("timeline", {})
        if "cpu_s_per_trial" not in figures:
            continue
        each = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in figures["cpu_s_per_trial"].items())
        together = sum(figures["cpu_s_per_trial"].values())
        print(f"\n{row['side']}, {row['evaluator']} evaluator")
        print(f"  CPU core-seconds per trial by stage: {each}; together {together:.3f}")
        print(f"  partition busy share: {100 * figures['partitions_busy']:.1f} %")
        busy = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in figures["busy"].items())
        print(f"  busy share by stage: {busy}; bottleneck: {figures['bottleneck']}")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def compare(device_kind: str, server_arguments: Sequence[str] = ()) -> None:
    """Read the command line, run everything, print, write the result file.

    Args:
        device_kind: ``cpu`` or ``cuda``: what the winners are measured on.
        server_arguments: For ``tuner-server``; nothing for its defaults.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64, help="per task (default: 64)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="of the final measurement (default: 9)")
    parser.add_argument("--name", default=device_kind, help="of the result file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the result file")
    arguments = parser.parse_args()

    machine = results.machine()
    target_json, device = server_target(server_arguments)
    extracted = extract(target_json)
    tasks = bench_tasks(extracted)
    names = {task.workload.digest: task.name for task in extracted}
    weights = {task.name: task.weight for task in tasks}
    # TVM's pool takes half of the cores by itself, as if every two shared one; our workers take the target's.
    cores = json.loads(target_json).get("num-cores")
    environment = {"TVM_NUM_THREADS": str(cores)} if cores else {}
    budget = arguments.trials * len(tasks)
    print(f"{device.model}, target {target_json}")
    for task in tasks:
        print(f"  {task.description}, called {task.weight}x")

    print(f"stock ms.tune_tasks, {budget} trials ...", flush=True)
    spec = {
        "target": json.loads(target_json),
        "trials_per_task": arguments.trials,
        "seed": arguments.seed,
        "evaluator": None,
        "tasks": [task.document() for task in tasks],
    }
    stock = run_script("stock.py", spec, environment)
    rows, curves = [], []
    row, samples = stock_row(stock, tasks)
    rows.append(row)
    curves.append(weighted_curve(samples, weights))
    winners = [{name: best["trace"] for name, best in stock["best"].items()}]
    if missing := set(names.values()) - set(stock["best"]):
        why = {trial["error"] for trial in stock["trials"] if trial["task"] in missing}
        sys.exit(f"error: stock found no valid schedule for {', '.join(sorted(missing))}: {why or 'no trial at all'}")

    for label, evaluator in (("own", None), ("stock", STOCK_EVALUATOR)):
        print(f"this service, {label} evaluator settings, {budget} trials ...", flush=True)
        run = tune_with_service(
            extracted,
            target_json=target_json,
            trials=budget,
            seed=arguments.seed,
            evaluator=evaluator,
            server_arguments=server_arguments,
            picture=arguments.results / f"{arguments.name}-{label}",
        )
        row, samples = service_row(run, label, names)
        rows.append(row)
        curves.append(weighted_curve(samples, weights))
        winners.append({name: json.loads(run.winner(digest).trace) for digest, name in names.items()})

    for row in rows:
        row["label"] = f"{row['side']}/{row['evaluator']}"
    print("measuring the winners side by side ...", flush=True)
    measured = run_script(
        "remeasure.py",
        {
            "target": json.loads(target_json),
            "device": device_kind,
            "rounds": arguments.rounds,
            "tasks": [
                {
                    "name": task.name,
                    "body": task.body,
                    "traces": {row["label"]: traces[task.name] for row, traces in zip(rows, winners, strict=True)},
                }
                for task in tasks
            ],
        },
        environment,
    )
    for row in rows:
        row["final_us"] = {name: sides[row["label"]] for name, sides in measured.items()}
        row["weighted_final_us"] = sum(
            weights[name] * sides[row["label"]]["median_us"] for name, sides in measured.items()
        )
    same_best_us = max(curve[-1][1] for curve in curves[:2])
    for row, curve in zip(rows, curves, strict=True):
        row["s_to_same_best"] = time_to_reach(curve, same_best_us)
        row["ratio_to_stock"] = row["trials_per_s"] / rows[0]["trials_per_s"]

    show(rows, tasks)
    show_timeline(rows)
    path = results.write(
        arguments.name,
        rows,
        device=device.model,
        driver=device.driver_version or None,
        machine_before=machine,
        directory=arguments.results,
        tasks=[{"name": t.name, "description": t.description, "weight": t.weight} for t in tasks],
        trials_per_task=arguments.trials,
        target=json.loads(target_json),
        server_arguments=list(server_arguments),
        same_weighted_best_us=same_best_us,
    )
    print(f"\nwritten to {os.path.relpath(path)}")
    print(f"ratio to stock, final weighted latency: {rows[1]['weighted_final_us'] / rows[0]['weighted_final_us']:.3f}")
    print(f"ratio to stock with the same evaluator settings, trials/s: {rows[2]['ratio_to_stock']:.2f}")
    print(f"ratio to stock, trials/s: {rows[1]['ratio_to_stock']:.2f}")
