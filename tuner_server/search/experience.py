"""What the tasks of a target have in common: a first opinion for a task that has few trials of its own.

Tile factors mean much the same in one convolution as in the next. Trained on the other 17 convolutions of a SqueezeNet,
16 random trials each, a model ranks the trials of the remaining one with a correlation of 0.6. Used as the global model
under each task's own (Chen et al., "Learning to Optimize Tensor Programs", 1805.08166, section 4).
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tuner_server.search.features import UNKNOWN, FeatureTable, Located, Matrix
from tuner_server.search.messages import Lesson
from tuner_server.search.space import DesignSpace

FAILED = -6.0  # log2 of the score of a failed trial: as if 64 times slower than the best
_MIN_ROWS = 24
_MIN_ROWS_OF_TASK = 6
_MIN_TASKS_OF_PAST = 8  # related ones: with records of four, jobs ended slower than without
_KEPT_TASKS = 64
_KEPT_ROWS_OF_TASK = 96
_ROUNDS = 60
_MIN_LEAF = 5.0  # weight of its trials, 0.1 to 1.1 each: few trials make few leaves, and one lucky trial none


def scores(latencies: Sequence[float | None]) -> Matrix:
    """log2 of the best latency over each latency: 0 is the best, -1 half as fast; failed trials come last."""
    best = min((latency for latency in latencies if latency is not None), default=1.0)
    return np.array(
        [FAILED if latency is None else max(FAILED, math.log2(best / latency)) for latency in latencies],
        dtype=np.float32,
    )


class _Task:
    def __init__(self) -> None:
        self.points: list[Located] = []
        self.latencies: list[float | None] = []

    @property
    def is_past(self) -> bool:
        """Whether only records are left of it."""
        return self.points[0][0].index == UNKNOWN


class Experience:
    """Trials of all tasks of one target in this process."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self._opinions: dict[str, tuple[int, Any]] = {}

    def add(self, task: str, point: Located, latency_us: float | None) -> None:
        """Note a trial.

        Args:
            task: Which task it belongs to.
            point: Its decisions.
            latency_us: Its median latency; None: it failed.
        """
        trials = self._tasks.setdefault(task, _Task())
        self._tasks.move_to_end(task)
        if len(trials.points) < _KEPT_ROWS_OF_TASK:
            trials.points.append(point)
            trials.latencies.append(latency_us)
        while len(self._tasks) > _KEPT_TASKS:
            self._opinions.pop(self._tasks.popitem(last=False)[0], None)

    def learn(self, lessons: Iterable[Lesson]) -> int:
        """Note trials of the past, of which only the records are left; those of tasks that are known already are not.

        They count for a task for which there are some of enough related tasks.

        Returns:
            How many were of use: traces that another tool wrote may have no decisions.
        """
        known = frozenset(self._tasks)
        spaces: dict[str, DesignSpace] = {}
        learned = 0
        for lesson in lessons:
            if lesson.task in known:
                continue
            try:
                trace = json.loads(lesson.trace)
                space = DesignSpace(UNKNOWN, trace)
                space = spaces.setdefault(space.signature, space)
                point = space.point_of(trace)
            except (ValueError, TypeError, LookupError):
                continue
            if point is not None:
                self.add(lesson.task, (space, point), lesson.median_us)
                learned += 1
        return learned

    def predict(self, task: str, table: FeatureTable, matrix: Matrix) -> Matrix | None:
        """Scores of points of a task, by what the others have seen.

        Args:
            task: The task that asks; its own trials are left out.
            table: Its features.
            matrix: Its points, as ``table`` lays them out.

        Returns:
            One per row as from :func:`scores`; None while the others have too little to say.
        """
        others = [
            trials
            for name, trials in self._tasks.items()
            if name != task and len(trials.points) >= _MIN_ROWS_OF_TASK and table.covers(trials.points[0][0])
        ]
        if sum(trials.is_past for trials in others) < _MIN_TASKS_OF_PAST:
            others = [trials for trials in others if not trials.is_past]
        count = sum(len(trials.points) for trials in others)
        if count < _MIN_ROWS:
            return None
        import xgboost

        trained_on, booster = self._opinions.get(task, (0, None))
        if booster is None or count > trained_on * 3 // 2:
            labels = np.concatenate([scores(trials.latencies) for trials in others])
            rows = np.concatenate([table.matrix(trials.points) for trials in others])
            parameters = {
                "max_depth": 4,
                "eta": 0.15,
                "min_child_weight": _MIN_LEAF,
                "subsample": 0.9,
                "colsample_bytree": 0.7,
                "tree_method": "exact" if count < 1000 else "hist",
                "base_score": float(labels.mean()),
                "nthread": 1,
                "seed": 0,
                "verbosity": 0,
            }
            data = xgboost.DMatrix(rows, label=labels, weight=np.exp2(labels) + 0.1, nthread=1)
            booster = xgboost.train(parameters, data, num_boost_round=_ROUNDS)
            self._opinions[task] = (count, booster)
        return np.asarray(booster.predict(xgboost.DMatrix(matrix, nthread=1)))

    def forget_opinion(self, task: str) -> None:
        """Drop what was computed for a task that ended; its trials stay."""
        self._opinions.pop(task, None)
