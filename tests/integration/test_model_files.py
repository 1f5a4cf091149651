"""Model files: every light model imports; a bad file or shape is one line that says what to do."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.integration.compiler_operators import LLVM
from tests.light_models import TASKS_AND_CALLS, light_model, write_random_model
from tuner_client.model.load import load_model
from tuner_client.model.prepare import parse_target, prepare
from tuner_core.errors import ModelError, TunerError, UsageError

# of all tasks of the light models, read through once: they say what the operators are
DESCRIPTIONS: dict[str, list[str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "light_model_descriptions.json").read_text()
)


def save(path: Path, nodes: list[Any], given: list[int | str] | None, weights: dict[str, Any] | None = None) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(path))
    return path


def problem(path: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    with pytest.raises(TunerError) as caught:
        load_model(path, shapes)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", sorted(TASKS_AND_CALLS))
def test_every_light_model_imports_gives_its_tasks_and_keeps_its_weights(name: str) -> None:
    import tvm

    from tuner_core.compiler.workload import digest_of

    imported = load_model(light_model(name))
    assert imported.inputs[0][1:] == ((1, 3, 224, 224), "float32")
    prepared = prepare(imported.module, LLVM)
    tasks = prepared.tasks
    assert (len(tasks), sum(task.weight for task in tasks)) == TASKS_AND_CALLS[name]
    assert any(task.tunable for task in tasks) and not all(task.tunable for task in tasks)
    digests = {task.workload.digest for task in tasks}
    functions = [f for f in prepared.module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    assert {digest_of(function) for function in functions} == digests, "every function finds its task's record"
    assert not any("unknown" in task.workload.description or "opaque" in task.workload.op for task in tasks)
    assert [task.workload.description for task in tasks] == DESCRIPTIONS[name]
    for task in tasks:
        shapes = [shape for _, _, shape in task.workload.args_info]
        begun = begins(task.workload.op, shapes)
        assert task.workload.description.startswith(f"{task.workload.op} {begun}"), (task.workload.description, shapes)
    sent = [len(base64.b64decode(node["data"])) for node in tensors(prepared.lifted_json)]
    assert sum(sent) < 4096
    assert sum(int(np.prod(weight.shape)) for weight in prepared.weights) > 1_000_000


def begins(op: str, shapes: list[tuple[int, ...]]) -> str:
    """How an operator's description must go on after its name, by the shapes of its arguments alone."""

    def times(extents: tuple[int, ...]) -> str:
        return "x".join(map(str, extents))

    first, second, last = shapes[0], shapes[min(1, len(shapes) - 1)], shapes[-1]
    if op.endswith("conv2d"):
        channels, per_group = first[1], second[1]
        groups = channels // per_group
        kind = "conv2d" if groups == 1 else "depthwise_conv2d" if per_group == 1 else "group_conv2d"
        assert op == kind
        return f"{times(first)} -> {second[0]}, {times(second[2:])}, "
    if op == "dense":
        return f"{times(first)} -> {second[1]}, fp32"
    if "pool" in op:
        return f"{times(first)} -> {times(last[-2:])}, " if op.endswith("2d") else f"{times(first)} -> "
    if op == "softmax":
        return f"{times(last)}, fp32"
    if op == "mean":
        return f"{times(first)} -> {times(last)}, fp32"
    if op == "sum":  # of two tensors, stacked
        return f"2x{times(first)} -> {times(last)}, fp32"
    several = " ".join(times(shape) for shape in shapes[:-1][:3]) + (" ..." if len(shapes) > 4 else "")
    return f"{several} -> {times(last)}, fp32"


def tensors(text: str) -> list[dict[str, Any]]:
    return [node for node in json.loads(text)["nodes"] if node["type"] == "ffi.Tensor"]


def test_weights_do_not_leave_the_client(tmp_path: Path) -> None:
    path = write_random_model("squeezenet", tmp_path, resolution=64)
    prepared = prepare(load_model(path).module, LLVM)
    raw = b"".join(base64.b64decode(node["data"]) for node in tensors(prepared.lifted_json))
    assert len(prepared.weights) == 52
    for weight in prepared.weights:
        values = weight.numpy().tobytes()
        assert values[:64] not in raw
        assert base64.b64encode(values[:48]).decode() not in prepared.lifted_json


def test_missing_file_folder_and_unknown_kind(tmp_path: Path) -> None:
    assert "no such file" in problem(tmp_path / "absent.onnx")
    assert "not a file" in problem(tmp_path)
    other = tmp_path / "model.tflite"
    other.write_bytes(b"x")
    assert ".onnx or .pt2" in problem(other)


