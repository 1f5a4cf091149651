"""Which operators a shape filter such as ``1x56x56x64`` means, the same for every backend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tuner_core.errors import UsageError

_SHAPE = re.compile(r"(?:\d{1,9}|\?)(?:x(?:\d{1,9}|\?))*\Z")


def parse_shape(text: str) -> tuple[int | None, ...]:
    """Extents of a shape filter; None stands for any extent.

    Raises:
        UsageError: Not extents joined by ``x``.
    """
    if not _SHAPE.match(text):
        raise UsageError(f"a shape is extents joined by x, ? for any, e.g. 1x56x56x64 or 1x?x?x64, not {text[:60]!r}")
    return tuple(None if part == "?" else int(part) for part in text.split("x"))


def shape_matches(
    wanted: Sequence[int | None], args_info: Iterable[tuple[str, str, Sequence[int]]], description: str
) -> bool:
    """Whether an operator has a shape.

    Args:
        wanted: As :func:`parse_shape` gives it.
        args_info: Of the workload: one ``(kind, dtype, shape)`` per parameter.
        description: Of the workload. Two extents or more also match where it names them as a whole, as ``3x3``.
    """
    if any(_same(wanted, shape) for _, _, shape in args_info):
        return True
    if len(wanted) < 2:
        return False
    extents = "x".join(r"\d+" if extent is None else str(extent) for extent in wanted)
    return re.search(rf"(?<![\w?]){extents}(?![\w?])", description) is not None


def _same(wanted: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(wanted) == len(shape) and all(
        extent is None or extent == found for extent, found in zip(wanted, shape, strict=True)
    )
