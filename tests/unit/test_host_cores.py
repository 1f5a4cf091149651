"""How a GPU's host cores are split, and when builds stand still for a measurement."""

from __future__ import annotations

import math

import pytest

from tuner_server.partitions.host import LAUNCH_BOUND_US, CoreSplit, quiet_below_us, split_cores


def adjacent(core: int) -> tuple[int, int]:
    """Two processors to a core, numbered one after the other: 0 and 1 are siblings."""
    return 0, core // 2


def halves(core: int) -> tuple[int, int]:
    """Two processors to a core, of 16: 0 and 8 are siblings."""
    return 0, core % 8


def single(core: int) -> tuple[int, int]:
    """No hyper-threads."""
    return 0, core


@pytest.mark.parametrize(
    ("cores", "workers", "pinned", "rest"),
    [
        (16, 4, ((0,), (1,), (2,), (3,)), 12),
        (16, 8, ((0, 1, 2, 3, 4),) * 8, 11),
        (2, 4, ((0,),) * 4, 1),
        (1, 2, ((),) * 2, 1),
    ],
)
def test_cores_are_divided_between_measurement_and_building(
    cores: int, workers: int, pinned: tuple[tuple[int, ...], ...], rest: int
) -> None:
    split = split_cores(range(cores), workers, single)
    assert split.workers == pinned
    assert len(split.rest) == rest
    assert split.apart is (cores > 1)


@pytest.mark.parametrize("physical", [adjacent, halves])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 8, 20])
def test_no_build_shares_a_physical_core_with_a_worker(physical: type[CoreSplit], workers: int) -> None:
    split = split_cores(range(16), workers, physical)
    assert split.apart
    measuring = {physical(core) for cores in split.workers for core in cores}
    assert measuring.isdisjoint(physical(core) for core in split.rest)
    assert len(split.workers) == workers and all(split.workers)
    assert len(split.rest) >= 10, "builds are what a trial waits for"


def test_a_worker_of_its_own_has_the_whole_physical_core() -> None:
    assert split_cores(range(16), 1, halves) == CoreSplit(
        ((0, 8),), (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15), True
    )


def test_a_single_physical_core_is_shared_and_that_is_said() -> None:
    split = split_cores((3, 4), 1, lambda _core: (0, 0))
    assert split == CoreSplit(((3,),), (4,), False)


def test_builds_stand_still_for_what_a_busy_host_could_disturb() -> None:
    apart, together = split_cores(range(16), 4, single), split_cores((0, 1), 1, lambda _core: (0, 0))
    assert quiet_below_us(apart, "auto") == LAUNCH_BOUND_US
    assert quiet_below_us(together, "auto") == math.inf
    assert quiet_below_us(apart, "always") == math.inf
    assert quiet_below_us(together, "never") == 0
