"""What the build of a whole CUDA model takes, by part: in one piece, as TVM does it, and as the service does it.

    python benchmarks/model_build.py [--model resnet50] [--rounds 3] [--out DIR]

The model as it comes from a client, its weights lifted, is built for sm_90 without a schedule (dlight for everything)
and with one for each operator that is worth trials, drawn at random by the service's own search. Each build runs in a
process of its own that has TVM loaded, without cubins from before; the two ways take turns. Printed and kept are
medians of wall-clock seconds and core-seconds. Needs no GPU; the cores decide. One to three minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results
from build_variants import TARGET

from tuner_server.processes.child import cpu_s

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from light_model import light_models

PARTS = ("load", "schedule", "compile", "export")
WAYS = ("in one piece", "side by side")
Seconds = dict[str, dict[str, float]]


@contextmanager
def timed(part: str, into: Seconds) -> Iterator[None]:
    """Note wall-clock and processor time of the block."""
    wall, cores = time.monotonic(), cpu_s()
    try:
        yield
    finally:
        into[part] = {"wall_s": time.monotonic() - wall, "core_s": cpu_s() - cores}


def build(module: str, traces: Mapping[str, str], way: str, out: Path) -> Seconds:
    """One build in this process.

    Args:
        module: JSON of the lifted model.
        traces: By workload digest.
        way: One of ``WAYS``.
        out: Library to write.
    """
    from tvm.target import Target

    from tuner_core.compiler import cuda_build, executable, nvrtc
    from tuner_core.compiler.apply import apply_schedules
    from tuner_core.compiler.guard import load_lifted_module

    cuda_build.enable_cuda_builds()
    nvrtc.compile_cubin("__global__ void warm() {}", cuda_build.nvrtc_options(str(TARGET["arch"])))
    if way == "in one piece":
        executable._linked = linked_in_one_piece
    target = Target(TARGET)
    spent: Seconds = {}
    with timed("load", spent):
        loaded = load_lifted_module(module)
    with timed("schedule", spent):
        scheduled, coverage = apply_schedules(loaded, target, traces)
    with timed("compile", spent):
        built = executable.build_executable(scheduled, target, tuned=coverage.tuned, trusted=True)
    with timed("export", spent):
        executable.export_executable(built, out)
    assert len(coverage.tuned) == len(traces), coverage.invalid
    return spent


def linked_in_one_piece(mod: Any, target: Any, *_: Any) -> Any:
    """What ``relax.build`` does after its passes."""
    from tvm import relax
    from tvm.relax import vm_build

    builder = relax.ExecBuilder()
    functions = vm_build._filter_tir(vm_build._vmcodegen(builder, mod))
    return vm_build._vmlink(builder, target, functions)


def in_a_process(function: Callable[[], Seconds]) -> Seconds:
    """Run a function in a fork of this process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    try:
        answer: Seconds = receiver.recv()
    finally:
        process.join()
    return answer


def drawn_traces(tasks: Any) -> dict[str, str]:
    """A random schedule for each operator worth trials, one that can be lowered with all of TVM's passes."""
    from tvm.target import Target

    from tuner_core.compiler.lowering import lower
    from tuner_core.compiler.trace import apply_trace
    from tuner_core.compiler.workload import module_from_body
    from tuner_server.search.messages import SearchSettings
    from tuner_server.search.session import SearchSession

    def lowers(body: str, trace: str) -> bool:
        try:
            with Target(TARGET):
                lower(apply_trace(module_from_body(body), trace).mod, Target(TARGET), all_passes=True)
        except Exception:  # TVM's errors have no common base
            return False
        return True

    drawn: dict[str, str] = {}
    for task in tasks:
        if task.tunable:
            body = task.workload.body
            traces = SearchSession(body, json.dumps(TARGET), SearchSettings(), 0).generate(4)
            drawn[task.workload.digest] = next(trace for trace in traces if lowers(body, trace))
    return drawn


def row_of(model: str, schedules: str, way: str, rounds: list[Seconds]) -> dict[str, Any]:
    """Medians over the rounds."""

    def medians(unit: str) -> dict[str, float]:
        parts = {part: statistics.median(one[part][unit] for one in rounds) for part in PARTS}
        return parts | {"all": statistics.median(sum(one[part][unit] for part in PARTS) for one in rounds)}

    return {
        "model": model,
        "schedules": schedules,
        "way": way,
        "rounds": len(rounds),
        "wall_s": medians("wall_s"),
        "core_s": medians("core_s"),
    }


def main() -> None:
    """Prepare, build in turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a light model of the package onnx (default: resnet50)")
    parser.add_argument("--rounds", type=int, default=3, help="builds of each kind (default: 3)")
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    arguments = parser.parse_args()
    machine = results.machine()

    from tuner_client.model.load import load_model
    from tuner_client.model.prepare import prepare
    from tuner_core.compiler.tvm_setup import leave_torch_out, load_tvm

    leave_torch_out()
    load_tvm(intrinsics=True)
    prepared = prepare(load_model(light_models()[arguments.model]).module, json.dumps(TARGET))
    rows = []
    print(f"{'wall-clock seconds (core-seconds)':<34}" + "".join(f"{name:>15}" for name in (*PARTS, "all")))
    with tempfile.TemporaryDirectory() as folder:
        for schedules, traces in (("untuned", {}), ("tuned", drawn_traces(prepared.tasks))):
            rounds: dict[str, list[Seconds]] = {way: [] for way in WAYS}
            for _ in range(arguments.rounds):
                for way in WAYS:
                    once = functools.partial(build, prepared.lifted_json, traces, way, Path(folder) / "model.so")
                    rounds[way].append(in_a_process(once))
            for way in WAYS:
                row = row_of(arguments.model, schedules, way, rounds[way])
                rows.append(row)
                figures = (f"{row['wall_s'][name]:6.2f} ({row['core_s'][name]:5.2f})" for name in (*PARTS, "all"))
                print(f"{schedules:<10}{way:<24}" + "".join(f"{text:>15}" for text in figures), flush=True)
    print(results.write("model-build", rows, device=str(TARGET["arch"]), driver=None, machine_before=machine,
                        directory=arguments.out, target=TARGET))  # fmt: skip


if __name__ == "__main__":
    main()
