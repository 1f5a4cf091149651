"""The benchmarks' curve of weighted best latencies, against hand-computed values."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.convergence import Sample, time_to_reach, time_to_settle, weighted_curve
from benchmarks.distribution import compare, draw, superiority

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


def test_time_to_settle_is_relative_to_the_curves_own_end() -> None:
    curve = [(1.0, 300.0), (3.0, 105.0), (9.0, 100.0)]
    assert time_to_settle(curve, 0.05) == 3.0
    assert time_to_settle(curve, 0.04) == 9.0
    with pytest.raises(ValueError, match="empty"):
        time_to_settle([], 0.05)


def test_superiority_is_the_share_of_pairs_that_are_faster() -> None:
    assert superiority([1.0, 2.0], [2.0, 3.0]) == 3.5 / 4
    assert superiority([5.0], [5.0]) == 0.5
    figures = compare([80.0, 100.0, 300.0], [100.0, 200.0, 400.0])
    assert figures == {
        "median_ratio": 0.5,
        "best_ratio": 0.8,
        "worst_ratio": 0.75,
        "superiority": pytest.approx(6.5 / 9),
    }


def test_every_run_is_a_dot_in_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "folder" / "quality.svg"
    groups = {
        "conv2d <3x3>": {"stock": [10.0, 12.0], "service": [5.0, 11.0]},
        "dense": {"stock": [1.0], "service": [4.0]},
    }
    draw(picture, "five seeds & a GPU", groups)
    text = picture.read_text()
    assert text.count("<circle") == 6
    assert "conv2d &lt;3x3&gt;" in text
    assert "seeds &amp; a GPU" in text


def test_an_ablation_counts_trials_until_its_curve_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import ablations

    figures = {"trials": 4, "seconds": 9.0, "stopped_early": 0, "skipped": 0}

    def run(*curve: tuple[float, float]) -> ablations.Convergence:
        return ablations.Convergence(list(curve), [1.0, 2.0, 3.0, 4.0], curve[-1][1], figures)

    rows, bar_us = ablations.summarise(
        {"on": [run((1.0, 200.0), (2.5, 100.0))] * 3, "off": [run((1.0, 200.0), (3.5, 110.0))] * 3}
    )
    assert bar_us == 105.0
    assert [(row["settled_s"], row["settled_trials"]) for row in rows] == [(2.5, 2), (3.5, 3)]
    assert [(row["bar_s"], row["bar_trials"]) for row in rows] == [(2.5, 2), (None, None)]
