"""How much faster servers are together than one, in virtual time: their own state machines at the speed of a GPU."""

from __future__ import annotations

import statistics
from functools import cache

import pytest

from tests.replay.pipeline import Costs
from tests.replay.servers import Spread, spread
from tests.replay.source import replay_tasks

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


@pytest.mark.parametrize("slow_share", [0.05, 0.1, 0.2])
def test_slow_builds_keep_a_shard_of_one_operator_hardly_more_than_a_job_of_the_servers_own(slow_share: float) -> None:
    costs = Costs(slow_share=slow_share)
    found = [spread(1, 400, costs, tasks=replay_tasks(1), seed=seed).search for seed in SEEDS]
    assert statistics.mean(found) >= 0.86
