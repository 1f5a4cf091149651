"""Rewrites of CUDA source: the same operations in the same order, written with variables."""

from __future__ import annotations

import re

import pytest

from tuner_core.compiler import cuda_source
from tuner_core.compiler.cuda_source import rewritten

HEAD = 'extern "C" __global__ void __launch_bounds__(32) main_kernel(float* __restrict__ out_ptr) {'


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_source, "WORTH_REWRITING", 0)


def kernel(*lines: str, local: str = "  alignas(64) float acc_ptr[2];") -> str:
    shared = "  __shared__ alignas(64) float in_ptr[64];"
    return "\n".join(["#define uint unsigned int", HEAD, local, shared, *lines, "}", ""])


def body(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines()[4:-1]]


def without_names(source: str) -> list[str]:
    """The statements, with what each name stands for in its place."""
    names = dict(re.findall(r"const auto (\w+) = (.*);", source))
    kept = [line for line in body(source) if "const auto" not in line]
    return [re.sub(r"tuner_read_\d+", lambda found: names[found[0]], line) for line in kept]


def test_elements_of_a_local_array_become_variables() -> None:
    source = kernel("  acc_ptr[0] = 0.0f;", "  acc_ptr[1] = (acc_ptr[0] + 1.0f);", "  out_ptr[3] = acc_ptr[1];")
    changed = rewritten(source)
    assert "  float acc_ptr_0, acc_ptr_1;" in changed
    assert body(changed) == ["acc_ptr_0 = 0.0f;", "acc_ptr_1 = (acc_ptr_0 + 1.0f);", "out_ptr[3] = acc_ptr_1;"]


@pytest.mark.parametrize("use", ["acc_ptr[i] = 0.0f;", "*(float2*)(out_ptr + 0) = *(float2*)(acc_ptr + 0);"])
def test_a_function_that_needs_a_local_array_stays_as_it_is(use: str) -> None:
    source = kernel("  acc_ptr[0] = (in_ptr[1] + in_ptr[1]);", f"  {use}")
    assert rewritten(source) == source


def test_a_small_function_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_source, "WORTH_REWRITING", 20)
    source = kernel("  acc_ptr[0] = 0.0f;")
    assert rewritten(source) == source


def test_what_is_read_twice_is_read_once() -> None:
    changed = rewritten(
        kernel(
            "  acc_ptr[0] = (acc_ptr[0] + (in_ptr[(k + 1)] * in_ptr[2]));",
            "  acc_ptr[1] = (acc_ptr[1] + (in_ptr[(k + 1)] * in_ptr[3]));",
        )
    )
    assert body(changed) == [
        "const auto tuner_read_0 = in_ptr[(k + 1)];",
        "acc_ptr_0 = (acc_ptr_0 + (tuner_read_0 * in_ptr[2]));",
        "acc_ptr_1 = (acc_ptr_1 + (tuner_read_0 * in_ptr[3]));",
    ]


@pytest.mark.parametrize(
    "between",
    [
        "in_ptr[(k + 1)] = 0.0f;",
        "in_ptr[7] = acc_ptr[0];",
        "*(float4*)(in_ptr + (k + 4)) = *(float4*)(out_ptr + 0);",
        "k = (k + 1);",
        "__syncthreads();",
        "if (k < 3) {",
        "}",
        "for (int i = 0; i < 8; ++i) {",
        '__asm__ __volatile__("cp.async.wait_group 0;");',
        "acc_ptr[1] = __shfl_down_sync(mask, acc_ptr[1], 16, 32);",
        "int k = 3;",
    ],
)
def test_no_read_is_moved_over_what_may_change_it(between: str) -> None:
    source = kernel("  acc_ptr[0] = in_ptr[(k + 1)];", f"  {between}", "  acc_ptr[1] = in_ptr[(k + 1)];")
    assert "const auto" not in rewritten(kernel("  acc_ptr[0] = in_ptr[(k + 1)];"))
    reads = [line for line in body(rewritten(source)) if "in_ptr[(k + 1)];" in line]
    assert len(reads) == 2
    assert without_names(rewritten(source)) == [
        re.sub(r"acc_ptr\[(\d)\]", r"acc_ptr_\1", line) for line in body(source)
    ]


def test_only_kernels_change() -> None:
    helper = "__device__ float f(float* in_ptr) {\n  alignas(64) float acc_ptr[2];\n  return acc_ptr[0];\n}\n"
    assert rewritten(helper) == helper
    assert rewritten(helper + kernel("  acc_ptr[0] = 0.0f;")).startswith(helper)


@pytest.mark.parametrize("kind", ["uint4", "longlong4", "int2"])
def test_vectors_of_smaller_elements_can_be_made_where_vectors_are(kind: str) -> None:
    source = kernel(f"  {kind} v = make_{kind}({', '.join('abcdefgh')});")
    assert f"{kind} make_{kind}(T v0, T v1, T v2, T v3, T v4, T v5, T v6, T v7)" in rewritten(source)


def test_a_source_without_such_vectors_gets_nothing_in_front() -> None:
    source = kernel("  float4 v = make_float4(1.0f, 2.0f, 3.0f, 4.0f);", local="")
    assert rewritten(source) == source
