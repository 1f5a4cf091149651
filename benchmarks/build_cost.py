"""Core-seconds that a CUDA candidate's build takes, by stage. Needs no GPU.

    python benchmarks/build_cost.py [--candidates 8] [--operators 3x3 ...] [--out DIR]

Candidates of a 3x3 and a 1x1 convolution, a matrix product, a depthwise convolution and a convolution in half
precision, drawn by the service's own search: with the cost of a build in mind, and without. Half of them are a job's
first batch, drawn at random; half are ranked by the cost model after the first half has come back with stand-ins for
latencies, which like 64 accumulators and 256 threads whatever the build costs. Every candidate is built in this
process: as the service builds it, and, in turns, with all of TVM's passes, the source as TVM writes it, and a library
with host code in place of the file of a kernel. Three to five minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import results
from build_variants import TARGET, quantiles
from tasks import plain_workloads

from tuner_core.model import Workload
from tuner_server.processes.child import cpu_s
from tuner_server.processes.heap import keep_freed_memory

ARCH = str(TARGET["arch"])
STAGES = ("replay", "lowering", "code", "nvrtc", "file")
BEFORE = {"lowering": "lowering, all passes", "nvrtc": "nvrtc, as written", "file": "library"}
"""Stages that differ, with the name of what takes their place in the comparison."""


@dataclass
class Costs:
    """Core-seconds of one candidate by stage; ``failed`` when it cannot be built, or has too many statements."""

    seconds: dict[str, float] = field(default_factory=dict)
    statements: int = 0
    failed: bool = False

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the processor time of the block."""
        start = cpu_s()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + cpu_s() - start

    @property
    def total(self) -> float:
        """As the service builds it."""
        return sum(self.seconds.get(stage, 0.0) for stage in STAGES)

    @property
    def before(self) -> float:
        """With all passes, the source as it was written, and host code."""
        return sum(self.seconds.get(BEFORE.get(stage, stage), 0.0) for stage in STAGES)


def operators() -> dict[str, Workload]:
    """Five operators by name."""
    three, one, product = plain_workloads()
    import tvm
    from tvm import te, topi

    from tuner_core.compiler.workload import workload_from_module

    def workload(inputs: list[Any], compute: Callable[..., Any]) -> Workload:
        function = te.create_prim_func([*inputs, compute(*inputs)]).with_attr("global_symbol", "main")
        return workload_from_module(tvm.IRModule({"main": function}))

    image, filters = te.placeholder((1, 128, 56, 56), "float32"), te.placeholder((128, 1, 3, 3), "float32")
    half, weight = te.placeholder((1, 14, 14, 256), "float16"), te.placeholder((3, 3, 256, 256), "float16")
    return {
        "conv2d 3x3": three,
        "conv2d 1x1": one,
        "matmul": product,
        "depthwise": workload(
            [image, filters], lambda x, w: topi.nn.depthwise_conv2d_nchw(x, w, 1, 1, 1, out_dtype="float32")
        ),
        "conv2d fp16": workload([half, weight], lambda x, w: topi.nn.conv2d_nhwc(x, w, 1, 1, 1, out_dtype="float16")),
    }


def stand_in_us(trace: str) -> float:
    """A latency for a candidate that nobody has measured: best at 64 accumulators and 256 threads."""
    from tuner_server.search.tiling import bound_loops

    instructions, decisions = json.loads(trace)
    chosen = dict(decisions)
    sampled = {
        output: chosen[position][level]
        for position, (kind, _inputs, _attrs, outputs) in enumerate(instructions)
        if kind == "SamplePerfectTile" and len(outputs) > 3
        for level, output in enumerate(outputs)
    }
    bound = bound_loops(instructions)
    threads = accumulators = 1
    for kind, inputs, _attrs, outputs in instructions:
        for loop, factor in zip(outputs, inputs[1:], strict=True) if kind == "Split" else ():
            if isinstance(factor, str) and factor in sampled:
                if bound.get(loop, "vthread").startswith("vthread"):
                    accumulators *= sampled[factor]
                elif bound[loop].startswith("threadIdx"):
                    threads *= sampled[factor]
    return 100.0 * 2 ** (abs(math.log2(accumulators / 64)) + abs(math.log2(threads / 256)))


def all_passes(mod: Any, target: Any) -> Any:
    """The lowering without the passes that :func:`tuner_core.compiler.lowering.lower` leaves out of TVM's, but CSE."""
    import tvm
    from tvm import tirx
    from tvm.target import Target
    from tvm.tirx.build import split_host_device_mods

    pipeline, finalize_host, finalize_device = tirx.get_default_tir_pipeline(target)
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        mod = tirx.transform.SkipAssert()(pipeline(tirx.transform.BindTarget(target.with_host(Target("llvm")))(mod)))
    host, devices = split_host_device_mods(mod)
    return finalize_host()(host), {kind: finalize_device()(device) for kind, device in devices.items()}


