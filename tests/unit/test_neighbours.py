"""When a measurement beside others counts: whatever order they begin and end in, and whoever faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any

import pytest

from tuner_server.measure import neighbours
from tuner_server.measure.neighbours import Activity, Neighbours


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


class Device:
    """Activities by name; each ends when told."""

    def __init__(self) -> None:
        self.neighbours = Neighbours()
        self.of: dict[str, Activity] = {}
        self._blocks: dict[str, ExitStack] = {}

    def begin(self, *names: str) -> None:
        for name in names:
            self._blocks[name] = ExitStack()
            self.of[name] = self._blocks[name].enter_context(self.neighbours.activity())

    def answer(self, *names: str) -> None:
        for name in names:
            self._blocks.pop(name).close()

    def lose(self, name: str) -> None:
        error = RuntimeError("it ended otherwise")
        assert not self._blocks.pop(name).__exit__(RuntimeError, error, None)

    async def counts(self, name: str) -> bool:
        """It is over by now."""
        try:
            await asyncio.wait_for(self.of[name].over(), 0.01)
        except TimeoutError:
            return False
        return True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(neighbours, "SETTLE_S", 3600.0)  # only answers make anything count
    return Device()


def test_alone_it_counts_at_once(device: Device) -> None:
    async def check() -> None:
        device.begin("a")
        device.answer("a")
        assert await device.counts("a") and device.of["a"].neighbours == 0
        assert device.neighbours.spoil() == 0 and not device.of["a"].void

    run(check())


def test_it_counts_when_all_that_ran_beside_it_have_been_answered_too(device: Device) -> None:
    async def check() -> None:
        device.begin("before", "it")
        device.answer("before")
        device.begin("beside", "also beside")
        device.answer("it")
        device.begin("after")
        assert not await device.counts("it")
        device.answer("beside")
        assert not await device.counts("it") and not await device.counts("beside")
        device.answer("also beside")  # what began after it cannot have hurt it
        assert await device.counts("it")
        assert not await device.counts("beside"), "the one after is still beside this one"
        assert device.of["it"].neighbours == 2 and device.of["after"].neighbours == 2

    run(check())


def test_a_fault_spoils_what_runs_and_what_has_not_settled_and_nothing_else(device: Device) -> None:
    async def check() -> None:
        device.begin("early", "it", "guilty")
        device.answer("early")
        device.begin("late")
        device.answer("it")
        device.lose("guilty")
        assert not await device.counts("it")
        assert device.neighbours.spoil() == 3  # all but the one that said so
        assert device.of["early"].void and device.of["it"].void and device.of["late"].void
        assert await device.counts("early") and await device.counts("it"), "who waits hears of it at once"
        device.answer("late")  # although it is beside a lost one
        assert await device.counts("late")
        device.begin("next")
        assert device.neighbours.spoil() == 1

    run(check())


def test_beside_one_that_ended_otherwise_it_counts_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SETTLE_S", 0.1)

    async def check() -> None:
        device = Device()
        device.begin("it", "stopped", "endless")
        device.lose("stopped")
        device.answer("it")
        assert not await device.counts("it")
        await device.of["it"].over()
        assert not device.of["it"].void and device.neighbours.spoil() == 1

    run(check())


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_it_counts_exactly_when_no_neighbour_is_left_that_could_spoil_it(
    device: Device, seed: int
) -> None:
    async def check() -> None:
        chance = random.Random(seed)
        running: list[str] = []
        beside: dict[str, set[str]] = {}
        good: set[str] = set()
        for number in range(60):
            if running and chance.random() < 0.55:
                name = running.pop(chance.randrange(len(running)))
                if chance.random() < 0.15:
                    device.lose(name)
                else:
                    device.answer(name)
                    good.add(name)
            elif len(running) < 5:
                name = str(number)
                beside[name] = set(running)
                for other in running:
                    beside[other].add(name)
                running.append(name)
                device.begin(name)
        counted = {name for name in good if beside[name] <= good}
        assert counted and {name for name in good if device.of[name]._over.is_set()} == counted
        assert device.neighbours.spoil() == len(running) + len(good - counted)

    run(check())
