"""Turns on the device: order, fairness, and cancellation at every point."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from tuner_server.measure.turns import Turns


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def turns_of(*slots: str) -> Turns[str]:
    turns: Turns[str] = Turns(lambda slot: True)
    for slot in slots:
        turns.offer(slot)
    return turns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_slots_go_out_in_the_order_of_asking() -> None:
    async def check() -> None:
        turns = turns_of("a")
        order: list[int] = []

        async def use(number: int) -> None:
            slot = await turns.take()
            order.append(number)
            await settle()
            turns.give(slot)

        await asyncio.gather(*(use(number) for number in range(6)))
        assert order == list(range(6))

    run(check())


def test_a_turn_alone_waits_for_those_before_it_and_holds_back_those_after_it() -> None:
    async def check() -> None:
        turns = turns_of("a", "b")
        running = await turns.take()
        alone = asyncio.create_task(turns.begin_alone())
        later = asyncio.create_task(turns.take())
        await settle()
        assert not alone.done() and not later.done(), "b is idle, but someone waits to be alone"
        turns.give(running)
        await alone
        own = await turns.take(within_alone=True)
        await settle()
        assert not later.done()
        turns.give(own)
        turns.end_alone()
        assert await later in ("a", "b")

    run(check())


def test_a_row_of_turns_alone_lets_those_who_wait_go_in_between() -> None:
    async def check() -> None:
        turns = turns_of("a")
        order: list[str] = []

        async def alone(name: str) -> None:
            await turns.begin_alone()
            order.append(name)
            await settle()
            turns.end_alone()

        async def use(name: str, *, first: bool = False) -> None:
            slot = await turns.take(first=first)
            order.append(name)
            await settle()
            turns.give(slot)

        held = await turns.take()
        waiting = [asyncio.create_task(alone(f"alone {number}")) for number in range(3)]
        await settle()
        waiting += [asyncio.create_task(use(f"trial {number}")) for number in range(2)]
        await settle()
        turns.give(held)
        await asyncio.gather(*waiting)
        assert order == ["alone 0", "trial 0", "trial 1", "alone 1", "alone 2"]

    run(check())


def test_who_goes_first_does_so_after_a_turn_alone_too() -> None:
    async def check() -> None:
        turns = turns_of("a")
        await turns.begin_alone()
        later = asyncio.create_task(turns.take())
        await settle()
        first = asyncio.create_task(turns.begin_alone(first=True))
        await settle()
        turns.end_alone()
        await settle()
        assert first.done() and not later.done()
        turns.end_alone()
        assert await later == "a"

    run(check())


def test_the_others_wait_is_counted_from_when_the_first_of_them_was_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("tuner_server.measure.turns.time.monotonic", lambda: now)

    async def check() -> None:
        nonlocal now
        turns = turns_of("a")
        first = await turns.take()
        queued = asyncio.create_task(turns.take())
        alone = asyncio.create_task(turns.begin_alone())
        await settle()
        now = 110.0
        turns.give(first)
        second = await queued
        await settle()
        now = 130.0  # it stands first in the queue since 110, and the device is not free yet
        turns.give(second)
        assert await alone == 110.0

    asyncio.run(check())


def test_a_slot_that_nobody_before_wants_goes_to_who_wants_it() -> None:
    async def check() -> None:
        turns = turns_of("quarter", "half")
        first = await turns.take(lambda slot: slot == "half")
        waiting = asyncio.create_task(turns.take(lambda slot: slot == "half"))
        await settle()
        assert await turns.take(lambda slot: slot == "quarter") == "quarter"
        assert not waiting.done()
        turns.give(first)
        assert await waiting == "half"

    run(check())


@pytest.mark.parametrize("yields", range(4))
def test_a_cancelled_wait_loses_no_slot(yields: int) -> None:
    async def check() -> None:
        turns = turns_of("a")
        held = await turns.take()
        waiting = asyncio.create_task(turns.take())
        await settle()
        turns.give(held)  # granted now, taken up in the next step of the loop
        for _ in range(yields):
            await asyncio.sleep(0)
        waiting.cancel()
        slot = await asyncio.gather(waiting, return_exceptions=True)
        if slot == ["a"]:
            turns.give("a")
        assert await turns.take() == "a"

    run(check())


@pytest.mark.parametrize("yields", range(4))
def test_a_cancelled_turn_alone_frees_the_device(yields: int) -> None:
    async def check() -> None:
        turns = turns_of("a")
        held = await turns.take()
        alone = asyncio.create_task(turns.begin_alone())
        behind = asyncio.create_task(turns.take())
        await settle()
        turns.give(held)
        for _ in range(yields):
            await asyncio.sleep(0)
        alone.cancel()
        (end,) = await asyncio.gather(alone, return_exceptions=True)
        if not isinstance(end, asyncio.CancelledError):
            turns.end_alone()
        assert await behind == "a"
        assert not turns.alone

    run(check())


def test_a_slot_under_repair_comes_back_only_when_offered() -> None:
    async def check() -> None:
        broken = {"a"}
        turns: Turns[str] = Turns(lambda slot: slot not in broken)
        turns.offer("a")
        slot = await turns.take()
        turns.give(slot)
        waiting = asyncio.create_task(turns.take())
        await settle()
        assert not waiting.done()
        broken.clear()
        turns.offer("a")
        turns.offer("a")  # saying so twice does not make two of it
        assert await waiting == "a"
        another = asyncio.create_task(turns.take())
        await settle()
        assert not another.done()
        another.cancel()

    run(check())


def test_without_any_prospect_of_a_slot_nobody_waits_for_ever() -> None:
    async def check() -> None:
        turns: Turns[str] = Turns(lambda slot: True)
        waiting = [asyncio.create_task(turns.take()), asyncio.create_task(turns.begin_alone())]
        await settle()
        turns.fail(RuntimeError("no worker"))
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(end) for end in ends] == ["no worker"] * 2
        with pytest.raises(RuntimeError):
            await turns.take()
        turns.offer("a")
        assert await turns.take() == "a"

    run(check())


def test_under_random_use_and_cancellation_exclusion_holds_and_all_comes_back() -> None:
    async def check() -> None:
        rng = random.Random(7)
        slots = ["a", "b", "c"]
        turns = turns_of(*slots)
        in_use: set[str] = set()
        alone = False
        served = {"one": 0, "alone": 0}

        async def one() -> None:
            slot = await turns.take()
            assert slot not in in_use and not alone
            in_use.add(slot)
            try:
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                    assert not alone
            finally:
                in_use.discard(slot)
                turns.give(slot)
            served["one"] += 1

        async def whole() -> None:
            nonlocal alone
            await turns.begin_alone()
            assert not in_use and not alone
            alone = True
            try:
                slot = await turns.take(within_alone=True)
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                        assert not in_use
                finally:
                    turns.give(slot)
            finally:
                alone = False
                turns.end_alone()
            served["alone"] += 1

        tasks = []
        for _ in range(400):
            tasks.append(asyncio.create_task(whole() if rng.random() < 0.2 else one()))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends), ends
        assert served["one"] > 100 and served["alone"] > 20
        assert sorted([await turns.take() for _ in slots]) == slots

    run(check())
