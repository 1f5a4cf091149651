"""The summary of latency samples, against known cases and by simulation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner_server.measure.statistics import summarise

latencies = st.lists(st.floats(min_value=0.1, max_value=1e7), min_size=1, max_size=60)


def test_three_samples_give_their_range_and_say_what_that_is_worth() -> None:
    summary = summarise([30.0, 10.0, 20.0])
    assert (summary.median_us, summary.ci_low_us, summary.ci_high_us) == (20.0, 10.0, 30.0)
    assert summary.coverage == pytest.approx(0.75)


@pytest.mark.parametrize(("count", "rank", "coverage"), [(6, 1, 0.96875), (10, 2, 0.97852), (20, 6, 0.95861)])
def test_the_order_statistics_are_those_of_the_published_tables(count: int, rank: int, coverage: float) -> None:
    summary = summarise([float(value) for value in range(1, count + 1)])
    assert (summary.ci_low_us, summary.ci_high_us) == (rank, count + 1 - rank)
    assert summary.coverage == pytest.approx(coverage, abs=1e-4)


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(2000):
        summary = summarise([rng.lognormvariate(0.0, 1.0) for _ in range(15)])  # median 1, far from normal
        covered += summary.ci_low_us <= 1.0 <= summary.ci_high_us
    assert 0.95 <= covered / 2000 <= 0.985  # 0.9648 in theory


@given(latencies)
def test_the_median_lies_in_its_interval_and_the_interval_in_the_samples(samples: list[float]) -> None:
    summary = summarise(samples)
    assert min(samples) <= summary.ci_low_us <= summary.median_us <= summary.ci_high_us <= max(samples)


def test_no_sample_has_no_summary() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarise([])
