"""What a candidate costs to build, told from its decisions, and how the search minds it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tuner_server.search.build_cost import UnrolledStatements, cheaper
from tuner_server.search.evolution import rank_offspring
from tuner_server.search.features import Located
from tuner_server.search.messages import SearchSettings
from tuner_server.search.space import DesignSpace, Point

# One loop in blocks, virtual threads, threads and two serial levels; a sum in three; a limit of unrolling.
TRACE: list[Any] = [
    [
        ["SamplePerfectTile", ["l1"], [5, 64], ["v0", "v1", "v2", "v3", "v4"]],
        ["Split", ["l1", "v0", "v1", "v2", "v3", "v4"], [True, False], ["s0", "s1", "s2", "s3", "s4"]],
        ["SamplePerfectTile", ["l2"], [3, 64], ["v5", "v6", "v7"]],
        ["Split", ["l2", "v5", "v6", "v7"], [True, False], ["r0", "r1", "r2"]],
        ["Bind", ["s0"], ["blockIdx.x"], []],
        ["Bind", ["s1"], ["vthread.x"], []],
        ["Bind", ["s2"], ["threadIdx.x"], []],
        ["SampleCategorical", [], [[0, 64, 1024], [0.25, 0.25, 0.5]], ["v8"]],
        ["Annotate", ["b0", "v8"], ["meta_schedule.unroll_explicit"], []],
    ],
    [[0, [2, 2, 32, 4, 2]], [2, [16, 4, 8]], [7, 0]],
]


def point(accumulators: int, inner: int, choice: int) -> Point:
    return (1, 2, 32, accumulators // 2, 1), (4, 1, inner), choice


@pytest.mark.parametrize(
    ("accumulators", "inner", "choice", "statements"),
    [
        (16, 8, 2, 4 * 16 + 128),  # 1024 is more than there is
        (16, 8, 1, 4 * 16 + 64),
        (16, 8, 0, 4 * 16 + 32),  # unrolled by the device's compiler
        (4, 2, 2, 2 * 4 + 8),
    ],
)
def test_statements_are_accumulators_and_what_is_unrolled_over_them(
    accumulators: int, inner: int, choice: int, statements: int
) -> None:
    estimate = UnrolledStatements(DesignSpace(0, TRACE), TRACE[0])
    assert estimate.of(point(accumulators, inner, choice)) == statements


def test_a_limit_that_is_no_choice_counts_as_well() -> None:
    trace = [[*TRACE[0][:-2], ["Annotate", ["b0", 64], ["meta_schedule.unroll_explicit"], []]], TRACE[1][:2]]
    estimate = UnrolledStatements(DesignSpace(0, trace), trace[0])
    assert estimate.of(((1, 2, 32, 8, 1), (4, 1, 8))) == 4 * 16 + 64


SPACE = DesignSpace(0, TRACE)
CHEAP, DEAR = (SPACE, point(4, 2, 0)), (SPACE, point(64, 8, 2))


def cost(located: Located) -> float:
    return UnrolledStatements(SPACE, TRACE[0]).of(located[1])


def test_random_points_are_cheap_more_often_but_none_is_left_out() -> None:
    rng = random.Random(0)
    picked = Counter(cheaper([DEAR, CHEAP], cost, rng) for _ in range(400))
    assert picked[CHEAP] > 2 * picked[DEAR]
    assert picked[DEAR] > 20


class Likes:
    """Predicts a fixed score for points of a number of accumulators."""

    def __init__(self, of_dear: float) -> None:
        self.of_dear = of_dear

    def predict(self, points: Sequence[Located]) -> Any:
        return np.array([self.of_dear if located[1] == DEAR[1] else 0.0 for located in points])


class AllValid:
    def probability(self, points: Sequence[Located]) -> Any:
        return np.ones(len(points))


@pytest.mark.parametrize(
    ("weight", "of_dear", "first"),
    [(0.1, 0.05, CHEAP), (0.1, 2.0, DEAR), (0.0, 0.05, DEAR)],
    ids=["alike", "clearly better", "switched off"],
)
def test_of_points_predicted_alike_the_cheap_one_comes_first(
    monkeypatch: pytest.MonkeyPatch, weight: float, of_dear: float, first: Located
) -> None:
    offspring = iter([CHEAP, DEAR] * 10)
    monkeypatch.setattr("tuner_server.search.evolution._offspring", lambda *_: next(offspring))
    settings = SearchSettings(proposals=2, generations=1, cost_weight=weight)
    arguments: Any = ([CHEAP, DEAR], Likes(of_dear), AllValid(), lambda _: True, settings, 2, random.Random(0), cost)
    assert rank_offspring(*arguments) == [first, DEAR if first == CHEAP else CHEAP]
