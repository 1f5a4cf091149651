"""How much faster servers are together than one, in virtual time: their own state machines at the speed of a GPU."""

from __future__ import annotations

import statistics
from functools import cache

import pytest

from tests.replay.pipeline import Costs
from tests.replay.servers import Spread, spread

SEEDS = range(12)


@cache
def spreads(servers: int, trials: int) -> list[Spread]:
    return [spread(servers, trials, Costs(), seed=seed) for seed in SEEDS]


@pytest.mark.parametrize(("servers", "trials"), [(2, 1000), (4, 2000)])
def test_a_search_is_nearly_so_many_times_as_fast_as_there_are_servers(servers: int, trials: int) -> None:
    assert statistics.mean(one.search for one in spreads(servers, trials)) >= 0.92 * servers


@pytest.mark.parametrize(("servers", "trials"), [(2, 1000), (4, 2000)])
def test_a_job_is_nearly_so_many_times_as_fast_as_there_are_servers(servers: int, trials: int) -> None:
    assert statistics.mean(one.job for one in spreads(servers, trials)) >= 0.92 * servers


def test_the_builds_of_every_server_are_busy_from_the_first_trial_to_the_last() -> None:
    assert statistics.mean(one.busy for one in spreads(2, 1000)) >= 0.9
