"""Names that ONNX allows and CUDA C++ does not."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tuner_client.model.load import load_model


def test_input_names_become_identifiers_and_are_still_asked_for_by_their_own(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("gpu_0/data 0", TensorProto.FLOAT, ["n", 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Relu", ["gpu_0/data 0"], ["gpu_0_data_0"]),
        helper.make_node("Neg", ["gpu_0_data_0"], ["y"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [out]))
    onnx.save(model, str(tmp_path / "odd.onnx"))
    imported = load_model(tmp_path / "odd.onnx", {"gpu_0/data 0": (2, 4)})
    (parameter,) = imported.module["main"].params
    assert parameter.name == "gpu_0_data_0_"  # the plain name is taken by a tensor of the model
    assert imported.inputs[0][:2] == ("gpu_0/data 0", (2, 4))
