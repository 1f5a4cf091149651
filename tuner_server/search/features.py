"""Points of several design spaces as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuner_server.search.space import DesignSpace, Point

Located = tuple[DesignSpace, Point]
Matrix = np.ndarray[Any, np.dtype[np.float32]]


class FeatureTable:
    """Lays out the features of all spaces of a task in common columns.

    Args:
        spaces: The spaces. Features of equal name share a column; those that a space lacks are missing values.
    """

    def __init__(self, spaces: Sequence[DesignSpace]) -> None:
        names = {name: None for space in spaces for name in space.feature_names}
        column = {name: index for index, name in enumerate(names, start=1)}  # the first one says which space
        self._columns = {space.index: [column[name] for name in space.feature_names] for space in spaces}
        self._width = 1 + len(column)

    def matrix(self, points: Sequence[Located]) -> Matrix:
        """One row per point."""
        matrix = np.full((len(points), self._width), np.nan, dtype=np.float32)
        for row, (space, point) in zip(matrix, points, strict=True):
            row[0] = space.index
            row[self._columns[space.index]] = space.features(point)
        return matrix
