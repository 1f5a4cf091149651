"""Which jobs run side by side, which wait, and when a device is divided anew."""

from __future__ import annotations

import random

import pytest

from tuner_server.lanes.floor import Floor, Grant, Wish


def granted(floor: Floor) -> dict[str, tuple[tuple[str, ...], bool]]:
    return {grant.wish.job: (grant.devices, grant.configured) for grant in floor.grants()}


def offered(job: str, share: int, *devices: str) -> Wish:
    return Wish(job, share, devices or ("gpu",), on_offer=True)


def odd(job: str, share: int, *devices: str) -> Wish:
    return Wish(job, share, devices or ("gpu",), on_offer=False)


def test_jobs_of_different_shares_run_side_by_side_and_those_of_one_share_one_after_the_other() -> None:
    floor = Floor({"gpu": (50, 25, 25)})
    for wish in (offered("a", 50), offered("b", 25), offered("c", 50), offered("d", 25)):
        floor.ask(wish)
    assert granted(floor) == {"a": (("gpu",), True), "b": (("gpu",), True)}
    floor.leave("b")
    assert granted(floor) == {"d": (("gpu",), True)}
    floor.leave("a")
    assert granted(floor) == {"c": (("gpu",), True)}


def test_a_job_runs_on_all_devices_that_have_its_share() -> None:
    floor = Floor({"a": (50, 25), "b": (25, 25), "c": (50,)})
    floor.ask(offered("quarter", 25, "a", "b"))
    floor.ask(offered("half", 50, "a", "c"))
    assert granted(floor) == {"quarter": (("a", "b"), True), "half": (("a", "c"), True)}


def test_a_share_that_is_not_on_offer_waits_for_a_free_device_and_later_jobs_wait_behind_it() -> None:
    floor = Floor({"gpu": (50, 25, 25)})
    floor.ask(offered("first", 50))
    assert granted(floor) == {"first": (("gpu",), True)}
    floor.ask(odd("odd", 30))
    floor.ask(offered("later", 25))
    assert granted(floor) == {}, "a later job would keep the device from ever becoming free"
    floor.leave("first")
    assert granted(floor) == {"odd": (("gpu",), False)}
    floor.leave("odd")
    assert granted(floor) == {"later": (("gpu",), True)}, "it goes back to its configuration"


def test_one_free_device_is_enough_for_a_share_that_is_not_on_offer() -> None:
    floor = Floor({"a": (50, 50), "b": (50, 25)})
    floor.ask(offered("quarter", 25, "b"))
    floor.ask(odd("odd", 100, "a", "b"))
    floor.ask(offered("half", 50, "a", "b"))
    assert granted(floor) == {"quarter": (("b",), True), "odd": (("a",), False), "half": (("b",), True)}
    floor.leave("odd")
    floor.leave("half")
    floor.ask(offered("next", 50, "a", "b"))
    assert granted(floor) == {"next": (("a", "b"), True)}


def test_who_gives_up_waiting_lets_the_others_through() -> None:
    floor = Floor({"gpu": (50, 50)})
    floor.ask(offered("first", 50))
    floor.grants()
    floor.ask(odd("odd", 30))
    floor.ask(odd("other", 30))
    floor.leave("odd")
    floor.leave("first")
    assert granted(floor) == {"other": (("gpu",), False)}
    assert floor.waiting == ()


def test_a_device_that_could_not_be_divided_is_tried_again_for_the_next_job() -> None:
    floor = Floor({"gpu": (50, 25)})
    floor.ask(offered("first", 50))
    floor.grants()
    floor.undivided("gpu")
    floor.ask(offered("second", 25))
    assert granted(floor) == {}
    floor.leave("first")
    assert granted(floor) == {"second": (("gpu",), True)}


@pytest.mark.parametrize("seed", range(20))
def test_no_device_is_ever_divided_two_ways_and_every_job_gets_its_turn(seed: int) -> None:
    rng = random.Random(seed)
    shares = {"a": (50, 25, 25), "b": (50, 50), "c": (25, 25, 25, 25)}
    floor = Floor(shares)
    running: dict[str, Grant] = {}
    served: list[str] = []
    for number in range(60):
        share = rng.choice((50, 25, 30, 100))
        having = tuple(name for name, own in shares.items() if share in own)
        floor.ask(Wish(f"job-{number}", share, having or tuple(shares), bool(having)))
    while floor.waiting or running:
        for grant in floor.grants():
            running[grant.wish.job] = grant
            served.append(grant.wish.job)
        assert running, "nothing runs and somebody waits"
        for name in shares:
            users = [grant for grant in running.values() if name in grant.devices]
            assert len({grant.configured for grant in users}) <= 1
            assert len(users) == len({grant.wish.sm_percent for grant in users})
            assert all(grant.configured for grant in users) or len(users) == 1
        ended = rng.choice(list(running))
        del running[ended]
        floor.leave(ended)
    assert len(served) == len(set(served)) == 60
