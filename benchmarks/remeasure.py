"""Measure finished schedules the same way, whoever found them.

Run as ``python benchmarks/remeasure.py IN.json OUT.json``. ``IN.json``: ``{"target": {...}, "device": "cpu",
"rounds": 9, "tasks": [{"name", "body", "traces": {"stock": TRACE, ...}}]}``. A task's schedules are built first; then
rounds go over them in turn, so that drift of the machine hits all alike. ``OUT.json``: ``{"sm_count", "tasks"}``: how
many multiprocessors this process sees (null on a CPU), and per task and side the median of the rounds' medians and
their spread, microseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Build, measure, write."""
    spec = json.loads(Path(sys.argv[1]).read_text())

    from tuner_core.compiler.tvm_setup import load_tvm

    load_tvm(intrinsics=True)
    import numpy as np
    import tvm
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
    from tvm.target import Target

    from tuner_core.compiler.trace import apply_trace
    from tuner_core.compiler.workload import module_from_body

    target = Target(spec["target"])
    device = tvm.runtime.device(spec["device"])
    random = np.random.default_rng(0)
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task in spec["tasks"]:
            module = module_from_body(task["body"])
            arguments = [
                tvm.runtime.tensor(random.uniform(0.1, 1, [int(n) for n in info.shape]).astype(str(info.dtype)), device)
                for info in ms.arg_info.ArgInfo.from_entry_func(module, remove_preproc=True)
            ]
            evaluators = {}
            for number, (side, trace) in enumerate(task["traces"].items()):
                schedule = apply_trace(module, json.dumps(trace) if not isinstance(trace, str) else trace)
                lowered = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(schedule.mod)
                path = str(Path(scratch) / f"{len(result)}-{number}.so")
                with target:
                    tvm.build(lowered, target=target).export_library(path)
                library = tvm.runtime.load_module(path)
                evaluators[side] = library.time_evaluator("main", device, number=1, repeat=5, min_repeat_ms=40)
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
