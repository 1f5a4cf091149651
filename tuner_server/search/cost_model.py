"""Predicts how good a point of a design space is, from the trials measured so far.

A gradient-boosted ensemble on the decisions themselves, not on features of the lowered loop nest: extracting those
costs a replay and a lowering of every candidate (10 ms), which a ranking of hundreds of points cannot afford. The
knob features are those of AutoTVM (Chen et al., "Learning to Optimize Tensor Programs", 1805.08166, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuner_server.search.experience import Experience, scores
from tuner_server.search.features import FeatureTable, Located, Matrix
from tuner_server.search.space import DesignSpace, Point

_MIN_TRIALS = 8
_BELIEVED = 8  # trials of one's own that it takes to doubt the opinion of other tasks by half
_FLAT = 1e-6  # variance of an opinion that tells no trials apart


class CostModel:
    """Trained anew from all trials when asked to; cheap enough for that at a few thousand of them.

    Args:
        table: Features of the task's spaces.
        rounds: Trees.
        experience: What other tasks have seen; the model learns how this task differs from it.
        task: This task's name in ``experience``.
    """

    def __init__(self, table: FeatureTable, rounds: int, experience: Experience | None = None, task: str = "") -> None:
        self._table = table
        self._rounds = rounds
        self._experience = experience
        self._task = task
        self._booster: Any = None
        self._share = 1.0  # of the other tasks' opinion in a prediction
        self._shift = 0.0

    @property
    def ready(self) -> bool:
        """Whether :meth:`predict` has anything to say."""
        return self._booster is not None or self._opinion(self._table.matrix([])) is not None

    def _opinion(self, matrix: Matrix) -> Matrix | None:
        return None if self._experience is None else self._experience.predict(self._task, self._table, matrix)

    def train(self, trials: Sequence[tuple[DesignSpace, Point, float | None]], seed: int) -> None:
        """Fit to measured trials; a few are not enough, and leave the model as it was.

        Args:
            trials: Space, point, and median latency in microseconds (None: failed).
            seed: Draws the rows and columns that each tree sees: a new seed is a new opinion.
        """
        import xgboost

        if len(trials) < _MIN_TRIALS or all(latency is None for _, _, latency in trials):
            return
        labels = scores([latency for _, _, latency in trials])
        weights = (np.exp2(labels) + 0.1).astype(np.float32)  # being right about the fast ones matters
        matrix = self._table.matrix([(space, point) for space, point, _ in trials])
        opinion = self._opinion(matrix)
        self._share = 0.0 if opinion is None else _worth(opinion, labels, weights)
        margin = self._margin(opinion, len(matrix))
        self._shift = float(np.average(labels - margin, weights=weights))
        data = xgboost.DMatrix(matrix, label=labels, weight=weights, base_margin=margin + self._shift, nthread=1)
        parameters = {
            "max_depth": 5,
            "eta": 0.15,
            "min_child_weight": 0.0,
            "subsample": 0.9,
            "colsample_bytree": 0.7,
            "nthread": 1,
            "seed": seed,
            "tree_method": "exact" if len(trials) < 1000 else "hist",
            "verbosity": 0,
        }
        self._booster = xgboost.train(parameters, data, num_boost_round=self._rounds)

    def predict(self, points: Sequence[Located]) -> Matrix:
        """Predicted log2 of best latency over latency, one per point: higher is better."""
        import xgboost

        if not points:
            return np.zeros(0, dtype=np.float32)
        matrix = self._table.matrix(points)
        margin = self._margin(self._opinion(matrix) if self._share else None, len(matrix)) + self._shift
        if self._booster is None:
            return margin
        return np.asarray(self._booster.predict(xgboost.DMatrix(matrix, base_margin=margin, nthread=1)))

    def _margin(self, opinion: Matrix | None, rows: int) -> Matrix:
        """The other tasks' opinion, scaled by what it is still worth."""
        return np.zeros(rows, dtype=np.float32) if opinion is None else self._share * opinion


def _worth(opinion: Matrix, labels: Matrix, weights: Matrix) -> float:
    """How much of an opinion has come true: the slope of the labels on it, from 0 to 1, and 1 before there are any.

    A weighted least-squares slope, shrunk towards 1 as if by so many more trials that bore the opinion out.
    """
    deviation = opinion - np.average(opinion, weights=weights)
    variance = np.average(deviation**2, weights=weights)
    if variance < _FLAT:
        return 1.0
    slope = np.average(deviation * labels, weights=weights) / variance
    return float(np.clip((len(labels) * slope + _BELIEVED) / (len(labels) + _BELIEVED), 0.0, 1.0))
