"""What operators are fed with and how their outputs are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.compiler_operators import LLVM, heaviest
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import module_from_body
from tuner_server.measure.argument_cache import ArgumentCache
from tuner_server.measure.arguments import plan_arguments
from tuner_server.measure.correctness import compare
from tuner_server.measure.inputs import (
    draw_inputs,
    draw_model_argument,
    fill_pattern,
    load_reference,
    reference_terms,
    save_reference,
)


@pytest.fixture(scope="module")
def tvm() -> Any:
    load_tvm()
    import tvm

    return tvm


def legalised(tvm: Any, shapes: dict[str, tuple[tuple[int, ...], str]], body: Any) -> dict[str, Any]:
    """The PrimFuncs, as modules with one ``main``, that Relax makes of an expression."""
    from tvm import relax

    tensor = relax.TensorType if hasattr(relax, "TensorType") else relax.TensorStructInfo
    params = [relax.Var(name, tensor(shape, dtype)) for name, (shape, dtype) in shapes.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(body(relax, *params)))
        builder.emit_func_output(out)
    mod = relax.transform.LegalizeOps()(builder.get())
    mod = tvm.transform.Sequential(
        [relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps(), relax.transform.FuseTIR()]
    )(mod)
    return {
        var.name_hint: tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        for var, function in mod.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }


def test_indices_stay_below_the_extent_that_they_index(tvm: Any) -> None:
    table, ids = ((100, 16), "float32"), ((8,), "int64")
    mods = legalised(tvm, {"table": table, "ids": ids}, lambda relax, t, i: relax.op.take(t, i, axis=0))
    (mod,) = mods.values()
    plan = plan_arguments(mod)
    assert plan.outputs == (2,)
    assert plan.index_limits == {1: 100}
    args = (("TENSOR", "float32", (100, 16)), ("TENSOR", "int64", (8,)), ("TENSOR", "float32", (8, 16)))
    drawn = np.concatenate([draw_inputs(args, plan.outputs, plan.index_limits, seed)[1] for seed in range(50)])
    assert drawn.min() >= 0 and drawn.max() < 100
    assert len(np.unique(drawn)) > 50


def test_indices_are_followed_through_casts_and_reshapes(tvm: Any) -> None:
    def body(relax: Any, table: Any, ids: Any) -> Any:
        return relax.op.take(table, relax.op.reshape(relax.op.astype(ids, "int64"), (8,)), axis=0)

    mods = legalised(tvm, {"table": ((7, 4), "float32"), "ids": ((2, 4), "int32")}, body)
    assert any(plan_arguments(mod).index_limits.get(position) == 7 for mod in mods.values() for position in (0, 1))


def test_integers_that_index_nothing_have_no_limit_and_may_divide(tvm: Any) -> None:
    operand = ((4, 4), "int32")
    mods = legalised(tvm, {"a": operand, "b": operand}, lambda relax, a, b: relax.op.floor_divide(a, b))
    (mod,) = mods.values()
    plan = plan_arguments(mod)
    assert plan.outputs == (2,) and plan.index_limits == {}
    args = (("TENSOR", "int32", (4, 4)),) * 3
    assert min(array.min() for seed in range(20) for array in draw_inputs(args, plan.outputs, {}, seed)) >= 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_floats_are_uniform_between_a_tenth_and_one(dtype: str) -> None:
    args = (("TENSOR", dtype, (40, 50)),) * 2
    (drawn,) = draw_inputs(args, (1,), {}, seed=5, attempt=1)
    values = drawn.astype(np.float64)
    assert drawn.dtype.name == dtype
    assert values.min() >= 0.0999 and values.max() <= 1.0
    assert abs(values.mean() - 0.55) < 0.03


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_signs_at_first_but_not_in_vectors(dtype: str) -> None:
    args = (("TENSOR", dtype, (40, 50)), ("TENSOR", dtype, (1, 50)), ("TENSOR", dtype, (40, 50)))
    matrix, vector = (drawn.astype(np.float64) for drawn in draw_inputs(args, (2,), {}, seed=5))
    assert abs(matrix.mean()) < 0.1 and np.abs(matrix).min() >= 0.5 and np.abs(matrix).max() <= 1.0
    assert vector.min() >= 0.5  # a variance, perhaps


def test_a_seed_repeats_and_another_attempt_differs() -> None:
    args = (("TENSOR", "float32", (8,)),) * 2
    first, same, other, redrawn = (
        draw_inputs(args, (1,), {}, seed, attempt)[0] for seed, attempt in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert (first == same).all()
    assert (first != other).any() and (first != redrawn).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_a_reference_survives_its_file(dtype: str, tmp_path: Path) -> None:
    args = (("TENSOR", dtype, (3, 5)),) * 2
    (given_input,) = draw_inputs(args, (1,), {}, seed=0)
    save_reference(tmp_path / "r.npz", [given_input], [given_input[::-1].copy()])
    inputs, outputs = load_reference(tmp_path / "r.npz", args)
    assert inputs[0].dtype == given_input.dtype
    assert (inputs[0] == given_input).all() and (outputs[0] == given_input[::-1]).all()
    with pytest.raises(ValueError, match="belongs"):
        load_reference(tmp_path / "r.npz", (("TENSOR", dtype, (5, 3)),) * 2)
    with pytest.raises(ValueError, match="2 arrays for 3 arguments"):
        load_reference(tmp_path / "r.npz", (*args, args[0]))


def test_weights_keep_activations_finite_through_many_layers() -> None:
    rng = np.random.default_rng(0)
    value = draw_model_argument(rng, "float32", (1, 256)).astype(np.float64)
    value = np.abs(value)
    for _ in range(60):
        weight = draw_model_argument(rng, "float32", (256, 256))
        bias = draw_model_argument(rng, "float32", (256,))
        assert bias.min() > 0  # it may be a variance
        value = np.maximum(value @ weight, 0)
    assert 1e-3 < value.std() < 1e3


def test_the_argument_buffers_that_a_worker_keeps_are_bounded(tvm: Any) -> None:
    cache = ArgumentCache(tvm.cpu(0), limit_bytes=10_000)

    def info(count: int) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        return (("TENSOR", "float32", (count,)),)

    first = cache.get(info(1000))
    assert cache.get(info(1000))[0] is first[0], "buffers are not reused"
    cache.get(info(1200))
    cache.get(info(1000))
    assert cache.held_bytes == 8800
    cache.get(info(500))  # does not fit beside both: the one not used for longest goes
    assert cache.held_bytes == 6000
    assert cache.get(info(1000))[0] is first[0]
    assert cache.get(info(100_000))[0].shape[0] == 100_000  # larger than the limit, still served
    assert cache.held_bytes == 400_000
    cache.get(info(10))
    assert cache.held_bytes == 40


def test_timed_arguments_are_valid_for_any_operator() -> None:
    assert (fill_pattern("int64", (4, 4)) == 0).all()
    floats = fill_pattern("float16", (300, 700)).astype(np.float64)
    assert floats.min() >= 0.0999 and floats.max() <= 1.0


# Comparison


def test_a_reordered_sum_is_right_and_a_missing_term_is_wrong() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(0.1, 1, (64, 4608)).astype("float32") for _ in range(2))
    expected = a @ b.T
    reordered = sum((a[:, i::7] @ b[:, i::7].T for i in range(7)), np.zeros_like(expected))
    assert compare([reordered], [expected]).verdict == "ok"
    missing = a[:, :-2] @ b[:, :-2].T
    assert compare([missing], [expected]).verdict == "wrong_result"


def half_sums(a: np.ndarray, b: np.ndarray, step: int) -> np.ndarray:
    """Products of rows, kept in half precision; a tensor core adds 16 before it rounds."""
    total = np.zeros(len(a), "float16")
    for at in range(0, a.shape[1], step):
        part = a[:, at : at + step].astype("float32") * b[:, at : at + step].astype("float32")
        total = (total.astype("float32") + part.sum(1)).astype("float16")
    return total


@pytest.mark.parametrize("terms", [576, 4608])
def test_long_sums_kept_in_half_precision_are_right_and_a_missing_tile_is_wrong(terms: int) -> None:
    info = [("TENSOR", "float16", (4096, terms)), ("TENSOR", "float16", (4096, terms)), ("TENSOR", "float16", (4096,))]
    a, b = draw_inputs(info, [2], {}, seed=1)
    expected = (a.astype("float32") * b.astype("float32")).sum(1).astype("float16")
    for step in (1, 16):
        assert compare([half_sums(a, b, step)], [expected], terms=terms).verdict == "ok"
    missing = half_sums(a[:, :-16], b[:, :-16], 16)
    assert compare([missing], [expected], terms=terms).verdict == "wrong_result"


def test_the_reference_of_a_half_precision_sum_is_exact_and_says_how_long_it_is(tmp_path: Path) -> None:
    task = heaviest(lambda op, a, b: op.matmul(a, b), (4, 3000), (3000, 8), dtype="float16", target=LLVM)
    info = task.workload.args_info
    from tuner_server.build.reference import write_reference

    write_reference(module_from_body(task.workload.body), info, 3, tmp_path / "r.npz")
    (a, b), (written,) = load_reference(tmp_path / "r.npz", info)
    assert written.dtype == np.float16
    np.testing.assert_allclose(written, a.astype("float64") @ b.astype("float64"), rtol=2**-10)
    assert reference_terms(tmp_path / "r.npz") == 3000


def test_one_wrong_element_among_many_is_wrong() -> None:
    expected = np.linspace(0.1, 1.0, 10_000, dtype="float32")
    wrong = expected.copy()
    wrong[4321] *= 1.01
    result = compare([expected, wrong], [expected, expected])
    assert result.verdict == "wrong_result"
    assert "output 1 (float32)" in result.message


def test_a_large_element_does_not_hide_a_wrong_small_one() -> None:
    expected = np.ones(1000, "float32")
    expected[0] = 1e4
    wrong = expected.copy()
    wrong[1] = 1.1
    assert compare([wrong], [expected]).verdict == "wrong_result"


def test_elements_that_cancel_are_judged_by_the_scale_of_the_output() -> None:
    expected = np.array([1.0, -1.0, 1e-9, 2.0], "float32")
    assert compare([expected + np.float32(1e-6)], [expected]).verdict == "ok"


def test_integers_must_be_equal() -> None:
    expected = np.arange(100, dtype="int32")
    assert compare([expected.copy()], [expected]).verdict == "ok"
    assert compare([expected + (expected == 50)], [expected]).verdict == "wrong_result"


@given(st.sampled_from(["float32", "float16"]), st.integers(0, 2**31))
def test_noise_of_the_last_place_is_right_in_every_type(dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    expected = rng.standard_normal(200).astype(dtype)
    noise = 1 + rng.uniform(-2, 2, 200) * np.finfo(dtype).eps
    assert compare([(expected * noise).astype(dtype)], [expected]).verdict == "ok"
