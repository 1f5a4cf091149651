"""What one asks of the measurement workers, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner_core.model import EvaluatorSettings
from tuner_server.measure.correctness import Verdict
from tuner_server.measure.inputs import ArgsInfo
from tuner_server.partitions.interface import Partition


@dataclass(frozen=True)
class MeasureRequest:
    """One candidate to time.

    Attributes:
        artifact: Built shared library with one function ``main``.
        args_info: Its arguments, see :class:`tuner_core.model.Workload`.
        evaluator: How to sample.
        timeout_s: Deadline from the moment a worker gets it; waiting for a worker does not count.
        give_up_above_us: When the first sample is slower than this, the others are not taken.
        sm_percent: Only workers with this share; None: any.
        expected_us: Its latency, as an earlier measurement said; None: unknown.
    """

    artifact: Path
    args_info: ArgsInfo
    evaluator: EvaluatorSettings = field(default_factory=EvaluatorSettings)
    timeout_s: float = 10.0
    give_up_above_us: float | None = None
    sm_percent: int | None = None
    expected_us: float | None = None

    def arguments(self) -> dict[str, Any]:
        """As the worker reads it."""
        return {
            "artifact": str(self.artifact),
            "args_info": [list(info) for info in self.args_info],
            "evaluator": {
                "number": self.evaluator.number,
                "repeat": self.evaluator.repeat,
                "min_repeat_ms": self.evaluator.min_repeat_ms,
            },
            "give_up_above_us": self.give_up_above_us,
        }


@dataclass(frozen=True)
class Measurement:
    """A timed candidate.

    Attributes:
        latencies_us: Samples.
        median_us, ci_low_us, ci_high_us: See :func:`tuner_server.measure.statistics.summarise`.
        neighbours: Most other requests that ran on the device at the same time.
        sm_count: SMs or cores that the worker sees.
        affinity: Cores that it is pinned to.
        partition: Its share.
        gave_up: The first sample was over ``give_up_above_us``, and stayed the only one.
    """

    latencies_us: tuple[float, ...]
    median_us: float
    ci_low_us: float
    ci_high_us: float
    neighbours: int
    sm_count: int
    affinity: tuple[int, ...]
    partition: Partition
    gave_up: bool = False


@dataclass(frozen=True)
class CheckOutcome:
    """Whether an artifact computes what it should.

    Attributes:
        verdict: The verdict.
        max_error: Relative to the scale of the output; None when not finite.
        message: For people; empty on ``ok``.
    """

    verdict: Verdict
    max_error: float | None = None
    message: str = ""


@dataclass(frozen=True)
class ModelMeasurement:
    """Two builds of one model: median latencies, and whether their outputs agree (None: NaN or Inf, no verdict)."""

    baseline_us: float
    tuned_us: float
    outputs_match: bool | None
    rounds: int
    message: str = ""


@dataclass(frozen=True)
class WorkerSnapshot:
    """One worker as it is now. ``state`` is starting, idle, measuring or lost; ``pid`` is 0 without a process."""

    index: int
    device_uuid: str
    kind: str
    sm_percent: int
    sm_count_seen: int
    state: str
    pid: int
    affinity: tuple[int, ...]
