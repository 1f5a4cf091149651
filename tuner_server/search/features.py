"""Points of several design spaces as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuner_server.search.space import DesignSpace, Point

Located = tuple[DesignSpace, Point]
Matrix = np.ndarray[Any, np.dtype[np.float32]]
UNKNOWN = -1
"""Index of a space of which only traces are left: which one of its task's spaces it was is a missing value."""


class FeatureTable:
    """Lays out the features of all spaces of a task in common columns.

    Args:
        spaces: The spaces. Features of equal name share a column; those that a space lacks are missing values.
    """

    def __init__(self, spaces: Sequence[DesignSpace]) -> None:
        names = {name: None for space in spaces for name in space.feature_names}
        self._column = {name: index for index, name in enumerate(names, start=1)}  # the first one says which space
        self._layouts: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        self._width = 1 + len(self._column)

    def covers(self, space: DesignSpace) -> bool:
        """Whether most features of a space, perhaps of another task, have a column here."""
        sources, _ = self._layout(space.feature_names)
        return 4 * len(sources) >= 3 * max(len(space.feature_names), len(self._column))

    def _layout(self, names: tuple[str, ...]) -> tuple[list[int], list[int]]:
        """Which features of a space have a column here, and which."""
        if names not in self._layouts:
            pairs = [(source, self._column[name]) for source, name in enumerate(names) if name in self._column]
            self._layouts[names] = [source for source, _ in pairs], [goal for _, goal in pairs]
        return self._layouts[names]

    def matrix(self, points: Sequence[Located]) -> Matrix:
        """One row per point; of points of another task, the features that have a column here."""
        matrix = np.full((len(points), self._width), np.nan, dtype=np.float32)
        for row, (space, point) in zip(matrix, points, strict=True):
            if space.index != UNKNOWN:
                row[0] = space.index
            sources, goals = self._layout(space.feature_names)
            features = space.features(point)
            row[goals] = features if len(sources) == len(features) else [features[source] for source in sources]
        return matrix
