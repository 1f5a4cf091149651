"""Design spaces as vectors of decisions: what may change, what must hold, what belongs to which space."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest

from tuner_server.search.cost_model import CostModel
from tuner_server.search.features import FeatureTable
from tuner_server.search.space import DesignSpace, Point

# The multi-level tiling of a 96x64 matmul with reduction 32, shortened to what carries decisions.
TRACE: list[Any] = [
    [
        ["GetSBlock", [], ["matmul", "main"], ["b0"]],
        ["GetSBlock", [], ["root", "main"], ["b1"]],
        ["GetLoops", ["b0"], [], ["l2", "l3", "l4"]],
        ["SamplePerfectTile", ["l2"], [4, 64], ["v5", "v6", "v7", "v8"]],
        ["SamplePerfectTile", ["l3"], [4, 16], ["v9", "v10", "v11", "v12"]],
        ["SamplePerfectTile", ["l4"], [2, 64], ["v13", "v14"]],
        ["Annotate", ["b1", 32], ["meta_schedule.parallel"], []],
        ["SampleCategorical", [], [[0, 16, 64, 512], [0.25, 0.25, 0.25, 0.25]], ["v15"]],
        ["Annotate", ["b1", "v15"], ["meta_schedule.unroll_explicit"], []],
        ["SampleComputeLocation", ["b0"], [], ["l16"]],
    ],
    [[3, [4, 4, 2, 3]], [4, [2, 2, 1, 16]], [5, [8, 4]], [7, 2], [9, 3]],
]
POINT: Point = ((4, 4, 2, 3), (2, 2, 1, 16), (8, 4), 32, 2, 3)


@pytest.fixture
def space() -> DesignSpace:
    return DesignSpace(0, TRACE)


def test_the_knobs_of_a_trace_are_its_decisions_and_the_limit_of_parallelism(space: DesignSpace) -> None:
    assert [knob.kind for knob in space.knobs] == ["tile", "tile", "tile", "parallel", "unroll", "location"]
    assert space.point_of(TRACE) == POINT


def test_what_post_processors_append_does_not_change_the_point(space: DesignSpace) -> None:
    longer = copy.deepcopy(TRACE)
    longer[0] += [["EnterPostproc", [], [], []], ["GetSBlock", [], ["root", "main"], ["b17"]]]
    assert space.point_of(longer) == POINT


def test_another_limit_of_parallelism_is_another_point_of_the_same_space(space: DesignSpace) -> None:
    other = copy.deepcopy(TRACE)
    other[0][6][1][1] = 8
    point = space.point_of(other)
    assert point is not None
    assert point[3] == 8


@pytest.mark.parametrize("change", ["instruction", "undecided"])
def test_a_trace_of_another_space_has_no_point(space: DesignSpace, change: str) -> None:
    other = copy.deepcopy(TRACE)
    if change == "instruction":
        other[0][2] = ["GetLoops", ["b1"], [], ["l2", "l3", "l4"]]
    else:
        del other[1][0]
    assert space.point_of(other) is None


def test_mutants_keep_every_loop_extent_and_every_limit(space: DesignSpace) -> None:
    rng = random.Random(0)
    point = POINT
    for step in range(3000):
        point = space.redraw(point, rng) if step % 50 == 0 else space.mutate(point, rng)
        tiles = [value for value in point if isinstance(value, tuple)]
        assert [math.prod(tile) for tile in tiles] == [96, 64, 32]
        assert tiles[1][-1] <= 16
        assert point[3] in (2, 8, 32)
        assert point[4] in range(4)


def test_mutation_reaches_every_knob(space: DesignSpace) -> None:
    rng = random.Random(1)
    changed = set()
    for _ in range(400):
        mutant = space.mutate(POINT, rng)
        changed.update(index for index, value in enumerate(mutant) if value != POINT[index])
    assert changed == set(range(len(space.knobs)))


def test_a_child_takes_each_knob_from_one_of_its_parents(space: DesignSpace) -> None:
    rng = random.Random(2)
    other = space.redraw(POINT, rng)
    child = space.cross(POINT, other, rng)
    assert all(value in pair for value, pair in zip(child, zip(POINT, other, strict=True), strict=True))


def test_features_have_a_name_each_and_differ_between_points(space: DesignSpace) -> None:
    rng = random.Random(3)
    rows = {tuple(space.features(space.redraw(POINT, rng))) for _ in range(50)}
    assert {len(row) for row in rows} == {len(space.feature_names)} == {len(set(space.feature_names))}
    assert len(rows) > 40


def test_the_cost_model_ranks_unseen_points_after_a_few_dozen_trials(space: DesignSpace) -> None:
    def latency(point: Point) -> float:  # wide innermost tiles are fast, as vector code is
        return 1000.0 / (point[1][-1] * (1 + (point[4] == 3)))  # type: ignore[index]

    rng = random.Random(4)
    points = [space.redraw(POINT, rng) for _ in range(120)]
    model = CostModel(FeatureTable([space]), rounds=40)
    model.train([(space, point, latency(point)) for point in points[:60]], seed=0)
    scores = model.predict([(space, point) for point in points[60:]])
    by_score = sorted(zip(scores, points[60:], strict=True), key=lambda pair: -pair[0])
    best_five = [latency(point) for _, point in by_score[:5]]
    assert min(best_five) == min(map(latency, points[60:]))


def test_failed_trials_rank_last(space: DesignSpace) -> None:
    rng = random.Random(5)
    points = [space.redraw(POINT, rng) for _ in range(80)]
    model = CostModel(FeatureTable([space]), rounds=40)
    model.train([(space, point, None if point[4] == 0 else 100.0) for point in points], seed=0)
    base = space.redraw(POINT, rng)
    working, failing = (*base[:4], 2, base[5]), (*base[:4], 0, base[5])
    scores = model.predict([(space, working), (space, failing)])
    assert scores[0] > scores[1]


def test_what_is_learned_in_one_sketch_ranks_points_of_another(space: DesignSpace) -> None:
    trace = copy.deepcopy(TRACE)
    trace[0].insert(9, ["ReverseComputeAt", ["b0", "l2"], [1, -1], []])
    trace[1][-1][0] = 10
    sibling = DesignSpace(1, trace)
    assert sibling.point_of(trace) == POINT
    rng = random.Random(6)
    points = [space.redraw(POINT, rng) for _ in range(80)]
    model = CostModel(FeatureTable([space, sibling]), rounds=40)
    model.train([(space, point, 100.0 / point[1][-1]) for point in points], seed=0)  # type: ignore[index]
    wide, narrow = (4, 1, 1, 16), (16, 4, 1, 1)
    scores = model.predict([(sibling, (POINT[0], tile, *POINT[2:])) for tile in (wide, narrow)])
    assert scores[0] > scores[1]
