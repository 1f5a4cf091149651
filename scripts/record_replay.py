"""Record the latencies of a real job once, for tests and benchmarks that replay them instead of measuring.

    python scripts/record_replay.py [--trials 320] [--output tests/data/replay-cpu.json.gz]

Tunes a small model of six tunable operators with a real ``tuner-server`` on this machine's CPU and writes, for each
task, its baseline and every trial in the order in which it was measured.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tuner_client import Client, RecordFilter
from tuner_core.model import Origin

FORMAT = "tuner-replay/1"


def write_model(path: Path) -> None:
    """Three convolutions, a depthwise one, two matrix products and what stands between them."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 8).astype("float32"), name)

    weights = [
        weight("k1", 16, 3, 3, 3),
        weight("k2", 32, 16, 3, 3),
        weight("k3", 32, 1, 3, 3),
        weight("k4", 64, 32, 1, 1),
        weight("w1", 64, 128),
        weight("w2", 128, 10),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "k1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "k2"], ["c2"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "k3"], ["c3"], pads=[1, 1, 1, 1], group=32),
        helper.make_node("Conv", ["c3", "k4"], ["c4"]),
        helper.make_node("Relu", ["c4"], ["r4"]),
        helper.make_node("GlobalAveragePool", ["r4"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w1"], ["m1"]),
        helper.make_node("Relu", ["m1"], ["r5"]),
        helper.make_node("MatMul", ["r5", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "replayed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 56, 56])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(path))


def record(trials: int) -> dict[str, object]:
    """Tune, and put what was measured into a document.

    Args:
        trials: Budget of the job.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "replayed.onnx"
        write_model(model)
        with Client(None, data_dir=Path(folder) / "data") as client:
            report = client.tune(model, trials=trials)
            records = list(client.records(RecordFilter(job=report.job, include_failed=True), order="newest"))
    records.sort(key=lambda record: record.created_at)
    searched = [record for record in records if record.origin is Origin.SEARCH and not record.verified]
    span_s = searched[-1].created_at - searched[0].created_at
    return {
        "format": FORMAT,
        "device": report.device_model,
        "cores": report.sm_count,
        "tvm_version": report.tvm_version,
        "date": records[0].created_at,
        "trial_s": round(span_s / max(1, len(searched) - 1), 4),
        "tasks": [
            {
                "description": task.description,
                "weight": task.weight,
                "tunable": bool(task.trials),
                "baseline_us": task.baseline_latency_us,
                "trials": [
                    round(record.median_us, 4) if record.median_us is not None else str(record.failure)
                    for record in searched
                    if record.workload_digest == task.workload
                ],
            }
            for task in report.tasks
        ],
    }


def main() -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=320)
    parser.add_argument("--output", type=Path, default=Path("tests/data/replay-cpu.json.gz"))
    options = parser.parse_args()
    document = json.dumps(record(options.trials), separators=(",", ":")).encode()
    with options.output.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") as packed:
        packed.write(document)
    print(f"wrote {options.output} ({options.output.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
