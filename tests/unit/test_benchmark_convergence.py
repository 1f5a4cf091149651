"""The benchmarks' curve of weighted best latencies, against hand-computed values."""

from __future__ import annotations

from benchmarks.convergence import Sample, time_to_reach, weighted_curve

WEIGHTS = {"conv": 2, "dense": 1}


def test_curve_begins_when_every_task_has_a_latency_and_only_falls() -> None:
    samples = [
        Sample("conv", 1.0, 100.0),
        Sample("conv", 2.0, 80.0),
        Sample("dense", 3.0, 50.0),  # 2 * 80 + 50
        Sample("conv", 4.0, 90.0),  # worse: no entry
        Sample("conv", 5.0, 60.0),  # 2 * 60 + 50
    ]
    assert weighted_curve(samples, WEIGHTS) == [(3.0, 210.0), (5.0, 170.0)]


def test_order_of_samples_does_not_matter() -> None:
    samples = [Sample("dense", 2.0, 10.0), Sample("conv", 1.0, 5.0)]
    assert weighted_curve(samples, WEIGHTS) == weighted_curve(samples[::-1], WEIGHTS) == [(2.0, 20.0)]


def test_time_to_reach_is_the_first_time_at_or_below() -> None:
    curve = [(3.0, 210.0), (5.0, 170.0)]
    assert time_to_reach(curve, 210.0) == 3.0
    assert time_to_reach(curve, 200.0) == 5.0
    assert time_to_reach(curve, 100.0) is None
