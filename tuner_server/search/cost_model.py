"""Predicts how good a point of a design space is, from the trials measured so far.

A gradient-boosted ensemble on the decisions themselves, not on features of the lowered loop nest: extracting those
costs a replay and a lowering of every candidate (10 ms), which a ranking of hundreds of points cannot afford. The
knob features are those of AutoTVM (Chen et al., "Learning to Optimize Tensor Programs", 1805.08166, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tuner_server.search.features import FeatureTable, Located, Matrix
from tuner_server.search.space import DesignSpace, Point

_FAILED = -6.0  # log2 of the score of a failed trial: as if 64 times slower than the best


class CostModel:
    """Trained anew from all trials when asked to; cheap enough for that at a few thousand of them.

    Args:
        table: Features of the task's spaces.
        rounds: Trees.
    """

    def __init__(self, table: FeatureTable, rounds: int) -> None:
        self._table = table
        self._rounds = rounds
        self._booster: Any = None

    @property
    def trained(self) -> bool:
        """Whether :meth:`predict` has anything to say."""
        return self._booster is not None

    def train(self, trials: Sequence[tuple[DesignSpace, Point, float | None]], seed: int) -> None:
        """Fit to measured trials.

        Args:
            trials: Space, point, and median latency in microseconds (None: failed).
            seed: Draws the rows and columns that each tree sees: a new seed is a new opinion.
        """
        import xgboost

        valid = [latency for _, _, latency in trials if latency is not None]
        if not valid:
            return
        best = min(valid)
        labels = np.array(
            [_FAILED if latency is None else max(_FAILED, math.log2(best / latency)) for _, _, latency in trials],
            dtype=np.float32,
        )
        data = xgboost.DMatrix(
            self._table.matrix([(space, point) for space, point, _ in trials]),
            label=labels,
            weight=np.exp2(labels) + 0.1,  # being right about the fast ones matters
            nthread=1,
        )
        parameters = {
            "max_depth": 5,
            "eta": 0.15,
            "min_child_weight": 0.0,
            "subsample": 0.9,
            "colsample_bytree": 0.7,
            "nthread": 1,
            "seed": seed,
            "tree_method": "exact" if len(trials) < 2000 else "hist",
            "base_score": float(np.average(labels)),
            "verbosity": 0,
        }
        self._booster = xgboost.train(parameters, data, num_boost_round=self._rounds)

    def predict(self, points: Sequence[Located]) -> Matrix:
        """Predicted log2 of best latency over latency, one per point: higher is better."""
        import xgboost

        if not points:
            return np.zeros(0, dtype=np.float32)
        return np.asarray(self._booster.predict(xgboost.DMatrix(self._table.matrix(points), nthread=1)))