def build(body: str, trace: str, folder: Path, number: int) -> Costs:
    """Build one candidate in both ways."""
    import tvm_ffi
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
    from tvm.target import Target
    from tvm.tirx.build import codegen_build

    from tuner_core.compiler import cuda_build, nvrtc
    from tuner_core.compiler.cuda_source import rewritten
    from tuner_core.compiler.kernel_call import write_kernel
    from tuner_core.compiler.lowering import lower_parts
    from tuner_core.compiler.trace import apply_trace
    from tuner_server.build.link import link_shared

    costs, cubin = Costs(), b""
    options = cuda_build.nvrtc_options(ARCH)

    def callback(source: str) -> bytes:
        costs.statements = source.count(";")
        if costs.statements > cuda_build.MAX_STATEMENTS:
            raise cuda_build.SourceTooLargeError(f"{costs.statements} statements")
        light = cuda_build.light_source(source) or source

        def new() -> bytes:
            with costs.timed("nvrtc"):
                return nvrtc.compile_cubin(rewritten(light), options)

        def old() -> bytes:
            with costs.timed(BEFORE["nvrtc"]):
                try:
                    return nvrtc.compile_cubin(light, options)
                except nvrtc.CudaCompileError:  # eight halves side by side: CUDA has no such vector
                    return b""

        nonlocal cubin
        first, second = (new, old) if number % 2 else (old, new)
        cubin = max(first(), second(), key=len)
        return cubin

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", callback, override=True)
    target = Target(TARGET)
    with target:
        with costs.timed("replay"):
            mod = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(apply_trace(_module(body), trace).mod)
        with costs.timed(BEFORE["lowering"]):
            all_passes(mod, target)
        with costs.timed("lowering"):
            lowered = lower_parts(mod, target)
        try:
            with costs.timed("code"):
                modules = [codegen_build(functions, device) for device, functions in lowered.devices.items()]
        except Exception as error:  # NVRTC's comes out of TVM as a RuntimeError
            costs.failed = True
            print(f"  not built: {str(error).strip().splitlines()[-1][:100]}")
            return costs
        finally:  # the compiler runs inside
            costs.seconds["code"] -= costs.seconds.get("nvrtc", 0.0) + costs.seconds.get(BEFORE["nvrtc"], 0.0)
    with costs.timed("library"), target, tempfile.TemporaryDirectory(dir=folder) as workspace:
        library: Any = codegen_build(lowered.host_functions(), lowered.host)
        for module in modules:
            library.import_module(module)
        library.export_library(str(folder / "candidate.so"), fcompile=link_shared, workspace_dir=workspace)
    if lowered.call is None:
        costs.seconds["file"] = costs.seconds["library"]
    else:
        with costs.timed("file"):
            write_kernel(folder / "candidate.kernel", lowered.call, cubin)
    return costs


@functools.lru_cache
def _module(body: str) -> Any:
    from tuner_core.compiler.guard import load_workload

    return load_workload(body)


def draw(task: Workload, count: int, weight: float) -> tuple[list[tuple[str, list[str]]], float]:
    """Candidates of a first batch and of one that the cost model has ranked, and the search's core-seconds for one."""
    from tuner_server.search.messages import KnownTrial, SearchSettings
    from tuner_server.search.session import SearchSession

    session = SearchSession(task.body, json.dumps(TARGET), SearchSettings(cost_weight=weight), 0)
    start = time.process_time()
    first = session.generate(max(count, SearchSettings().random_first))
    session.report([KnownTrial(trace, stand_in_us(trace)) for trace in first])
    ranked = session.generate(count)
    spent = time.process_time() - start
    return [("random", first[:count]), ("ranked", ranked)], spent / max(1, len(first) + len(ranked))


def row_of(operator: str, choice: str, batch: str, costs: list[Costs]) -> dict[str, Any]:
    """Figures of a group of candidates; those that failed count with what they took until then."""
    names = [*STAGES, *BEFORE.values()]
    return {
        "operator": operator,
        "choice": choice,
        "batch": batch,
        "candidates": len(costs),
        "failed": sum(one.failed for one in costs),
        "statements": quantiles([float(one.statements) for one in costs]),
        "core_s": quantiles([one.total for one in costs]),
        "core_s_before": quantiles([one.before for one in costs]),
        "stages": {name: sum(one.seconds.get(name, 0.0) for one in costs) / len(costs) for name in names},
    }


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    stages = row["stages"]
    print(
        f"{row['operator']:<12} {row['choice']:<9} {row['batch']:<7} {row['candidates']:3d}  "
        f"{row['core_s_before']['mean']:6.3f} {row['core_s']['mean']:6.3f} {row['core_s']['p50']:6.3f} "
        f"{row['core_s']['p90']:6.3f} {row['core_s']['max']:6.3f}   "
        + " ".join(f"{stages[name]:6.3f}" for name in (*STAGES, *BEFORE.values())),
        flush=True,
    )


def main() -> None:
    """Draw, build, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=8, help="of each group (default: 8)")
    parser.add_argument("--operators", nargs="*", default=[""], help="parts of the names of those wanted")
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    arguments = parser.parse_args()
    machine = results.machine()

    from tuner_core.compiler.tvm_setup import leave_torch_out

    leave_torch_out()
    tasks = operators()
    from tuner_core.compiler import cuda_build, nvrtc
    from tuner_server.search.messages import SearchSettings

    keep_freed_memory()
    cuda_build.enable_cuda_builds()
    nvrtc.compile_cubin("__global__ void warm() {}", cuda_build.nvrtc_options(ARCH))  # loading it is not counted
    rows: list[dict[str, Any]] = []
    print("core-seconds per candidate                 before   mean    p50    p90    max   " + " ".join(
        f"{name[:6]:>6}" for name in (*STAGES, "all", "written")))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, task in tasks.items():
            if not any(part in name for part in arguments.operators):
                continue
            for choice, weight in (("any", 0.0), ("cheap", SearchSettings().cost_weight)):
                groups, search_s = draw(task, arguments.candidates, weight)
                for batch, traces in groups:
                    if not traces:
                        continue
                    costs = [build(task.body, trace, Path(folder), at) for at, trace in enumerate(traces)]
                    rows.append({**row_of(name, choice, batch, costs), "search_core_s": search_s})
                    print_row(rows[-1])
    print(results.write("build-cost", rows, device=ARCH, driver=None, machine_before=machine,
                        directory=arguments.out, target=TARGET))  # fmt: skip


if __name__ == "__main__":
    main()
