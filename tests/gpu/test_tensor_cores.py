"""A small fp16 model, tuned through ``tuner-server`` and ``tuner-client``, runs on tensor cores and is right."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.integration.client_process import client
from tests.integration.test_layouts import branchy
from tests.integration.test_server_lifecycle import server
from tests.light_models import varied_inputs
from tuner_core.model import Record
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store

TRIALS = 96
CHANNELS, SIZE = 64, 28
RUN = """
import sys
import numpy as np
from tuner_core.compiler.cuda_libraries import load_tvm_cuda_runtime
from tuner_core.compiler.tvm_setup import load_tvm
load_tvm()
load_tvm_cuda_runtime(allow_stub=False)
import tvm
from tvm import relax
device = tvm.cuda(0)
machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), device)
given = np.load(sys.argv[2])
np.save(sys.argv[3], np.stack([machine["main"](tvm.runtime.tensor(x, device)).numpy() for x in given]))
"""


def best_published(folder: Path, job: str) -> dict[str, Record]:
    """The fastest verified record of each convolution."""
    store = open_store(f"sqlite:///{folder / 'records.sqlite'}")
    try:
        records = store.query(RecordFilter(job=job, verified_only=True), limit=1000).records
    finally:
        store.close()
    best: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: record.median_us or 0.0):
        if record.op == "conv2d" and record.median_us is not None:
            best.setdefault(record.description, record)
    return best


@pytest.mark.parametrize("layout", ["auto", "NCHW"])
def test_the_best_schedule_of_an_fp16_convolution_uses_tensor_cores(
    short_dir: Path, four_quarters: tuple[str, ...], layout: str
) -> None:
    folder = short_dir / f"tensor-{layout}"
    folder.mkdir()
    model = branchy(folder, "float16", CHANNELS, SIZE)
    built = folder / "model.so"
    with server(folder / "server", *four_quarters) as running:
        tuned = client(
            *("tune", str(model), "--server", running.address, "--sm-percent", "25", "--trials", str(TRIALS)),
            *("--layout", layout, "--output", str(built), "--json"),
            data_dir=folder,
            timeout_s=400,
        )
        assert tuned.returncode == 0, f"{tuned.stderr}\n{running.log.read_text()[-3000:]}"
        document = json.loads(tuned.stdout)
        assert running.stop(signal.SIGTERM) == 0
    print(json.dumps(document, indent=1))  # pytest -rP shows it
    expected_layout = "NHWC" if layout == "auto" else layout
    assert document["layout"] == expected_layout
    assert document["outputs_match"] is True
    coverage = document["coverage"]
    assert not coverage["invalid"] and not coverage["missing"] and not coverage["passed_over"], coverage
    assert coverage["tuned"] == sum(task["state"] == "tuned" for task in document["tasks"]) >= 1

    best = best_published(folder / "server", document["job"])
    assert best, "no convolution has a verified record"
    for description, record in best.items():
        print(f"{record.median_us:8.2f} us  {description}")
        assert record.layout == expected_layout and expected_layout in description
    if layout == "auto":
        for description, record in best.items():
            assert "wmma_sync_16x16x16" in json.dumps(json.loads(record.trace)[0]), description

    inputs = np.stack([value.astype("float16") for value in varied_inputs((1, CHANNELS, SIZE, SIZE), 3)])
    got, expected = run_on_gpu(folder, built, inputs), on_cpu(model, inputs)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 2e-2 * np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.2 * np.abs(expected).max()  # it depends on its input


def run_on_gpu(folder: Path, built: Path, inputs: np.ndarray) -> np.ndarray:
    """Outputs of a built model, run in a process of its own, as float32."""
    import subprocess
    import sys

    np.save(folder / "inputs.npy", inputs)
    files = [str(built), str(folder / "inputs.npy"), str(folder / "outputs.npy")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "outputs.npy").astype("float32")


def on_cpu(model: Path, inputs: np.ndarray) -> np.ndarray:
    """Outputs of the same model in single precision, by ONNX's own reference implementation."""
    import onnx
    from onnx import TensorProto, numpy_helper
    from onnx.reference import ReferenceEvaluator

    plain = onnx.load(str(model))
    for tensor in plain.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    for value in (*plain.graph.input, *plain.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    evaluator = ReferenceEvaluator(plain)
    return np.stack([evaluator.run(None, {"x": value.astype("float32")})[0] for value in inputs])
