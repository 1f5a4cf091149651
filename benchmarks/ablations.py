"""What each smarter use of trials is worth: the same job with everything on, and with one thing off at a time.

    python benchmarks/ablations.py [--device cpu|cuda] [--seeds 3] [--trials 24] [--name ablations-cpu]

Real measurements on real servers. The operators are from the light SqueezeNet, whose convolutions are all related. The
job has the heaviest and every second after it, five in all, and the three lightest. A job with the ten heaviest others
fills the store first (the *past*); every run gets a copy of that store:

- ``all on``: the past teaches the searches, tasks of the job teach each other, tasks that stand still are stopped
  (32 trials without progress, fewer than the default of 128, since the job is short), and operators that together take
  less than 3 % of the untuned model get no trials (the default is 0.5 %, which this model's operators exceed).
- ``not pre-trained``: tasks teach each other, the past does not. ``no shared experience``: neither.
- ``no early stopping``, ``no skipping``.
- ``no cost of builds`` (on a GPU only): what a candidate costs to build plays no part in choosing it.

Each run's weighted latency is the job's own, of its best schedules so far; an operator without trials counts with its
fallback schedule. It settles when it is within 5 % of its own end; it reaches the bar when it is within 5 % of the
lowest median end of all variants. The final latency is of the winners measured again alone. Figures are medians over
the seeds; the result file holds every run. Under 15 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from convergence import Sample, time_to_reach, time_to_settle, weighted_curve
from devices import use_only
from service import ServiceRun, server_target, tune_with_service
from tasks import light_model

from tuner_client.model.load import load_model
from tuner_client.model.prepare import ExtractedTask, prepare
from tuner_core.compiler.tvm_setup import load_tvm

WITHIN = 0.05
MODEL = "squeezenet"
HEAVY = 5
LIGHTEST = 3
PAST = 10
"""Operators tuned before: the records of fewer than eight related ones are not heeded."""
ALL_ON: dict[str, Any] = {"experience": "store", "early_stopping": 32, "negligible_percent": 3.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "all on": {},
    "not pre-trained": {"experience": "job"},
    "no shared experience": {"experience": "none"},
    "no early stopping": {"early_stopping": 0},
    "no skipping": {"negligible_percent": 0.0},
}
GPU_VARIANTS: dict[str, dict[str, Any]] = {"no cost of builds": {"build_cost_weight": 0.0}}


@dataclass(frozen=True)
class Operators:
    """The job's operators, and those that were tuned before."""

    job: list[ExtractedTask]
    past: list[ExtractedTask]


def operators(target_json: str) -> Operators:
    """Take the model's tunable operators apart; see the top of this file."""
    load_tvm()
    tunable = [task for task in prepare(load_model(light_model(MODEL), {}).module, target_json).tasks if task.tunable]
    tunable.sort(key=lambda t: -t.weight * t.workload.cost_guess)
    job = [*tunable[: 2 * HEAVY : 2], *tunable[-LIGHTEST:]]
    return Operators(job, [task for task in tunable if task not in job][:PAST])


@dataclass(frozen=True)
class Convergence:
    """How one run went.

    Attributes:
        curve: Weighted latency in microseconds over seconds.
        trials_at_s: When each trial was known, in order.
        final_us: Weighted latency of the winners measured alone.
    """

    curve: list[tuple[float, float]]
    trials_at_s: list[float]
    final_us: float
    row: dict[str, Any]

    def trials_until(self, at_s: float | None) -> int | None:
        """Trials known by then."""
        return None if at_s is None else bisect_right(self.trials_at_s, at_s)


def convergence(run: ServiceRun, tasks: Sequence[ExtractedTask]) -> Convergence:
    """What the records and the report of a run say."""
    names = {task.workload.digest: task.name for task in tasks}
    samples = [
        Sample(names[record.workload_digest], record.created_at - run.tuning_from, record.median_us or 0.0)
        for record in run.records
        if record.valid and not record.verified
    ]
    final = {task.name: task.best_latency_us or task.baseline_latency_us or 0.0 for task in run.report.tasks}
    weights = {task.name: task.weight for task in tasks}
    row = {
        "status": run.report.status,
        "trials": len(run.trials),
        "failed": run.report.failed,
        "seconds": run.tuning_to - run.tuning_from,
        "stopped_early": sum(task.stopped_early for task in run.report.tasks),
        "skipped": sum(task.state.value == "skipped" for task in run.report.tasks),
        "trials_by_task": {task.name: task.trials for task in run.report.tasks},
    }
    return Convergence(
        weighted_curve(samples, weights),
        sorted(record.created_at - run.tuning_from for record in run.trials),
        sum(weights[name] * us for name, us in final.items()),
        row,
    )


