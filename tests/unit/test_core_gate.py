"""The gate that keeps search and build off the measured cores."""

from __future__ import annotations

import pytest

from tuner_server.measure.gate import CoreGate


class Pool:
    """Counts like a pool of stopped processes would: pausing twice or resuming what runs is an error."""

    def __init__(self) -> None:
        self.paused = False
        self.pauses = 0

    def pause(self) -> None:
        assert not self.paused
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        assert self.paused
        self.paused = False


def test_overlapping_measurements_are_one_pause() -> None:
    pool = Pool()
    gate = CoreGate([pool])
    first, second = gate.measuring(), gate.measuring()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert pool.paused, "resumed while the second measurement was still running"
    second.__exit__(None, None, None)
    assert not pool.paused and pool.pauses == 1


def test_with_spare_cores_only_what_wants_a_quiet_host_pauses() -> None:
    pool = Pool()
    gate = CoreGate([pool], spare=True)
    with gate.measuring():
        assert not pool.paused
        with gate.quiet():
            assert pool.paused
        assert not pool.paused
    assert pool.pauses == 1


def test_a_failing_measurement_opens_the_gate() -> None:
    pool = Pool()
    gate = CoreGate([pool])
    with pytest.raises(RuntimeError), gate.measuring():
        raise RuntimeError
    assert not pool.paused


def test_cores_that_become_spare_during_a_measurement_count_at_once() -> None:
    pool = Pool()
    gate = CoreGate([pool])
    with gate.measuring():
        gate.spare = True
        assert not pool.paused
        gate.spare = False
        assert pool.paused
    assert not pool.paused


def test_a_pool_that_joins_a_closed_gate_stands_still_too() -> None:
    gate = CoreGate()
    late = Pool()
    with gate.quiet():
        gate.add(late)
        assert late.paused
    assert not late.paused
