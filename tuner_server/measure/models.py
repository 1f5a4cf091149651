"""Two builds of one model, measured in turn on the same inputs and weights. Runs inside a worker."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tuner_server.measure.correctness import MODEL_FACTOR, compare
from tuner_server.measure.inputs import ArgsInfo, Array, draw_model_argument

_FEWEST_ROUNDS = 3


def measure_models(
    baseline: Any,
    tuned: Any,
    device: Any,
    args_info: ArgsInfo,
    *,
    rounds: int,
    budget_s: float,
    seed: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Run both in turn: what disturbs one (heat, a neighbour) disturbs the other.

    Args:
        baseline: Loaded Relax executable; ``main`` takes the model's inputs, then its lifted weights.
        tuned: Another with the same ``main``.
        device: TVM device.
        args_info: Types and shapes of the parameters of ``main``.
        rounds: Timed rounds.
        budget_s: No further round (after three) once this much time has gone.
        seed: Of inputs and weights.
        clock: Seconds.

    Returns:
        ``baseline_us``, ``tuned_us`` (medians), ``rounds``, ``outputs_match`` (None: the baseline's outputs hold NaN
        or Inf), ``message``.
    """
    rng = np.random.default_rng(seed)
    arguments = [
        tvm.runtime.tensor(draw_model_argument(rng, dtype, shape), device) for _kind, dtype, shape in args_info
    ]
    runs = [relax.VirtualMachine(executable, device)["main"] for executable in (baseline, tuned)]
    outputs = [_arrays(run(*arguments)) for run in runs]  # also warms up
    match, message = _agree(outputs[1], outputs[0])
    del outputs
    times_us: tuple[list[float], list[float]] = ([], [])
    start = clock()
    for done in range(rounds):
        if done >= _FEWEST_ROUNDS and clock() - start > budget_s:
            break
        for run, times in zip(runs, times_us, strict=True):
            device.sync()
            before = clock()
            run(*arguments)
            device.sync()
            times.append((clock() - before) * 1e6)
    return {
        "baseline_us": statistics.median(times_us[0]),
        "tuned_us": statistics.median(times_us[1]),
        "rounds": len(times_us[0]),
        "outputs_match": match,
        "message": message,
    }


def _arrays(value: Any) -> list[Array]:
    """The tensors of a result, which may be a nested tuple."""
    if hasattr(value, "numpy"):
        return [value.numpy()]
    return [array for item in value for array in _arrays(item)]


def _agree(tuned: list[Array], baseline: list[Array]) -> tuple[bool | None, str]:
    if len(tuned) != len(baseline) or any(a.shape != b.shape for a, b in zip(tuned, baseline, strict=False)):
        return False, "the two builds return different shapes"
    result = compare(tuned, baseline, factor=MODEL_FACTOR)
    if result.verdict == "inconclusive" or not math.isfinite(sum(float(np.abs(b).sum()) for b in baseline)):
        return None, result.message or "the outputs hold NaN or Inf"
    return result.verdict == "ok", result.message