@pytest.mark.parametrize("content", [b"", b"this is not a model", b"\x00" * 100, bytes(range(256))])
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert "not an ONNX model" in problem(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_model(tmp_path: Path, part: float) -> None:
    whole = light_model("squeezenet").read_bytes()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[: int(len(whole) * part)])
    assert "truncated" in problem(path) or "not a complete ONNX model" in problem(path)


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Frobnicate", ["x"], ["a"], domain="com.example"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("StringSplit", ["b"], ["y"]),
    ]
    text = problem(save(tmp_path / "m.onnx", nodes, [1, 4]))
    assert "lacks: StringSplit, com.example.Frobnicate" in text and "Relu" not in text


def test_open_shape_is_asked_for_by_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, ["batch", 8], {"w": np.ones((8, 4), "float32")})
    assert "--input-shape x=N,8" in problem(path)
    imported = load_model(path, {"x": (3, 8)})
    assert imported.inputs == (("x", (3, 8), "float32"),)
    assert prepare(imported.module, LLVM).tasks[0].workload.description == "dense 3x8 -> 4, fp32"
    unranked = save(tmp_path / "u.onnx", [helper.make_node("Relu", ["x"], ["y"])], None)
    assert "--input-shape x=" in problem(unranked)


def test_shapes_that_contradict_the_model(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["batch", 8])
    assert "the model has batchx8 for 'x'" in problem(path, {"x": (2, 9)})
    assert "the model has batchx8" in problem(path, {"x": (2, 8, 1)})
    assert "no input 'data'; its inputs: x" in problem(path, {"data": (2, 8)})
    with pytest.raises(UsageError, match="at least 1"):
        load_model(path, {"x": (0, 8)})


def test_external_weights_are_read_and_count_for_the_digest(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = onnx.load(str(save(tmp_path / "in.onnx", nodes, [1, 512], {"w": np.ones((512, 64), "float32")})))
    path = tmp_path / "m.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="m.onnx.data", size_threshold=16)
    data = tmp_path / "m.onnx.data"
    imported = load_model(path)
    assert prepare(imported.module, LLVM).weights[0].numpy().sum() == 512 * 64
    data.write_bytes(np.full((512, 64), 2.0, "float32").tobytes())
    assert load_model(path).digest != imported.digest
    data.unlink()
    assert "external weights of m.onnx" in problem(path)


def test_import_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(light_model("squeezenet"))
    assert capfd.readouterr().out == ""


def test_a_database_in_scope_does_not_change_the_tasks(tmp_path: Path) -> None:
    from tvm.s_tir import Schedule
    from tvm.s_tir import meta_schedule as ms

    from tuner_core.compiler.workload import module_from_body

    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    imported = load_model(save(tmp_path / "m.onnx", nodes, [16, 64], {"w": np.ones((64, 32), "float32")}))
    tasks = prepare(imported.module, LLVM).tasks
    target = parse_target(LLVM)
    database = ms.database.MemoryDatabase()
    module = module_from_body(tasks[0].workload.body)
    schedule = Schedule(module)
    schedule.parallel(schedule.get_loops(schedule.get_sblock("matmul"))[0])
    workload = database.commit_workload(module)
    database.commit_tuning_record(ms.database.TuningRecord(schedule.trace, workload, [1e-6], target))
    with database:
        assert prepare(imported.module, LLVM).tasks == tasks


def test_folding_leaves_the_tasks_that_tvms_own_preparation_gives() -> None:
    from tvm import relax
    from tvm.s_tir import meta_schedule as ms

    from tuner_core.compiler.workload import digest_of

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    names = {name: np.linspace(0.5, 1.5, 8, dtype="float32") for name in "sbmv"}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "m.onnx", nodes, [1, 4, 8, 8], {"w": np.ones((8, 4, 3, 3), "float32"), **names})
        module = load_model(path).module
    ours = {(task.workload.digest, task.weight) for task in prepare(module, LLVM).tasks}
    target = parse_target(LLVM)
    with target:
        stock = relax.transform.CanonicalizeBindings()(relax.transform.DecomposeOpsForInference()(module))
        stock = relax.get_pipeline("zero")(stock)
    theirs = ms.relax_integration.extract_tasks(stock, target)
    assert ours == {(digest_of(task.dispatched[0]), int(task.weight)) for task in theirs}


@pytest.mark.parametrize("text", ["{", "[]", '"llvm"', '{"kind": "no-such-kind"}'])
def test_what_is_no_target_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="not a target"):
        parse_target(text)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_torch_file_without_torch_says_what_to_install() -> None:
    import tempfile
    import zipfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("version", "1")
        assert "pip install 'gpu-autotuner[torch]'" in problem(path)


def test_damaged_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ModelError, match=r"not a torch.export program"):
        load_model(path)
