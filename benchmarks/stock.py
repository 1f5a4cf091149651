"""Stock MetaSchedule on given tasks: ``ms.tune_tasks`` with its defaults, and what every trial gave.

Run as ``python benchmarks/stock.py TASKS.json RESULT.json``, in a process of its own, so that its start-up is its own
too. ``TASKS.json``: ``{"target": {...}, "trials_per_task": 64, "seed": 1, "evaluator": null, "tasks": [{"name",
"weight", "body"}]}`` (``body`` is a workload's canonical JSON; ``evaluator`` replaces stock's own settings; with
``"seeds": [...]`` in place of ``seed`` the runs come one after the other, as ``{"runs": [...]}``; none but the first
begins that would end later than ``"budget_s"`` seconds after the start). Times in the result are seconds since the
epoch, latencies microseconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

STARTED_AT = psutil.Process().create_time()


class TrialLog:
    """Every trial of a run, in the order in which it was measured; duplicates are marked."""

    def __init__(self) -> None:
        self.trials: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, Any]] = {}
        self._seen: set[tuple[str, str]] = set()

    def add(self, task: str, trace: str, latencies_s: list[float] | None, error: str | None) -> None:
        """Note one trial at the present time.

        Args:
            task: Name of the task.
            trace: The schedule's trace as JSON.
            latencies_s: The runner's samples, None for a failed trial.
            error: Why it failed.
        """
        duplicate = (task, trace) in self._seen
        self._seen.add((task, trace))
        latency_us = 1e6 * sum(latencies_s) / len(latencies_s) if latencies_s else None
        self.trials.append(
            {
                "task": task,
                "at": time.time(),
                "latency_us": latency_us,
                "duplicate": duplicate,
                "error": error and error.strip().splitlines()[-1][:200],
            }
        )
        if latency_us is not None and latency_us < self.best.get(task, {}).get("latency_us", float("inf")):
            self.best[task] = {"latency_us": latency_us, "trace": json.loads(trace)}


def main() -> None:
    """Tune, then write the result."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    if "seeds" in spec:
        runs: list[dict[str, Any]] = []
        for seed in spec["seeds"]:
            longest = max((run["tuning_to"] - run["tuning_from"] for run in runs), default=0.0)
            if runs and time.time() + longest > STARTED_AT + spec["budget_s"]:
                break
            runs.append(tune(spec, seed))
        result: dict[str, Any] = {"runs": runs}
    else:
        result = tune(spec, spec["seed"])
    Path(sys.argv[2]).write_text(json.dumps(result))


def tune(spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run of ``ms.tune_tasks``."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms
    from tvm.target import Target

    from tuner_core.compiler.workload import module_from_body

    target = Target(spec["target"])
    modules = [module_from_body(task["body"]) for task in spec["tasks"]]
    workloads = [ms.database.Workload(module) for module in modules]
    log = TrialLog()

    @derived_object
    class Observer(ms.measure_callback.PyMeasureCallback):  # type: ignore[misc]
        def apply(self, scheduler: Any, task_id: int, candidates: Any, builds: Any, runs: Any) -> None:
            name = spec["tasks"][task_id]["name"]
            for candidate, build, run in zip(candidates, builds, runs, strict=True):
                record = ms.database.TuningRecord(candidate.sch.trace, workloads[task_id])
                trace = json.dumps(record.as_json()[0])
                error = build.error_msg or run.error_msg
                log.add(name, trace, None if error else [float(s) for s in run.run_secs], error and str(error))

    with tempfile.TemporaryDirectory() as work_dir:
        contexts, weights = ms.relax_integration.extracted_tasks_to_tune_contexts(
            [
                ms.ExtractedTask(task["name"], module, target, [module], task["weight"])
                for task, module in zip(spec["tasks"], modules, strict=True)
            ],
            work_dir=work_dir,
            seed=seed,
        )
        runner: Any = "local"
        if spec["evaluator"]:
            runner = ms.runner.LocalRunner(evaluator_config=ms.runner.EvaluatorConfig(**spec["evaluator"]))
        tuning_from = time.time()
        ms.tune_tasks(
            tasks=contexts,
            task_weights=weights,
            work_dir=work_dir,
            max_trials_global=spec["trials_per_task"] * len(contexts),
            max_trials_per_task=spec["trials_per_task"],
            runner=runner,
            measure_callbacks=[Observer(), *ms.measure_callback.MeasureCallback.create("default")],
        )
        tuning_to = time.time()
    return {
        "started_at": STARTED_AT,
        "tuning_from": tuning_from,
        "tuning_to": tuning_to,
        "threads": contexts[0].num_threads,
        "trials": log.trials,
        "best": log.best,
    }


if __name__ == "__main__":
    main()
