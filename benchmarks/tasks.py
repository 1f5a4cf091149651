"""The operators that both sides of a benchmark tune: a convolution, a depthwise convolution and a dense layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuner_client.model.load import load_model
from tuner_client.model.prepare import ExtractedTask, prepare
from tuner_core.compiler.tvm_setup import load_tvm

MODEL = "shufflenet"
OPERATORS = ("conv2d", "depthwise_conv2d", "dense")


@dataclass(frozen=True)
class BenchTask:
    """One operator.

    Attributes:
        name: Name within its model.
        description: For people.
        weight: How often the model calls it.
        body: Canonical JSON of its workload.
    """

    name: str
    description: str
    weight: int
    body: str

    def document(self) -> dict[str, Any]:
        """As JSON, for the processes that tune and measure it."""
        return asdict(self)


def light_model(name: str) -> Path:
    """Path of a ``light_*.onnx`` model that the package onnx brings along.

    Args:
        name: E.g. ``squeezenet``.
    """
    import onnx

    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"


def extract(target_json: str, operators: Sequence[str] = OPERATORS) -> list[ExtractedTask]:
    """For each kind of operator, the one of :data:`MODEL` that is called most often (the first of those).

    Args:
        target_json: Target to prepare the model for.
        operators: Kinds.
    """
    load_tvm()
    prepared = prepare(load_model(light_model(MODEL), {}).module, target_json)
    chosen = []
    for operator in operators:
        candidates = [task for task in prepared.tasks if task.workload.op == operator and task.tunable]
        if not candidates:
            raise LookupError(f"{MODEL} has no {operator} worth tuning")
        chosen.append(max(candidates, key=lambda task: task.weight))
    return chosen


def bench_tasks(extracted: list[ExtractedTask]) -> list[BenchTask]:
    """The same as plain values."""
    return [BenchTask(task.name, task.workload.description, task.weight, task.workload.body) for task in extracted]
