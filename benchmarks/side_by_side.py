"""This service beside stock MetaSchedule on one device: same operators, same number of trials, one run.

One after the other: stock ``ms.tune_tasks`` with its defaults, on the whole device; then this service, once for each
:class:`Side`. Only valid, new, distinct trials count. The winners of all runs are then measured in one process in
turns, at every share of the device that a side tuned for. NOTES.md says what is fair about it and what is not.
``bench_cpu.py`` and ``bench_gpu.py`` call this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from convergence import Sample, time_to_reach, weighted_curve
from service import ServiceRun, server_target, tune_with_service
from shares import share_of_gpu
from tasks import BenchTask, bench_tasks

from tuner_client.model.prepare import ExtractedTask
from tuner_core.model import EvaluatorSettings

FINAL_S = 60.0
"""What building and measuring the winners takes."""
STOCK_EVALUATOR = EvaluatorSettings(number=3, repeat=1, min_repeat_ms=100)


@dataclass(frozen=True)
class Side:
    """One run of this service.

    Attributes:
        label: For tables.
        sm_percent: Share of the device that it tunes for.
        server_arguments: For ``tuner-server``; nothing for its defaults.
        evaluator: In place of the server's own settings.
        optional: Left out when the time is nearly over, see ``--budget-s``.
    """

    label: str
    sm_percent: int = 100
    server_arguments: tuple[str, ...] = ()
    evaluator: EvaluatorSettings | None = None
    optional: bool = False


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
        "label": "stock",
        "sm_percent": 100,
        "trials": len(valid),
        "failed": sum(trial["error"] is not None for trial in run["trials"]),
        "failures": dict(Counter(trial["error"] for trial in run["trials"] if trial["error"] is not None)),
        "duplicates": sum(trial["duplicate"] for trial in run["trials"]),
        "tuning_s": tuning_s,
        "start_up_s": run["tuning_from"] - run["started_at"],
        "trials_per_s": len(valid) / tuning_s,
        "trials_per_s_with_start_up": len(valid) / (run["tuning_to"] - run["started_at"]),
        "trials_by_task": {task.name: sum(trial["task"] == task.name for trial in valid) for task in tasks},
    }
    return row, samples


def service_row(run: ServiceRun, side: Side, names: Mapping[str, str]) -> tuple[dict[str, Any], list[Sample]]:
    """Figures of a run of this service, and all latencies that it knew: of its trials, and of the fallback schedules.

    Args:
        run: The run.
        side: What it was.
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
        "label": side.label,
        "sm_percent": side.sm_percent,
        "server_arguments": list(side.server_arguments),
        "trials": len(trials),
        "failed": sum(record.failure is not None for record in run.records),
        "failures": dict(Counter(str(record.failure) for record in run.records if record.failure is not None)),
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
        print(
            f"{row['label']:<30}{row['trials']:>8}{row['failed']:>8}{row['start_up_s']:>8.1f} s"
            f"{row['tuning_s']:>8.1f} s{row['trials_per_s']:>10.2f}{row['trials_per_s_with_start_up']:>15.2f}"
        )
    for share in rows[0]["final_us"]:
        where = f"on {share} % of the device, us"
        print(f"\n{'final latency, measured alike ' + where:<56}" + "".join(f"{row['label'][:26]:>28}" for row in rows))
        for task in tasks:
            print(
                f"{task.description[:48]:<50}{'x' + str(task.weight):>6}"
                + "".join(f"{row['final_us'][share][task.name]['median_us']:>28.1f}" for row in rows)
            )
        print(f"{'weighted':<56}" + "".join(f"{row['weighted_final_us'][share]:>28.1f}" for row in rows))
    print(
        f"{'seconds to the final latency of stock':<56}" + "".join(f"{_seconds(row['s_to_stock']):>28}" for row in rows)
    )


def show_timeline(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print where the service's processor time went, and how busy the partitions and stages were."""
    for row in rows:
        figures = row.get("timeline", {})
        if "cpu_s_per_trial" not in figures:
            continue
        each = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in figures["cpu_s_per_trial"].items())
        together = sum(figures["cpu_s_per_trial"].values())
        print(f"\n{row['label']}")
        print(f"  CPU core-seconds per trial by stage: {each}; together {together:.3f}")
        print(f"  partition busy share: {100 * figures['partitions_busy']:.1f} %")
        if figures["overhead_ms"] is not None:
            print(
                f"  a worker's time for a trial beside runs of the candidate: {figures['overhead_ms']:.2f} ms (median)"
            )
        busy = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in figures["busy"].items())
        print(f"  busy share by stage: {busy}; bottleneck: {figures['bottleneck']}")


def _attempts_per_s(row: Mapping[str, Any]) -> float:
    """Valid and failed trials together: a host on which stock's builds time out flatters what is compared with it."""
    return float((row["trials"] + row["failed"]) / row["tuning_s"])


