"""Random arguments for operators and models, and the file in which reference inputs and outputs travel.

Floats are uniform in [0.1, 1), so that divisors and square roots stay valid; integers stay within what the operator
indexes with them. The half-precision inputs of an operator that is checked have signs: a sum of positive terms stops
growing at some 2,000 of them when it is kept in half precision, and would tell right kernels from wrong ones no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ArgsInfo = Sequence[tuple[str, str, tuple[int, ...]]]
Array = np.ndarray[Any, np.dtype[Any]]
_HALVES = ("float16", "bfloat16")
_TERMS = "terms"
_PLAIN_INTEGERS = (1, 5)  # small, and valid as divisors


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type of a TVM type, bfloat16 and the 8-bit floats included.

    Raises:
        ValueError: numpy knows no such type.
    """
    try:
        return np.dtype(dtype)
    except TypeError:
        import ml_dtypes  # registers the types that numpy lacks

        if not hasattr(ml_dtypes, dtype):
            raise ValueError(f"no array can hold the type {dtype}") from None
        return np.dtype(getattr(ml_dtypes, dtype))


def draw_array(rng: np.random.Generator, dtype: str, shape: Sequence[int], index_limit: int | None = None) -> Array:
    """One random array.

    Args:
        rng: Source of randomness.
        dtype: TVM's name of the type.
        shape: Extents.
        index_limit: For integers that the operator indexes with: the first value out of bounds.
    """
    kind = numpy_dtype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, size=tuple(shape)).astype(kind)
    if "int" in dtype:
        low, high = _PLAIN_INTEGERS if index_limit is None else (0, max(1, index_limit))
        return rng.integers(low, high, size=tuple(shape)).astype(kind)
    return rng.uniform(0.1, 1.0, size=tuple(shape)).astype(kind)


def draw_inputs(
    args_info: ArgsInfo,
    outputs: Sequence[int],
    index_limits: Mapping[int, int],
    seed: int,
    attempt: int = 0,
) -> list[Array]:
    """The inputs of an operator, in order: every argument that it does not write.

    Args:
        args_info: As in :class:`tuner_core.model.Workload`.
        outputs: Positions that the operator writes, see :func:`tuner_server.measure.arguments.plan_arguments`.
        index_limits: From the same plan.
        seed: The same seed gives the same values.
        attempt: Another draw for the same seed, when a reference came out with NaN or Inf; only the first has signs.
    """
    rng = np.random.default_rng([seed & 0xFFFFFFFF, attempt])
    return [
        _draw_signed(rng, dtype, shape)
        if dtype in _HALVES and attempt == 0
        else draw_array(rng, dtype, shape, index_limits.get(position))
        for position, (_kind, dtype, shape) in enumerate(args_info)
        if position not in outputs
    ]


def _draw_signed(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Array:
    """Magnitudes in [0.5, 1), which as factors or divisors of channels keep these alike; vectors are positive."""
    values = rng.uniform(0.5, 1.0, size=tuple(shape))
    if sum(extent > 1 for extent in shape) > 1:
        values *= rng.integers(0, 2, size=values.shape) * 2 - 1
    return values.astype(numpy_dtype(dtype))


def fill_pattern(dtype: str, shape: Sequence[int]) -> Array:
    """Cheap contents for an argument that is only timed: a short random block repeated; integers 0, a valid index."""
    count = math.prod(shape)
    kind = numpy_dtype(dtype)
    if "int" in dtype or dtype == "bool":
        return np.zeros(tuple(shape), kind)
    block = np.random.default_rng(0).uniform(0.1, 1.0, size=min(count, 1 << 16)).astype(kind)
    return np.resize(block, count).reshape(tuple(shape))


def draw_model_argument(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Array:
    """A value for an input or a lifted weight of a whole model.

    Weights are normal with variance 2 / fan-in, so that activations keep their scale through rectified layers (He et
    al., arXiv 1502.01852, eq. 10); vectors (biases, scales, variances) are positive, so that ``rsqrt`` and division
    stay valid.
    """
    long_axes = [extent for extent in shape if extent > 1]
    if "float" not in dtype or len(long_axes) < 2:
        return draw_array(rng, dtype, shape, index_limit=1)
    fan_in = max(math.prod(shape[1:]), shape[0])  # dense weights come in both orders
    return (rng.standard_normal(tuple(shape), np.float32) * math.sqrt(2.0 / fan_in)).astype(numpy_dtype(dtype))


def save_reference(path: Path, inputs: Sequence[Array], outputs: Sequence[Array], terms: int = 1) -> None:
    """Write ``in0``.. and ``out0``..; types that numpy lacks are written as their bits.

    Args:
        path: The ``.npz`` file.
        inputs: In order.
        outputs: In order.
        terms: How many values an element of an output sums up.
    """
    arrays = {f"in{index}": array for index, array in enumerate(inputs)}
    arrays |= {f"out{index}": array for index, array in enumerate(outputs)}
    arrays[_TERMS] = np.array(terms)
    np.savez(path, **{name: _bits(array) for name, array in arrays.items()})  # type: ignore[arg-type]


def reference_terms(path: Path) -> int:
    """How many values an element of a reference's outputs sums up, see :func:`save_reference`."""
    with np.load(path, allow_pickle=False) as stored:
        return int(stored[_TERMS]) if _TERMS in stored else 1


def load_reference(path: Path, args_info: ArgsInfo) -> tuple[list[Array], list[Array]]:
    """Read what :func:`save_reference` wrote.

    Args:
        path: The file.
        args_info: Types of the arguments, inputs first.

    Returns:
        Inputs and outputs.

    Raises:
        ValueError: The file does not fit the arguments.
    """
    with np.load(path, allow_pickle=False) as stored:
        names = [f"in{index}" for index in range(len(args_info)) if f"in{index}" in stored]
        names += [f"out{index}" for index in range(len(args_info)) if f"out{index}" in stored]
        if len(names) != len(args_info):
            raise ValueError(f"the reference holds {len(names)} arrays for {len(args_info)} arguments")
        arrays = [
            _as_type(stored[name], dtype, shape) for name, (_kind, dtype, shape) in zip(names, args_info, strict=True)
        ]
    count = sum(name.startswith("in") for name in names)
    return arrays[:count], arrays[count:]


def _bits(array: Array) -> Array:
    return array if array.dtype.isbuiltin == 1 else array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _as_type(array: Array, dtype: str, shape: Sequence[int]) -> Array:
    kind = numpy_dtype(dtype)
    if array.shape != tuple(shape) or array.dtype.itemsize != kind.itemsize:
        raise ValueError(f"the reference holds {array.dtype}{array.shape} where {dtype}{tuple(shape)} belongs")
    return array if array.dtype == kind else array.view(kind)
