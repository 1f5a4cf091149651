"""fp16 convolutions are prepared in the layout that suits tensor cores; the model computes the same as before."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.integration.client_process import client
from tests.integration.compiler_operators import LLVM
from tests.integration.test_applied_schedules import outputs
from tests.integration.test_cuda_search import H200
from tests.light_models import light_model, to_float16, varied_inputs, write_random_model
from tuner_client.model.load import load_model
from tuner_client.model.prepare import Prepared, parse_target, prepare
from tuner_core.compiler.apply import apply_schedules
from tuner_core.compiler.executable import build_executable
from tuner_core.compiler.fallback import fallback_schedule
from tuner_core.compiler.trace import trace_to_json
from tuner_core.compiler.workload import module_from_body
from tuner_core.errors import ModelError, UsageError
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store

CONV_OPS = ("conv2d", "depthwise_conv2d", "group_conv2d")


def write_model(
    folder: Path, nodes: list[onnx.NodeProto], *, dtype: str = "float32", channels: int = 8, size: int = 12
) -> Path:
    """A model with input x and output y, and weights w and w2 (3x3, twice the channels) and s (one per channel)."""
    rng = np.random.default_rng(0)
    wide = 2 * channels
    weights = {
        "w": rng.normal(0, (9 * channels) ** -0.5, (wide, channels, 3, 3)),
        "w2": rng.normal(0, (9 * wide) ** -0.5, (wide, wide, 3, 3)),
        "s": rng.uniform(0.5, 1.5, (wide, 1, 1)),
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, channels, size, size))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value.astype("float32"), name) for name, value in weights.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    if dtype == "float16":
        to_float16(model)
    path = folder / "small.onnx"
    onnx.save(model, str(path))
    return path


def branchy(folder: Path, dtype: str = "float32", channels: int = 8, size: int = 12) -> Path:
    """What stops TVM's conversion when left as it is: a Sum, a Dropout, a constant of lower rank; and a Concat."""
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    return write_model(
        folder,
        [
            helper.make_node("Conv", ["x", "w"], ["a"], **conv),
            helper.make_node("Mul", ["a", "s"], ["b"]),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("Conv", ["c", "w2"], ["d"], **conv),
            helper.make_node("Sum", ["a", "c", "d"], ["e"]),
            helper.make_node("Dropout", ["e"], ["f"]),
            helper.make_node("Concat", ["f", "d"], ["g"], axis=1),
            helper.make_node("AveragePool", ["g"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
        ],
        dtype=dtype,
        channels=channels,
        size=size,
    )


def layouts_of_convolutions(model: Prepared) -> set[str]:
    return {
        layout
        for task in model.tasks
        if task.workload.op in CONV_OPS
        for layout in ("NCHW", "NHWC")
        if layout in task.workload.description
    }


def transposes(model: Prepared) -> int:
    return sum(task.weight for task in model.tasks if "transpose" in task.workload.description)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model("resnet50", tmp_path_factory.mktemp("half"), dtype="float16")


def test_an_fp16_resnet_is_prepared_in_nhwc_from_end_to_end_where_there_are_tensor_cores(half: Path) -> None:
    model = prepare(load_model(half).module, H200)
    assert model.layout == "NHWC"
    assert layouts_of_convolutions(model) == {"NHWC"}
    assert transposes(model) == 2  # of the input, and before the classifier


def test_extraction_and_build_agree_about_a_converted_model(half: Path) -> None:
    import tvm

    target = parse_target(H200)
    extracted = prepare(load_model(half).module, H200)
    traces = {
        task.workload.digest: trace_to_json(fallback_schedule(module_from_body(task.workload.body), target))
        for task in extracted.tasks
    }
    built = prepare(load_model(half).module, H200)
    _, coverage = apply_schedules(built.module, target, traces)
    functions = [function for function in built.module.functions.values() if isinstance(function, tvm.tirx.PrimFunc)]
    assert len(coverage.tuned) == len(functions)
    assert not coverage.fallback and not coverage.unused


def test_other_models_and_targets_keep_the_layout_that_their_files_have(half: Path, tmp_path: Path) -> None:
    fp32 = prepare(load_model(light_model("squeezenet")).module, H200)
    assert fp32.layout == "NCHW" and layouts_of_convolutions(fp32) == {"NCHW"}
    small = branchy(tmp_path, "float16")
    assert prepare(load_model(small).module, LLVM).layout == "NCHW"
    assert prepare(load_model(small).module, H200.replace("sm_90", "sm_61")).layout == "NCHW"
    assert prepare(load_model(small).module, H200, "NCHW").layout == "NCHW"
    assert prepare(load_model(small).module, LLVM, "NHWC").layout == "NHWC"


def test_a_model_without_convolutions_has_no_layout(tmp_path: Path) -> None:
    path = write_model(tmp_path, [helper.make_node("Relu", ["x"], ["y"])])
    assert prepare(load_model(path).module, H200, "NHWC").layout == ""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
def test_a_converted_model_computes_the_same(tmp_path: Path, dtype: str, tolerance: float) -> None:
    path = branchy(tmp_path, dtype)
    inputs = [value.astype(dtype) for value in varied_inputs((1, 8, 12, 12), 2)]
    results = []
    for layout in ("NCHW", "NHWC"):
        model = prepare(load_model(path).module, LLVM, layout)
        assert layouts_of_convolutions(model) == {layout}
        scheduled, _ = apply_schedules(model.module, parse_target(LLVM), {})
        results.append(outputs(build_executable(scheduled, parse_target(LLVM)), inputs))
    assert transposes(model) == 2
    for plain, converted in zip(*results, strict=True):
        assert converted.shape == plain.shape and converted.dtype == plain.dtype
        np.testing.assert_allclose(converted.astype("float32"), plain.astype("float32"), rtol=tolerance, atol=tolerance)
    assert np.abs(results[0][0].astype("float32") - results[0][1].astype("float32")).max() > 10 * tolerance


def test_what_tvm_cannot_convert_keeps_its_layout_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    path = write_model(
        tmp_path,
        [
            helper.make_node("Conv", ["x", "w"], ["a"], **conv),
            helper.make_node("Conv", ["a", "w2"], ["b"], **conv),
            helper.make_node("Max", ["a", "b"], ["y"]),  # imported as a stack, whose layout TVM cannot infer
        ],
        dtype="float16",
    )
    with caplog.at_level(logging.WARNING):
        assert prepare(load_model(path).module, H200).layout == "NCHW"
    assert "keeps its layout" in caplog.text
    with pytest.raises(ModelError, match=r"cannot convert this model to NHWC.*--layout NCHW"):
        prepare(load_model(path).module, H200, "NHWC")


def test_a_job_keeps_its_layout_for_records_and_later_builds(tmp_path: Path) -> None:
    model, watched = branchy(tmp_path), tmp_path / "watched.so"
    tuned = client("tune", str(model), "--layout", "NHWC", "--trials", "2", "--json", data_dir=tmp_path, timeout_s=180)
    assert tuned.returncode == 0, tuned.stderr
    job = json.loads(tuned.stdout)
    assert job["layout"] == "NHWC"
    store = open_store(f"sqlite:///{tmp_path / 'records.sqlite'}")
    try:
        records = store.query(RecordFilter(job=job["job"], include_failed=True), limit=100).records
    finally:
        store.close()
    assert records and {record.layout for record in records} == {"NHWC"}
    built = client(
        *("watch", job["job"], "--output", str(watched), "--model", str(model), "--json"),
        data_dir=tmp_path,
        timeout_s=180,
    )
    assert built.returncode == 0, built.stderr
    coverage = json.loads(built.stdout)["coverage"]
    assert watched.exists() and coverage["operators"] == len(job["tasks"])  # NCHW has fewer


def test_a_layout_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="auto, NCHW, NHWC"):
        prepare(load_model(branchy(tmp_path)).module, LLVM, "NWHC")
