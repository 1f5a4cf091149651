"""A model's CUDA library that is built on several threads holds what TVM builds in one piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.compiler_operators import conv, prepared
from tests.integration.test_cuda_search import H200
from tests.unit.test_cuda_build import cubins, needs_nvrtc
from tuner_core.compiler.apply import apply_schedules
from tuner_core.compiler.executable import build_executable, export_executable, fed_from_outside

pytestmark = needs_nvrtc


def three_operators(op: Any, x: Any, w: Any) -> Any:
    """A convolution, a softmax and a sum over rows."""
    return op.sum(op.nn.softmax(conv(op, x, w, padding=(1, 1))), axis=1)


def scheduled() -> Any:
    """:func:`three_operators`, with fallback schedules."""
    model = prepared(three_operators, (1, 16, 14, 14), (32, 16, 3, 3), target=H200)
    return apply_schedules(model.module, target(), {})[0]


def target() -> Any:
    from tvm.target import Target

    return Target(json.loads(H200))


def in_one_piece(mod: Any) -> Any:
    """The functions of a module by ``tvm.build``; each is called by its name."""
    import tvm

    functions = {
        var: function.with_attr("global_symbol", var.name_hint)
        for var, function in mod.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    with target(), tvm.transform.PassContext(opt_level=3):
        return tvm.build(tvm.IRModule(functions), target=target())


def machine_code(library: Path) -> dict[str, bytes]:
    """Of each kernel, from the ELF sections ``.text.NAME`` of the cubins."""
    found: dict[str, bytes] = {}
    for cubin in cubins(library.read_bytes()):
        table, count, names = (int.from_bytes(cubin[at : at + n], "little") for at, n in ((40, 8), (60, 2), (62, 2)))

        def number(section: int, at: int, size: int, cubin: bytes = cubin, table: int = table) -> int:
            start = table + 64 * section + at
            return int.from_bytes(cubin[start : start + size], "little")

        for section in range(count):
            start = number(names, 24, 8) + number(section, 0, 4)
            name = cubin[start : cubin.index(b"\0", start)].decode()
            if name.startswith(".text."):
                assert name not in found
                at, size = number(section, 24, 8), number(section, 32, 8)
                found[name.removeprefix(".text.")] = cubin[at : at + size]
    return found


def test_every_kernel_is_the_machine_code_that_one_build_of_all_gives(tmp_path: Path) -> None:
    mod = scheduled()
    built = export_executable(build_executable(mod, target()), tmp_path / "model.so")
    in_one_piece(mod).export_library(str(tmp_path / "whole.so"))
    ours, whole = machine_code(built), machine_code(tmp_path / "whole.so")
    assert len(whole) >= 3
    assert ours == whole
    assert len(list(cubins(built.read_bytes()))) > 1 == len(list(cubins((tmp_path / "whole.so").read_bytes())))

    import tvm

    library = tvm.runtime.load_module(str(built))
    assert all(library.implements_function(name, query_imports=True) for name in whole), "found by name, as calls do"


def test_trusted_arguments_change_no_kernel(tmp_path: Path) -> None:
    mod = scheduled()
    careful = export_executable(build_executable(mod, target()), tmp_path / "careful.so")
    trusting = export_executable(build_executable(mod, target(), trusted=True), tmp_path / "trusting.so")
    assert machine_code(careful) == machine_code(trusting)
    checks = b"device_type"  # of an argument, in the message about it
    assert checks in careful.read_bytes()
    assert checks not in trusting.read_bytes()


def test_a_tuned_kernel_is_the_one_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner_core.compiler import cuda_build, model_library
    from tuner_core.compiler.trace import apply_trace
    from tuner_core.compiler.workload import module_from_body
    from tuner_server.build.compile import compile_module
    from tuner_server.search.messages import SearchSettings
    from tuner_server.search.session import SearchSession

    cuda_build.enable_cuda_builds()
    model = prepared(three_operators, (1, 16, 14, 14), (32, 16, 3, 3), target=H200)
    (task,) = [task for task in model.tasks if task.tunable]
    (trace,) = SearchSession(task.workload.body, H200, SearchSettings(), seed=0).generate(1)
    candidate = apply_trace(module_from_body(task.workload.body), trace).mod
    (measured,) = machine_code(compile_module(candidate, target(), tmp_path / "candidate.so")).values()

    complete = set()
    lower = model_library.lower

    def note(mod: Any, target: Any, *, checks: bool, all_passes: bool) -> Any:
        (name,) = [var.name_hint for var in mod.functions]
        complete.update([name] if all_passes else [])
        return lower(mod, target, checks=checks, all_passes=all_passes)

    monkeypatch.setattr(model_library, "lower", note)
    mod, coverage = apply_schedules(model.module, target(), {task.workload.digest: trace})
    built = export_executable(build_executable(mod, target(), tuned=coverage.tuned), tmp_path / "model.so")
    assert coverage.tuned == (task.name,)
    assert machine_code(built)[f"{task.name}_kernel"] == measured
    assert complete == set(coverage.fallback)


def one_function(name: str, extent: int = 64) -> Any:
    """Adds one to a vector."""
    import tvm.s_tir.dlight as dl
    from tvm import IRModule, te

    a = te.placeholder((extent,), "float32")
    function = te.create_prim_func([a, te.compute((extent,), lambda i: a[i] + 1)])
    with target():
        mod = dl.ApplyDefaultSchedule(dl.gpu.Fallback())(IRModule({"main": function}))
    return mod["main"].with_attr("global_symbol", name)


def test_a_function_with_the_name_of_anothers_kernel_is_built_with_it(tmp_path: Path) -> None:
    from tvm import IRModule

    from tuner_core.compiler.cuda_build import enable_cuda_builds
    from tuner_core.compiler.model_library import build_library

    enable_cuda_builds()
    for names, modules in ((("plus", "more"), 2), (("plus", "plus_kernel"), 1)):
        library = build_library(IRModule({name: one_function(name) for name in names}), target())
        assert len(library.imports) == modules
        assert all(library.implements_function(name) for name in names)
        library.export_library(str(tmp_path / f"{modules}.so"))
        assert len(machine_code(tmp_path / f"{modules}.so")) == 2


def test_a_build_that_fails_on_a_thread_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner_core.compiler import cuda_build
    from tuner_core.errors import TunerError

    def refuse(source: str, arch: str) -> bytes:
        raise TunerError(f"no {arch} today")

    monkeypatch.setattr(cuda_build, "build_cubin", refuse)
    with pytest.raises(TunerError, match="cannot be compiled for cuda: .*no sm_90 today"):
        build_executable(scheduled(), target())


@pytest.mark.parametrize(
    ("compute", "shapes", "fed"),
    [
        (three_operators, [(1, 16, 14, 14), (32, 16, 3, 3)], {"fused_conv2d_relu"}),
        (lambda op, x: op.sum(op.matmul(x, x), axis=0), [(8, 8)], {"matmul"}),
        (lambda op, x: op.sum(op.reshape(x, (8, 8)), axis=0), [(4, 16)], {"sum"}),
        (
            lambda op, x: op.nn.softmax(op.matmul(op.matmul(x, x), op.sum(x, axis=0))),
            [(8, 8)],
            {"matmul", "sum"},
        ),
    ],
)
def test_what_gets_an_argument_of_the_model_is_known(
    compute: Callable[..., Any], shapes: list[tuple[int, ...]], fed: set[str]
) -> None:
    model = prepared(compute, *shapes, target=H200)
    found = fed_from_outside(apply_schedules(model.module, target(), {})[0])
    names = {task.name for task in model.tasks}
    assert found <= names
    assert found == fed, names