def summarise(runs: Mapping[str, Sequence[Convergence]]) -> tuple[list[dict[str, Any]], float]:
    """One row per variant, medians over its seeds, every run beside them; and the common bar in microseconds."""
    ends = {name: statistics.median(run.curve[-1][1] for run in each) for name, each in runs.items()}
    bar_us = (1 + WITHIN) * min(ends.values())
    rows = []
    for name, each in runs.items():
        seeds = []
        for run in each:
            settled_s, bar_s = time_to_settle(run.curve, WITHIN), time_to_reach(run.curve, bar_us)
            seeds.append(
                {
                    **run.row,
                    "final_us": run.final_us,
                    "settled_s": settled_s,
                    "settled_trials": run.trials_until(settled_s),
                    "bar_s": bar_s,
                    "bar_trials": run.trials_until(bar_s),
                }
            )
        figures = ("trials", "seconds", "stopped_early", "skipped", "final_us", "settled_s", "settled_trials")
        row = {figure: statistics.median(seed[figure] for seed in seeds) for figure in figures}
        for figure in ("bar_s", "bar_trials"):  # a run that never gets there is later than all that do
            reached = sorted(seed[figure] for seed in seeds if seed[figure] is not None)
            row[figure] = reached[len(seeds) // 2] if len(reached) > len(seeds) // 2 else None
        rows.append({"variant": name, **row, "seeds": seeds})
    return rows, bar_us


def show(rows: Sequence[Mapping[str, Any]], bar_us: float) -> None:
    """Print the table."""
    print(f"\nmedians over {len(rows[0]['seeds'])} seeds; the bar is at {bar_us:.1f} us")
    print(
        f"{'variant':<24}{'trials':>8}{'seconds':>9}{'stopped':>9}{'skipped':>9}"
        f"{'settled at':>20}{'bar reached at':>20}{'final us':>11}{'over all on':>13}"
    )
    for row in rows:
        settled = f"{row['settled_trials']:.0f} / {row['settled_s']:.1f} s"
        bar = "-" if row["bar_s"] is None else f"{row['bar_trials']:.0f} / {row['bar_s']:.1f} s"
        print(
            f"{row['variant']:<24}{row['trials']:>8.0f}{row['seconds']:>9.1f}{row['stopped_early']:>9.0f}"
            f"{row['skipped']:>9.0f}{settled:>20}{bar:>20}{row['final_us']:>11.1f}"
            f"{row['final_us'] / rows[0]['final_us']:>13.3f}"
        )


def main() -> None:
    """Run all variants, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda (the first visible GPU), cuda:N or cuda:UUID (default: cpu)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--trials", type=int, default=24, help="per operator (default: 24)")
    parser.add_argument("--variants", help="by commas (default: all)")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seeds that would take longer are left out")
    parser.add_argument("--name", help="of the result file (default: ablations-cpu or ablations-cuda)")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the result file")
    arguments = parser.parse_args()
    arguments.device = use_only(arguments.device)
    kind = arguments.device.partition(":")[0]
    variants = {**VARIANTS, **(GPU_VARIANTS if kind == "cuda" else {})}
    chosen = {name: {**ALL_ON, **variants[name]} for name in (arguments.variants or ",".join(variants)).split(",")}

    began = time.monotonic()
    machine = results.machine()
    for_server = ["--device", arguments.device]
    if kind == "cuda":
        for_server += ["--sm-percent", "25", "--workers", "4"]
    target_json, device = server_target(for_server)
    found = operators(target_json)
    runs: dict[str, list[Convergence]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        past = Path(temporary) / "past"
        print(f"{device.model}; the past: {len(found.past)} operators, {arguments.trials} trials each ...", flush=True)
        tune_with_service(
            found.past,
            target_json=target_json,
            trials=arguments.trials * len(found.past),
            seed=1000,
            server_arguments=for_server,
            data_dir=past,
        )
        for seed in range(1, arguments.seeds + 1):  # seed by seed, so that drift of the machine hits all variants alike
            seed_began = time.monotonic()
            for name, options in chosen.items():
                print(f"seed {seed}, {name} ...", flush=True)
                data_dir = Path(temporary) / "run"
                shutil.copytree(past, data_dir)
                run = tune_with_service(
                    found.job,
                    target_json=target_json,
                    trials=arguments.trials * len(found.job),
                    seed=seed,
                    server_arguments=for_server,
                    options=options,
                    data_dir=data_dir,
                )
                shutil.rmtree(data_dir)
                runs[name].append(convergence(run, found.job))
            now = time.monotonic()
            if now - began + (now - seed_began) > arguments.budget_s:
                print(f"no time for more than {seed} of {arguments.seeds} seeds")
                break
    rows, bar_us = summarise(runs)
    show(rows, bar_us)
    path = results.write(
        arguments.name or f"ablations-{kind}",
        rows,
        device=device.model,
        driver=device.driver_version or None,
        machine_before=machine,
        directory=arguments.results,
        trials_per_task=arguments.trials,
        variants=chosen,
        job=[{"description": task.workload.description, "weight": task.weight} for task in found.job],
        past=[{"description": task.workload.description, "weight": task.weight} for task in found.past],
        bar_us=bar_us,
        target=json.loads(target_json),
        server_arguments=for_server,
    )
    print(f"\nwritten to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
