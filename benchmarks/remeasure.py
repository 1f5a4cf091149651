"""Measure finished schedules the same way, whoever found them.

Run as ``python benchmarks/remeasure.py IN.json OUT.json``. ``IN.json``: ``{"target": {...}, "device": "cpu",
"rounds": 9, "libraries": FOLDER, "tasks": [{"name", "body", "traces": {"stock": TRACE, ...}}]}``. All schedules are
built first, those that the folder does not hold from an earlier call; then, task by task, rounds go over them in turn,
so that drift of the machine hits all alike. ``OUT.json``: ``{"sm_count", "tasks"}``: how many multiprocessors this
process sees (null on a CPU), and per task and side the median of the rounds' medians and their spread, microseconds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def build(spec: Mapping[str, Any]) -> dict[tuple[str, str], Path]:
    """Build what is not in the folder yet; by task and side.

    Args:
        spec: The input.
    """
    places = {
        (task["name"], label): (task["body"], trace, Path(spec["libraries"]) / f"{number}-{side}.so")
        for number, task in enumerate(spec["tasks"])
        for side, (label, trace) in enumerate(task["traces"].items())
    }
    paths = {key: path for key, (_, _, path) in places.items()}
    missing = [place for place in places.values() if not place[2].exists()]
    if not missing:
        return paths

    from tuner_core.compiler.tvm_setup import load_tvm

    load_tvm(intrinsics=True)
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
    from tvm.target import Target

    from tuner_core.compiler.trace import apply_trace
    from tuner_core.compiler.workload import module_from_body

    target = Target(spec["target"])

    def one(body: str, trace: Any, path: Path) -> None:
        schedule = apply_trace(module_from_body(body), json.dumps(trace) if not isinstance(trace, str) else trace)
        lowered = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(schedule.mod)
        with target:
            tvm.build(lowered, target=target).export_library(str(path))

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # compilers are processes of their own
        for done in [threads.submit(one, *place) for place in missing]:
            done.result()
    return paths


def main() -> None:
    """Build, measure, write."""
    spec = json.loads(Path(sys.argv[1]).read_text())

    from tuner_core.compiler.tvm_setup import load_tvm

    load_tvm()
    import numpy as np
    import tvm
    from tvm.s_tir import meta_schedule as ms

    from tuner_core.compiler.workload import module_from_body

    device = tvm.runtime.device(spec["device"])
    random = np.random.default_rng(0)
    paths = build(spec)
    result: dict[str, dict[str, Any]] = {}
    for task in spec["tasks"]:
        information = ms.arg_info.ArgInfo.from_entry_func(module_from_body(task["body"]), remove_preproc=True)
        arguments = [
            tvm.runtime.tensor(random.uniform(0.1, 1, [int(n) for n in info.shape]).astype(str(info.dtype)), device)
            for info in information
        ]
        evaluators = {
            side: tvm.runtime.load_module(str(paths[task["name"], side])).time_evaluator(
                "main", device, number=1, repeat=5, min_repeat_ms=40
            )
            for side in task["traces"]
        }
        samples: dict[str, list[float]] = {side: [] for side in evaluators}
        for _ in range(spec["rounds"]):
            for side, evaluator in evaluators.items():
                samples[side].append(1e6 * statistics.median(evaluator(*arguments).results))
        result[task["name"]] = {
            side: {"median_us": statistics.median(times), "min_us": min(times), "max_us": max(times)}
            for side, times in samples.items()
        }
    seen = None if spec["device"] == "cpu" else int(device.multi_processor_count)
    Path(sys.argv[2]).write_text(json.dumps({"sm_count": seen, "tasks": result}))


if __name__ == "__main__":
    main()
