"""The gradient of weighted latency, against a case worked out by hand."""

from __future__ import annotations

import math

import pytest

from tuner_core.allocation.gradient import gain_per_trial


def test_hand_computed_case() -> None:
    # weight 3; baseline 100 us; after four trials 100, 80, 80, 60.  window 2: the last two trials gained 80 - 60 = 20.
    # 3 * (0.2 * 20 / 2 + 0.8 * 60 / 4) = 3 * (2 + 12) = 42
    assert gain_per_trial(3, [100, 100, 80, 80, 60], window=2) == pytest.approx(42.0)


def test_history_shorter_than_the_window_uses_what_there_is() -> None:
    # one trial, 100 -> 90: 2 * (0.2 * 10 / 1 + 0.8 * 90 / 1) = 148
    assert gain_per_trial(2, [100, 90], window=32) == pytest.approx(148.0)


def test_a_task_without_a_trial_comes_first() -> None:
    assert math.isinf(gain_per_trial(1, [100.0]))


def test_called_more_often_gains_more() -> None:
    assert gain_per_trial(4, [10, 8, 8]) == pytest.approx(4 * gain_per_trial(1, [10, 8, 8]))


def test_a_task_that_stands_still_loses_against_one_that_improves() -> None:
    still = [50.0] * 33
    improving = [82.0 - index for index in range(33)]  # ends at 50 as well
    assert gain_per_trial(1, improving) > gain_per_trial(1, still)