def _since(began: float) -> str:
    return f"[{time.monotonic() - began:.0f} s]"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def measure_winners(
    tasks: Sequence[BenchTask],
    traces: Mapping[str, Mapping[str, Any]],
    *,
    target: Mapping[str, Any],
    device_kind: str,
    sm_percent: int,
    rounds: int,
    environment: Mapping[str, str],
    libraries: Path,
) -> dict[str, dict[str, dict[str, float]]]:
    """Latency of every run's winners at one share of the device: by task and run, see ``remeasure.py``.

    Args:
        tasks: The operators.
        traces: By run and task.
        target: What they are built for.
        device_kind: ``cpu`` or ``cuda``.
        sm_percent: The share.
        rounds: Of the measurement.
        environment: Set for it.
        libraries: Folder of what is built, the same for every share.
    """
    document = {
        "target": target,
        "device": device_kind,
        "rounds": rounds,
        "libraries": str(libraries),
        "tasks": [
            {
                "name": task.name,
                "body": task.body,
                "traces": {run: by_task[task.name] for run, by_task in traces.items()},
            }
            for task in tasks
        ],
    }
    with share_of_gpu(sm_percent) as capped:
        measured = run_script("remeasure.py", document, {**environment, **capped})
    print(f"... on {sm_percent} %, {measured['sm_count'] or 'all'} SMs", flush=True)
    return dict(measured["tasks"])


def compare(device_kind: str, operators: Callable[[str], list[ExtractedTask]], sides: Sequence[Side]) -> None:
    """Read the command line, run everything, print, write the result file.

    Args:
        device_kind: ``cpu`` or ``cuda``: what the winners are measured on.
        operators: Gives what is tuned for a target's JSON.
        sides: The service's runs; the first is the one that is compared in the last lines, the second has stock's
            evaluator settings.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64, help="per task (default: 64)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of the final measurement (default: 5)")
    parser.add_argument(
        "--budget-s", type=float, default=570.0, help="seconds after which no optional run would end (default: 570)"
    )
    parser.add_argument("--name", default=device_kind, help="of the result file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the result file")
    arguments = parser.parse_args()

    began = time.monotonic()
    machine = results.machine()
    target_json, device = server_target(sides[0].server_arguments)
    extracted = operators(target_json)
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

    print(f"{_since(began)} stock ms.tune_tasks, {budget} trials ...", flush=True)
    spec = {
        "target": json.loads(target_json),
        "trials_per_task": arguments.trials,
        "seed": arguments.seed,
        "evaluator": None,
        "tasks": [task.document() for task in tasks],
    }
    stock = run_script("stock.py", spec, environment)
    row, samples = stock_row(stock, tasks)
    rows, curves = [row], [weighted_curve(samples, weights)]
    traces = {"stock": {name: best["trace"] for name, best in stock["best"].items()}}
    if missing := set(names.values()) - set(stock["best"]):
        why = {trial["error"] for trial in stock["trials"] if trial["task"] in missing}
        sys.exit(f"error: stock found no valid schedule for {', '.join(sorted(missing))}: {why or 'no trial at all'}")

    left_out = []
    took_s = 0.0
    for number, side in enumerate(sides, start=1):
        side_began = time.monotonic()
        if side.optional and side_began - began + took_s + FINAL_S > arguments.budget_s:
            left_out.append(side.label)
            print(f"{_since(began)} this service, {side.label}: left out, it would take longer than --budget-s")
            continue
        print(f"{_since(began)} this service, {side.label}, {budget} trials ...", flush=True)
        run = tune_with_service(
            extracted,
            target_json=target_json,
            trials=budget,
            seed=arguments.seed,
            evaluator=side.evaluator,
            server_arguments=side.server_arguments,
            picture=arguments.results / f"{arguments.name}-{number}",
        )
        row, samples = service_row(run, side, names)
        rows.append(row)
        curves.append(weighted_curve(samples, weights))
        traces[side.label] = {name: json.loads(run.winner(digest).trace) for digest, name in names.items()}
        took_s = time.monotonic() - side_began

    print(f"{_since(began)} measuring the winners side by side ...", flush=True)
    with tempfile.TemporaryDirectory() as libraries:
        for share in dict.fromkeys((100, *(side.sm_percent for side in sides))):
            measured = measure_winners(
                tasks,
                traces,
                target=json.loads(target_json),
                device_kind=device_kind,
                sm_percent=share,
                rounds=arguments.rounds,
                environment=environment,
                libraries=Path(libraries),
            )
            for row in rows:
                final = {name: by_run[row["label"]] for name, by_run in measured.items()}
                row.setdefault("final_us", {})[str(share)] = final
                row.setdefault("weighted_final_us", {})[str(share)] = sum(
                    weights[name] * figures["median_us"] for name, figures in final.items()
                )
    rows[0]["s_to_stock"] = curves[0][-1][0]
    for row, curve in zip(rows[1:], curves[1:], strict=True):
        row["s_to_stock"] = time_to_reach(curve, rows[0]["weighted_final_us"][str(row["sm_percent"])])
    for row in rows:
        row["ratio_to_stock"] = row["trials_per_s"] / rows[0]["trials_per_s"]
        row["ratio_with_failed"] = _attempts_per_s(row) / _attempts_per_s(rows[0])

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
        left_out=left_out,
        seconds=time.monotonic() - began,
        target=json.loads(target_json),
    )
    print(f"\n{_since(began)} written to {os.path.relpath(path)}")
    for row in rows[1:]:
        share = str(row["sm_percent"])
        ratio = row["weighted_final_us"][share] / rows[0]["weighted_final_us"][share]
        reached = "never" if row["s_to_stock"] is None else f"{100 * row['s_to_stock'] / rows[0]['tuning_s']:.1f} %"
        print(
            f"{row['label']}: {row['ratio_to_stock']:.2f} times stock's trials/s "
            f"({row['ratio_with_failed']:.2f} with the failed ones of both); "
            f"final weighted latency on {share} % of the device {ratio:.3f} of stock's; "
            f"as good as stock's in the end after {reached} of stock's time"
        )
