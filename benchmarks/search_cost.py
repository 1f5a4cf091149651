"""Core-seconds that the search spends on one candidate for a GPU, by stage and by kind of operator; needs no GPU.

    python benchmarks/search_cost.py [--candidates 64] [--batch 16] [--name search-cost]

Every operator is searched as a server does it: one session each in one process, with their shared experience, batch by
batch, two in flight. Latencies are invented (an inner tile of a middling size is good), since only the search's own
processor time is of interest. Stages exclude each other: what a stage calls that is a stage itself counts there. A
stage's time is divided by the candidates returned, whatever it was spent on: points that came to nothing are paid for
by those that did not. Under three minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results

from tuner_client.model.prepare import ExtractedTask, prepare
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_server.gpu.target import DeviceFacts, cuda_target_json
from tuner_server.search import cost_model, experience, session, sketches, twins, validity
from tuner_server.search.experience import Experience
from tuner_server.search.messages import KnownTrial, SearchSettings

TARGET = cuda_target_json(DeviceFacts("NVIDIA H200", "sm_90", 132, 139 << 30, 1024, 49152, 65536, 60 << 20, 32))
NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI"}

# kind, data type, shapes, attributes of the convolution
OPERATORS: tuple[tuple[str, str, tuple[tuple[int, ...], ...], dict[str, Any]], ...] = (
    ("conv2d", "float32", ((1, 64, 56, 56), (64, 64, 3, 3)), {"padding": (1, 1)}),
    ("conv2d", "float32", ((1, 256, 14, 14), (1024, 256, 1, 1)), {}),
    ("matmul", "float32", ((1024, 1024), (1024, 1024)), {}),
    ("matmul", "float32", ((1, 2048), (2048, 1000)), {}),
    ("depthwise_conv2d", "float32", ((1, 272, 14, 14), (272, 1, 3, 3)), {"padding": (1, 1), "groups": 272}),
    ("depthwise_conv2d", "float32", ((1, 144, 56, 56), (144, 1, 3, 3)), {"padding": (1, 1), "groups": 144}),
    ("conv2d", "float16", ((1, 56, 56, 64), (64, 3, 3, 64)), {"padding": (1, 1), **NHWC}),
    ("conv2d", "float16", ((1, 14, 14, 256), (256, 3, 3, 256)), {"padding": (1, 1), **NHWC}),
    ("conv2d", "float16", ((1, 14, 14, 256), (1024, 1, 1, 256)), dict(NHWC)),
)


class Stopwatch:
    """Processor seconds of this process by stage; a stage within another one stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._stack = ["other"]
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around the work of a stage."""
        self._switch()
        self._stack.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time noted under ``name``."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return run

    def take(self) -> tuple[dict[str, float], Counter[str]]:
        """What was noted since the last time."""
        self._switch()
        noted = dict(self.seconds), self.calls.copy()
        self.seconds.clear()
        self.calls.clear()
        return noted


class _TimedPostproc:
    def __init__(self, postproc: Any, watch: Stopwatch) -> None:
        self._postproc = postproc
        self._name = "postproc " + str(postproc).rsplit(".", 1)[-1].split("(")[0]
        self._watch = watch

    def __str__(self) -> str:
        return str(self._postproc)

    def apply(self, schedule: Any) -> bool:
        with self._watch.stage(self._name):
            return bool(self._postproc.apply(schedule))


def watch_stages(watch: Stopwatch) -> None:
    """Have the search note its stages in a stopwatch, for the rest of this process."""
    from tvm.s_tir.schedule import Trace

    Trace.apply_to_schedule = watch.timed("replay", Trace.apply_to_schedule)
    begin = sketches.Sketches.__init__

    def with_timed_postprocs(self: Any, *args: Any) -> None:
        with watch.stage("design space"):
            begin(self, *args)
        self._postprocs = [_TimedPostproc(postproc, watch) for postproc in self._postprocs]

    sketches.Sketches.__init__ = with_timed_postprocs  # type: ignore[method-assign]
    methods: tuple[tuple[Any, str, str], ...] = (
        (sketches.Sketches, "apply", "schedule objects"),
        (sketches.Sketches, "allows", "arithmetic rejection"),
        (twins.Twins, "has", "twins"),
        (sketches, "trace_json", "traces as JSON"),
        (cost_model.CostModel, "train", "model training"),
        (cost_model.CostModel, "predict", "model scoring"),
        (experience.Experience, "predict", "experience"),
        (validity.ValidityModel, "probability", "validity model"),
        (session, "rank_offspring", "mutation and ranking"),
        (session.SearchSession, "_random_point", "random sampling"),
    )
    for owner, name, stage in methods:
        setattr(owner, name, watch.timed(stage, getattr(owner, name)))


def task_of(kind: str, dtype: str, shapes: Sequence[tuple[int, ...]], attributes: Mapping[str, Any]) -> ExtractedTask:
    """An operator with a ReLU, prepared as those of a model are."""
    from tvm import relax

    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{number}", relax.TensorType(shape, dtype)) for number, shape in enumerate(shapes)]
    product = relax.op.matmul if kind == "matmul" else functools.partial(relax.op.nn.conv2d, **attributes)
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(relax.op.nn.relu(product(*inputs))))
        builder.emit_func_output(result)
    return next(task for task in prepare(builder.get(), TARGET).tasks if task.tunable)


def invented_latency_us(trace: str) -> float:
    """A latency for a trace: each tile costs the more, the further its innermost two factors are from 8."""
    tiles = [value for _, value in json.loads(trace)[1] if isinstance(value, list)]
    return 10.0 * math.exp(sum(abs(math.log2(math.prod(tile[-2:])) - 3) for tile in tiles) / 8)


def search(task: ExtractedTask, candidates: int, batch: int, shared: Experience) -> tuple[int, dict[str, int]]:
    """Search one operator.

    Returns:
        Candidates, and what was tried in vain by reason.
    """
    searched = session.SearchSession(task.workload.body, TARGET, SearchSettings(), 1, (), shared)
    waiting: list[list[str]] = []
    count = 0
    while count < candidates:
        traces = searched.generate(min(batch, candidates - count))
        if not traces:
            break
        count += len(traces)
        waiting.append(traces)
        if len(waiting) > 1:  # two batches are in flight
            searched.report([KnownTrial(trace, invented_latency_us(trace)) for trace in waiting.pop(0)])
    searched.close()
    return count, searched.rejections


def main() -> None:
    """Search all operators, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=64, help="of each operator (default: 64)")
    parser.add_argument("--batch", type=int, default=16, help="(default: 16)")
    parser.add_argument("--name", default="search-cost", help="of the result file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the result file")
    arguments = parser.parse_args()
    machine = results.machine()
    load_tvm(intrinsics=True)
    import xgboost  # noqa: F401  # its import is the process's, not a candidate's

    tasks = [(kind, dtype, task_of(kind, dtype, shapes, attributes)) for kind, dtype, shapes, attributes in OPERATORS]
    watch = Stopwatch()
    watch_stages(watch)
    shared = Experience()
    rows = []
    for kind, dtype, task in tasks:
        watch.take()
        count, rejections = search(task, arguments.candidates, arguments.batch, shared)
        seconds, calls = watch.take()
        total = sum(seconds.values())
        rows.append(
            {
                "operator": kind,
                "dtype": dtype,
                "description": task.workload.description,
                "candidates": count,
                "cpu_s_per_candidate": total / max(1, count),
                "applied_per_candidate": calls["schedule objects"] / max(1, count),
                "rejected": rejections,
                "cpu_s_per_candidate_by_stage": {
                    stage: value / max(1, count) for stage, value in sorted(seconds.items(), key=lambda item: -item[1])
                },
            }
        )
        show(rows[-1])
    print(f"\n{'kind':<28}{'core-s per candidate':>22}")
    for kind, dtype in dict.fromkeys((row["operator"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["operator"], row["dtype"]) == (kind, dtype)]
        print(f"{kind + ' ' + dtype:<28}{sum(r['cpu_s_per_candidate'] for r in mine) / len(mine):>22.3f}")
    path = results.write(
        arguments.name,
        rows,
        device="none; target sm_90",
        driver=None,
        machine_before=machine,
        directory=arguments.results,
        target=json.loads(TARGET),
    )
    print(f"\nwritten to {os.path.relpath(path)}")


def show(row: Mapping[str, Any]) -> None:
    """Print one operator's figures."""
    print(f"\n{row['description']}: {row['candidates']} candidates, {row['cpu_s_per_candidate']:.3f} core-s each,")
    print(f"  {row['applied_per_candidate']:.2f} points applied for each; in vain: {row['rejected'] or 'none'}")
    for stage, seconds in row["cpu_s_per_candidate_by_stage"].items():
        if seconds >= 0.0005:
            print(f"  {stage:<36}{seconds:>8.4f}")


if __name__ == "__main__":
    main()
