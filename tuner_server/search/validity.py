"""Learns which points of a space do not survive post-processing, mostly for asking too much of a GPU.

What the arithmetic of :mod:`tuner_server.search.threads` cannot see (shared memory, registers) follows from the same
decisions: a few dozen outcomes teach it, and each point it spares would have cost 10 ms of CPU to apply and lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuner_server.search.features import FeatureTable, Located

_MIN_OUTCOMES = 24
_KEPT = 2000
_ROUNDS = 40


class ValidityModel:
    """A classifier on decisions, trained again when the number of outcomes has grown by a third.

    Args:
        table: Features of the task's spaces.
    """

    def __init__(self, table: FeatureTable) -> None:
        self._table = table
        self._points: list[Located] = []
        self._valid: list[bool] = []
        self._trained_on = 0
        self._booster: Any = None

    def record(self, point: Located, valid: bool) -> None:
        """Learn the outcome of applying a point."""
        self._points.append(point)
        self._valid.append(valid)
        if len(self._points) > _KEPT:
            del self._points[:-_KEPT], self._valid[:-_KEPT]

    def probability(self, points: Sequence[Located]) -> np.ndarray[Any, Any]:
        """Of surviving post-processing, one per point; 1 while every outcome was good or too few are known."""
        self._train()
        if self._booster is None or not points:
            return np.ones(len(points), dtype=np.float32)
        import xgboost

        return np.asarray(self._booster.predict(xgboost.DMatrix(self._table.matrix(points), nthread=1)))

    def _train(self) -> None:
        good = sum(self._valid)
        count = len(self._valid)
        if count < _MIN_OUTCOMES or count < self._trained_on * 4 // 3 or good in (0, count):
            return
        import xgboost

        labels = np.array(self._valid, dtype=np.float32)
        data = xgboost.DMatrix(self._table.matrix(self._points), label=labels, nthread=1)
        parameters = {
            "objective": "binary:logistic",
            "base_score": 0.5,
            "scale_pos_weight": (count - good)
            / good,  # so that 0.5 is the line between them, however rare good ones are
            "max_depth": 5,
            "eta": 0.3,
            "min_child_weight": 0.0,
            "tree_method": "exact",
            "nthread": 1,
            "seed": 0,
            "verbosity": 0,
        }
        self._booster = xgboost.train(parameters, data, num_boost_round=_ROUNDS)
        self._trained_on = count
