"""Whether a kernel computed the right thing: comparison with a reference, with a tolerance for each type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Verdict = Literal["ok", "wrong_result", "inconclusive"]
Array = np.ndarray[Any, np.dtype[Any]]

# Largest error relative to the output's scale. Schedules reorder sums, which moves a result by some units in the last
# place of the accumulator (2^-24 for float32, 2^-11 for float16) times the root of the number of terms. Sums of half
# precision may be accumulated in half precision: theirs grows with the number of terms, see tolerance().
RELATIVE_TOLERANCE = {
    "float64": 1e-9,
    "float32": 1e-4,
    "float16": 2e-2,
    "bfloat16": 6e-2,
}
_COARSE_FLOAT = 0.2  # 8-bit floats
_LAST_PLACE = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
_ROUNDINGS = 4.0  # simulated for 64 to 25,088 signed terms, one after the other: at most 2.2 times sqrt(terms)
_LOOSEST = 0.25
_TINY = 1e-30
MODEL_FACTOR = 20.0  # errors of one layer pass through the others


@dataclass(frozen=True)
class Comparison:
    """Outcome of a comparison.

    Attributes:
        verdict: ``inconclusive`` when the reference itself holds NaN or Inf.
        max_error: Largest error relative to the scale of the output; Inf for a value that is not finite.
        message: For people; empty on ``ok``.
    """

    verdict: Verdict
    max_error: float
    message: str = ""


def tolerance(dtype: str, terms: int = 1) -> float:
    """Largest acceptable error relative to the output's scale; 0 for integers.

    Args:
        dtype: Of the output.
        terms: How many values each element sums up. Half-precision sums take a rounding for each.
    """
    if "int" in dtype or dtype == "bool":
        return 0.0
    allowed = RELATIVE_TOLERANCE.get(dtype, _COARSE_FLOAT)
    if dtype in _LAST_PLACE:
        allowed = max(allowed, min(_LOOSEST, _ROUNDINGS * math.sqrt(terms) * _LAST_PLACE[dtype]))
    return allowed


def compare(outputs: Sequence[Array], references: Sequence[Array], factor: float = 1.0, terms: int = 1) -> Comparison:
    """Compare all outputs of a kernel.

    The error of an element is taken relative to the larger of its reference and the mean magnitude of the whole
    reference: elements that cancel to almost nothing do not fail a kernel, and a large element does not hide a wrong
    small one.

    Args:
        outputs: What the kernel wrote.
        references: What it should have written, same shapes and types.
        factor: Multiplies the tolerance.
        terms: How many values an element sums up, see :func:`tolerance`.
    """
    worst = 0.0
    for index, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        name = reference.dtype.name
        got, expected = output.astype(np.float64), reference.astype(np.float64)
        if not np.isfinite(expected).all():
            return Comparison("inconclusive", worst, f"the reference of output {index} holds NaN or Inf")
        if not np.isfinite(got).all():
            return Comparison("wrong_result", float("inf"), f"output {index} holds NaN or Inf, its reference does not")
        if expected.size == 0:
            continue
        scale = np.maximum(np.abs(expected), max(float(np.abs(expected).mean()), _TINY))
        error = float((np.abs(got - expected) / scale).max())
        worst = max(worst, error)
        allowed = tolerance(name, terms) * factor
        if error > allowed:
            return Comparison(
                "wrong_result",
                worst,
                f"output {index} ({name}) is off by {error:.3g} of its scale, allowed: {allowed:g}",
            )
    return Comparison("ok", worst)
