"""Generations of points, ranked by the cost model; nothing is applied here."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from tuner_server.search.build_cost import BuildCost
from tuner_server.search.cost_model import CostModel
from tuner_server.search.features import Located
from tuner_server.search.messages import SearchSettings
from tuner_server.search.validity import ValidityModel

_SURVIVORS = 32
_LIKELY = 0.5


def rank_offspring(
    parents: Sequence[Located],
    model: CostModel,
    validity: ValidityModel,
    acceptable: Callable[[Located], bool],
    settings: SearchSettings,
    count: int,
    rng: random.Random,
    cost: BuildCost,
) -> list[Located]:
    """Points that the model likes, best first; of those that it likes alike, what is cheap to build.

    Args:
        parents: Where to start from, best first: valid trials, or random points.
        model: Trained.
        validity: What it finds unlikely is left out.
        acceptable: Whether a point is new and within the limits.
        settings: Numbers of proposals and generations.
        count: How many points the caller wants; more are ranked.
        rng: Source of randomness.
        cost: What a point costs to build.
    """
    everyone = parents
    elites = list(parents[: max(16, len(parents) // 8)])
    parents = elites
    scored: dict[Located, float] = {}
    for _ in range(settings.generations):
        proposed = {_offspring(parents, everyone, rng): None for _ in range(settings.proposals)}
        fresh = [located for located in proposed if located not in scored and acceptable(located)]
        likely = validity.probability(fresh)
        fresh = [located for located, probability in zip(fresh, likely, strict=True) if probability >= _LIKELY]
        if not fresh:
            break
        scored.update(zip(fresh, model.predict(fresh).tolist(), strict=True))
        parents = sorted(scored, key=scored.__getitem__, reverse=True)[: max(_SURVIVORS, 2 * count)] + elites[:8]
    worth = {located: score - settings.cost_weight * math.log2(cost(located)) for located, score in scored.items()}
    return _spread(sorted(worth, key=worth.__getitem__, reverse=True), count)


def _spread(ranked: list[Located], count: int) -> list[Located]:
    """Put candidates that differ from a better one in a single knob behind the first ``count`` that do not.

    Neighbours are wrong together: a batch of them teaches little.
    """
    chosen: list[Located] = []
    passed: list[Located] = []
    for index, (space, point) in enumerate(ranked):
        if len(chosen) >= count:
            return chosen + passed + ranked[index:]
        close = any(
            other is space and sum(a != b for a, b in zip(point, chosen_point, strict=True)) < 2
            for other, chosen_point in chosen
        )
        (passed if close else chosen).append((space, point))
    return chosen + passed


def _offspring(parents: Sequence[Located], everyone: Sequence[Located], rng: random.Random) -> Located:
    # the smaller of two draws: better parents have more children
    space, point = parents[min(rng.randrange(len(parents)), rng.randrange(len(parents)))]
    chance = rng.random()
    if chance < 0.15:
        return space, space.redraw(point, rng)
    if chance < 0.35:
        other_space, other = rng.choice(parents)
        if other_space is space:
            return space, space.mutate(space.cross(point, other, rng), rng)
    if chance < 0.45:
        space, point = rng.choice(everyone)
    return space, space.mutate(point, rng)
