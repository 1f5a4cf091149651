"""Turns are shared between jobs, however many each one asks for."""

from __future__ import annotations

import asyncio

from tuner_server.fairness import FairTurns, on_behalf_of


async def work(turns: FairTurns, who: str, done: list[str], hold: asyncio.Event | None = None) -> None:
    on_behalf_of.set(who)
    async with turns.turn():
        if hold is not None:
            await hold.wait()
        else:
            await asyncio.sleep(0)
        done.append(who)


def test_a_job_with_few_requests_does_not_wait_behind_one_with_many() -> None:
    async def body() -> list[str]:
        turns, done = FairTurns(2), []
        many = [asyncio.create_task(work(turns, "many", done)) for _ in range(50)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(work(turns, "few", done)) for _ in range(5)]
        await asyncio.gather(*many, *few)
        return done

    done = asyncio.run(body())
    assert len(done) == 55
    last = max(index for index, who in enumerate(done) if who == "few")
    assert done[:last].count("many") <= 8, "the two take turns"


def test_one_job_alone_uses_everything() -> None:
    async def body() -> int:
        turns, done, hold = FairTurns(3), [], asyncio.Event()
        tasks = [asyncio.create_task(work(turns, "only", done, hold)) for _ in range(4)]
        for _ in range(5):
            await asyncio.sleep(0)
        holding = turns._held["only"]
        hold.set()
        await asyncio.gather(*tasks)
        assert len(done) == 4
        return holding

    assert asyncio.run(body()) == 3


def test_a_cancelled_wait_takes_no_turn_with_it() -> None:
    async def body() -> None:
        turns, done, hold = FairTurns(1), [], asyncio.Event()
        holder = asyncio.create_task(work(turns, "a", done, hold))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(work(turns, who, done)) for who in "bcbc"]
        await asyncio.sleep(0)
        waiting[0].cancel()
        hold.set()
        await asyncio.sleep(0)
        waiting[1].cancel()  # perhaps granted in the same breath
        await asyncio.gather(*waiting, holder, return_exceptions=True)
        async with asyncio.timeout(1), turns.turn():
            pass

    asyncio.run(body())
