"""Operator kind and description of a workload, read from its IR.

Names of blocks are a hint only: what an operator is follows from how its heaviest reduction indexes its operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.blocks import Block, Load, computing_blocks, constant_shape

if TYPE_CHECKING:
    from tvm.ir import IRModule

_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_LAYOUTS = {1: ("NCW", "NWC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
_NAMES = {"concat": "concatenate", "squeeze": "reshape", "expand_dims": "reshape", "full": "fill", "pad_temp": "pad"}
_NORMALISATIONS = ("layer_norm", "group_norm", "instance_norm", "rms_norm", "softmax")
_SILENT = frozenset({"element_wise", "full_like"})  # what is left of dropout
_MIN_OPERATIONS = 16384  # multiply-adds below which an operator takes a few microseconds whatever its schedule

CONTRACTIONS = frozenset(
    {"dense", "batch_matmul"}
    | {
        f"{prefix}conv{dims}d{suffix}"
        for dims in (1, 2, 3)
        for prefix in ("", "depthwise_", "group_")
        for suffix in ("", "_transpose")
    }
)


def describe(mod: IRModule) -> tuple[str, str]:
    """Operator kind and one line for people.

    Args:
        mod: A normalised module.

    Returns:
        E.g. ``("conv2d", "conv2d 1x64x56x56 -> 64, 3x3, fp32, NCHW + add + relu")``.
    """
    function = mod["main"]
    blocks = computing_blocks(function)
    parameters = [(parameter, constant_shape(parameter)) for parameter in function.params]
    dtype = _DTYPES.get(str(parameters[-1][0].dtype), str(parameters[-1][0].dtype)) if parameters else ""
    anchor = _anchor(blocks)
    if anchor is None:
        return _element_wise(blocks, parameters, dtype)
    origin = _Origins(blocks, function.params)
    if _is_contraction(anchor):
        op, details = _contraction(anchor, origin)
    else:
        op, details = _reduction(anchor, blocks, parameters, origin)
    after = _names(blocks[blocks.index(anchor) + 1 :]) if op in CONTRACTIONS or "pool" in op else []
    parts = [part for part in (details[0], *details[1:-1], dtype, details[-1]) if part]
    return op, f"{op} {', '.join(parts)}" + "".join(f" + {name}" for name in after)


def worth_trials(mod: IRModule) -> bool:
    """Whether search is likely to pay: a contraction of some size. Everything else takes the fallback schedule.

    Args:
        mod: A normalised module.
    """
    anchor = _anchor(computing_blocks(mod["main"]))
    return anchor is not None and _is_contraction(anchor) and anchor.work >= _MIN_OPERATIONS


def _anchor(blocks: Sequence[Block]) -> Block | None:
    reductions = [block for block in blocks if block.is_reduction]
    return max(reductions, key=lambda block: (_is_contraction(block), block.work), default=None)


def _is_contraction(block: Block) -> bool:
    """A sum over products of two different loads."""
    from tvm import tirx

    value = block.value
    if not block.is_reduction or not isinstance(value, tirx.Add) or len(block.loads) != 2:
        return False
    product = value.b if _is_accumulator(value.a, block) else value.a
    while isinstance(product, tirx.Cast):
        product = product.value
    return isinstance(product, tirx.Mul)


def _is_accumulator(expression: Any, block: Block) -> bool:
    from tvm import ir

    return isinstance(expression, ir.TensorLoad) and bool(expression.source.same_as(block.written))


@dataclass(frozen=True)
class _Window:
    """A dimension in which a kernel slides: the index is ``spatial * stride + reduction * dilation``."""

    dim: int
    spatial: int
    reduction: int
    stride: int
    dilation: int


def _windows(block: Block, load: Load) -> list[_Window]:
    found = []
    for dim, index in enumerate(load.indices):
        axes = block.axes_of(index)
        spatial = [axis for axis in axes if block.spatial[axis]]
        reduction = [axis for axis in axes if not block.spatial[axis]]
        if len(spatial) != 1 or len(reduction) != 1:
            continue
        stride, dilation = block.coefficient(index, spatial[0]), block.coefficient(index, reduction[0])
        if stride and dilation:
            found.append(_Window(dim, spatial[0], reduction[0], stride, dilation))
    return found


def _contraction(block: Block, origin: _Origins) -> tuple[str, list[str]]:
    for data, weights in (block.loads, block.loads[::-1]):
        in_weights = frozenset().union(*(block.axes_of(index) for index in weights.indices))
        windows = [window for window in _windows(block, data) if window.spatial not in in_weights]
        if windows and not _windows(block, weights):
            return _convolution(block, data, weights, windows, origin)
    return _matmul(block)


def _convolution(
    block: Block, data: Load, weights: Load, windows: list[_Window], origin: _Origins
) -> tuple[str, list[str]]:
    slid = {window.spatial for window in windows} | {window.reduction for window in windows}
    in_weights = frozenset().union(*(block.axes_of(index) for index in weights.indices))
    in_data = frozenset().union(*(block.axes_of(index) for index in data.indices))
    channels = [axis for axis in in_weights if block.spatial[axis] and axis not in slid]
    shared = [axis for axis in channels if axis in in_data]
    summed = [axis for axis in in_weights if not block.spatial[axis] and axis not in slid]
    out_channels = math.prod(block.extents[axis] for axis in channels)
    name = f"conv{len(windows)}d"
    groups = ""
    if shared and math.prod(block.extents[axis] for axis in summed) <= 1:
        name = f"depthwise_{name}"
    elif shared:
        name = f"group_{name}"
        per_group = math.prod(block.extents[axis] for axis in summed)
        in_channels = _channels_of(data, windows)
        groups = f"groups {in_channels // per_group}" if per_group and in_channels else ""
    if origin.is_flipped(weights):
        name += "_transpose"
    dims = [window.dim for window in windows]
    last = len(data.indices) - 1
    layout = _LAYOUTS.get(len(windows), ("", ""))[0 if last in dims else 1]
    return name, [
        f"{_times(origin.shape(data))} -> {out_channels}",
        _times(tuple(block.extents[window.reduction] for window in windows)),
        _per_dim("stride", [window.stride for window in windows]),
        _per_dim("dilation", [window.dilation for window in windows]),
        groups,
        layout,
    ]


def _channels_of(data: Load, windows: list[_Window]) -> int:
    dims = {window.dim for window in windows}
    rest = [extent for dim, extent in enumerate(data.shape) if dim not in dims]
    return rest[-1] if rest else 0


def _matmul(block: Block) -> tuple[str, list[str]]:
    left, right = (frozenset().union(*(block.axes_of(index) for index in load.indices)) for load in block.loads)
    spatial = [axis for axis, is_spatial in enumerate(block.spatial) if is_spatial]

    def extent(axes: list[int]) -> int:
        return math.prod(block.extents[axis] for axis in axes)

    batch = extent([axis for axis in spatial if axis in left and axis in right])
    rows = extent([axis for axis in spatial if axis in left and axis not in right])
    columns = extent([axis for axis in spatial if axis in right and axis not in left])
    inner = extent([axis for axis, is_spatial in enumerate(block.spatial) if not is_spatial])
    if batch > 1:
        return "batch_matmul", [f"{batch}x{rows}x{inner} @ {batch}x{inner}x{columns}", ""]
    return "dense", [f"{rows}x{inner} -> {columns}", ""]


def _reduction(
    block: Block, blocks: Sequence[Block], parameters: Sequence[tuple[Any, tuple[int, ...]]], origin: _Origins
) -> tuple[str, list[str]]:
    names = " ".join(other.name for other in blocks)
    calls = [call for other in blocks for call in other.calls()]
    kind = _combiner(block)
    windows = _windows(block, block.loads[0]) if len(block.loads) == 1 else []
    shape = _times(origin.shape(block.loads[0])) if block.loads else ""
    result = _times(parameters[-1][1])
    for normalisation in _NORMALISATIONS:
        if normalisation in names:
            name = "log_softmax" if normalisation == "softmax" and "log" in calls else normalisation
            return name, [result, ""]
    if "adaptive_pool" in block.name or "adaptive_pool" in names:
        return f"adaptive_{'max' if kind == 'max' else 'avg'}_pool2d", [f"{shape} -> {result}", ""]
    if windows:
        dims = [window.dim for window in windows]
        layout = _LAYOUTS.get(len(windows), ("", ""))[0 if len(block.loads[0].indices) - 1 in dims else 1]
        outputs = _times(tuple(block.extents[window.spatial] for window in windows))
        return f"{'max' if kind == 'max' else 'avg'}_pool{len(windows)}d", [
            f"{shape} -> {outputs}",
            _times(tuple(block.extents[window.reduction] for window in windows)),
            _per_dim("stride", [window.stride for window in windows]),
            layout,
        ]
    if "softmax" not in names and kind == "max" and "exp" in calls:
        return "log_softmax" if "log" in calls else "softmax", [result, ""]
    if kind == "sum" and "divide" in names:
        kind = "mean"
    return kind, [f"{shape} -> {result}", ""]


def _combiner(block: Block) -> str:
    from tvm import tirx

    kinds = {tirx.Add: "sum", tirx.Max: "max", tirx.Min: "min", tirx.Mul: "prod"}
    return kinds.get(type(block.value), "reduce")


def _element_wise(
    blocks: Sequence[Block], parameters: Sequence[tuple[Any, tuple[int, ...]]], dtype: str
) -> tuple[str, str]:
    names = _names(blocks) or ["opaque"]
    inputs = " ".join(_times(shape) for _, shape in parameters[:-1][:3]) + (" ..." if len(parameters) > 4 else "")
    result = _times(parameters[-1][1]) if parameters else "()"
    first = names[0]
    rest = "".join(f" + {name}" for name in names[1:])
    return first, f"{first} {inputs} -> {result}, {dtype}{rest}".replace("  ", " ")


def _names(blocks: Sequence[Block]) -> list[str]:
    named = [_name(block) for block in blocks]
    names = [name for name in named if name not in _SILENT] or named
    return [name for number, name in enumerate(names) if number == 0 or name != names[number - 1]]


def _name(block: Block) -> str:
    from tvm import tirx

    value, base = block.value, block.name.rstrip("0123456789").rstrip("_").removeprefix("T_")
    if base in ("compute", "relu", "elemwise"):
        if isinstance(value, tirx.Max | tirx.Min):
            return "clip" if isinstance(value, tirx.Min) or isinstance(value.a, tirx.Min) else "relu"
        calls = block.calls()
        return calls[0] if calls else "element_wise"
    return _NAMES.get(base, base)


class _Origins:
    """Finds the function's parameter that a load's buffer was made from, by padding for example."""

    def __init__(self, blocks: Sequence[Block], parameters: Sequence[Any]) -> None:
        self._blocks = blocks
        self._parameters = list(parameters)

    def shape(self, load: Load) -> tuple[int, ...]:
        """Constant shape of that parameter, or of the buffer itself when several contribute."""
        buffer, shape = load.buffer, load.shape
        for _ in self._blocks:
            if any(buffer.same_as(parameter) for parameter in self._parameters):
                break
            maker = next((block for block in self._blocks if block.written.same_as(buffer)), None)
            if maker is None or maker.is_reduction or len(maker.loads) != 1:
                break
            source = maker.loads[0]
            if len(source.shape) != len(shape):
                break
            buffer, shape = source.buffer, source.shape
        return shape

    def is_flipped(self, load: Load) -> bool:
        """Whether a load's buffer is another one read backwards, as the kernel of a transposed convolution is."""
        maker = next((block for block in self._blocks if block.written.same_as(load.buffer)), None)
        if maker is None:
            return False
        indices = [index for source in maker.loads for index in source.indices]
        return any(maker.coefficient(index, axis) == -1 for index in indices for axis in maker.axes_of(index))


def _times(extents: Sequence[int]) -> str:
    return "x".join(str(extent) if extent else "?" for extent in extents) or "scalar"


def _per_dim(name: str, values: list[int]) -> str:
    if all(value == 1 for value in values):
        return ""
    return f"{name} {values[0]}" if len(set(values)) == 1 else f"{name} {_times(values)}"
