"""What one task teaches another."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable

import numpy as np

from tests.unit.test_search_space import POINT, TRACE
from tuner_server.search.cost_model import CostModel
from tuner_server.search.experience import FAILED, Experience, scores
from tuner_server.search.features import UNKNOWN, FeatureTable
from tuner_server.search.messages import Lesson
from tuner_server.search.space import DesignSpace, Point

NARROW: Point = (POINT[0], (16, 4, 1, 1), *POINT[2:])
WIDE: Point = (POINT[0], (4, 1, 1, 16), *POINT[2:])


def latency(point: Point) -> float:
    return 100.0 / point[1][-1]  # type: ignore[index,operator]


def teach(experience: Experience, task: str, space: DesignSpace, trials: int = 40) -> None:
    rng = random.Random(task)
    for _ in range(trials):
        point = space.redraw(POINT, rng)
        experience.add(task, (space, point), latency(point))


def test_scores_are_relative_to_the_best_and_failures_come_last() -> None:
    np.testing.assert_allclose(scores([10.0, 20.0, None, 5.0]), [-1.0, -2.0, FAILED, 0.0])
    assert scores([None]).tolist() == [FAILED]


def test_a_task_without_trials_ranks_by_what_others_have_seen() -> None:
    experience = Experience()
    teach(experience, "other", DesignSpace(0, TRACE))
    own = DesignSpace(0, TRACE)
    model = CostModel(FeatureTable([own]), 40, experience, "own")
    assert model.ready
    wide, narrow = model.predict([(own, WIDE), (own, NARROW)])
    assert wide > narrow


def test_nobody_else_s_opinion_is_no_opinion() -> None:
    experience = Experience()
    space = DesignSpace(0, TRACE)
    assert not CostModel(FeatureTable([space]), 40, experience, "own").ready
    teach(experience, "own", space)
    assert not CostModel(FeatureTable([space]), 40, experience, "own").ready


def test_an_operator_of_another_kind_teaches_nothing() -> None:
    other = copy.deepcopy(TRACE)
    for position in (3, 4):
        other[0][position][2][0] = 3  # tiles of three levels
        other[1][position - 3][1] = other[1][position - 3][1][:3]
    experience = Experience()
    space = DesignSpace(0, other)
    point = space.point_of(other)
    assert point is not None
    for _ in range(60):
        experience.add("other", (space, point), 1.0)
    assert not CostModel(FeatureTable([DesignSpace(0, TRACE)]), 40, experience, "own").ready


def test_own_trials_overrule_what_others_have_seen() -> None:
    experience = Experience()
    teach(experience, "other", DesignSpace(0, TRACE))
    own = DesignSpace(0, TRACE)
    model = CostModel(FeatureTable([own]), 40, experience, "own")
    rng = random.Random(1)
    points = [own.redraw(POINT, rng) for _ in range(60)]
    model.train([(own, point, 1000.0 / latency(point)) for point in points], seed=0)  # the other way round
    wide, narrow = model.predict([(own, WIDE), (own, NARROW)])
    assert narrow > wide


def test_an_opinion_counts_as_far_as_it_comes_true() -> None:
    experience = Experience()
    teach(experience, "other", DesignSpace(0, TRACE))
    own = DesignSpace(0, TRACE)
    rng = random.Random(1)
    points = [own.redraw(POINT, rng) for _ in range(200)]

    def spread(outcome: Callable[[Point], float]) -> float:
        model = CostModel(FeatureTable([own]), 0, experience, "own")  # no trees of its own
        model.train([(own, point, outcome(point)) for point in points], seed=0)
        return float(np.ptp(model.predict([(own, WIDE), (own, NARROW)])))

    untrained = CostModel(FeatureTable([own]), 0, experience, "own").predict([(own, WIDE), (own, NARROW)])
    assert spread(latency) > 0.9 * np.ptp(untrained)  # still, after 200 trials
    assert spread(lambda point: rng.uniform(10.0, 100.0)) < 0.3 * np.ptp(untrained)
    assert spread(lambda point: 1000.0 / latency(point)) == 0.0


def test_a_single_good_trial_of_others_is_no_pattern() -> None:
    def opinion(good: int) -> float:
        experience = Experience()
        space = DesignSpace(0, TRACE)
        rng = random.Random(3)
        for number in range(80):
            fast = number < good
            experience.add("other", (space, WIDE if fast else space.redraw(NARROW, rng)), 6.0 if fast else 100.0)
        wide, narrow = CostModel(FeatureTable([space]), 40, experience, "own").predict([(space, WIDE), (space, NARROW)])
        return float(wide - narrow)

    assert opinion(1) < 1.5 < 2.0 < opinion(8)  # powers of two; it was 16 times as fast


def test_which_space_a_lesson_was_of_is_not_made_up() -> None:
    table = FeatureTable([DesignSpace(0, TRACE), DesignSpace(1, TRACE)])
    first, second, unknown = table.matrix([(DesignSpace(index, TRACE), POINT) for index in (0, 1, UNKNOWN)])
    assert (first[0], second[0]) == (0.0, 1.0)
    assert np.isnan(unknown[0])
    np.testing.assert_array_equal(first[1:], unknown[1:])


def of_the_past(tasks: int) -> list[Lesson]:
    lessons = []
    rng = random.Random(7)
    space = DesignSpace(0, TRACE)
    for number in range(12 * tasks):
        point = space.redraw(POINT, rng)
        trace = copy.deepcopy(TRACE)
        trace[1] = [
            [knob.position, list(value) if isinstance(value, tuple) else value]
            for knob, value in zip(space.knobs, point, strict=True)
            if knob.kind != "parallel"
        ]
        lessons.append(Lesson(f"past {number % tasks}", json.dumps(trace), latency(point)))
    return lessons


def test_records_of_the_past_teach_without_their_workloads() -> None:
    lessons = of_the_past(tasks=8)
    experience = Experience()
    assert experience.learn([*lessons, Lesson("odd", "[[],[]", 1.0), Lesson("odder", "3", None)]) == 96
    assert experience.learn(lessons) == 0  # a second time teaches nothing
    own = DesignSpace(0, TRACE)
    wide, narrow = CostModel(FeatureTable([own]), 40, experience, "own").predict([(own, WIDE), (own, NARROW)])
    assert wide > narrow


def test_records_of_few_tasks_teach_nothing() -> None:
    experience = Experience()
    assert experience.learn(of_the_past(tasks=7)) == 84
    own = DesignSpace(0, TRACE)
    assert not CostModel(FeatureTable([own]), 40, experience, "own").ready
    teach(experience, "of the same job", own)
    assert CostModel(FeatureTable([own]), 40, experience, "own").ready
