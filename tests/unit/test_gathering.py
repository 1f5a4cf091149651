"""Built candidates wait for each other, but never for what is not coming."""

from __future__ import annotations

import asyncio

from tuner_server.scheduler.gathering import Gathering


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_they_go_on_together_when_enough_are_there() -> None:
    async def scenario() -> list[int]:
        gathering, passed, counts = Gathering(3), [], []

        async def built(name: int) -> None:
            await gathering.gathered()
            passed.append(name)

        with gathering.building():
            tasks = []
            for name in range(4):
                tasks.append(asyncio.create_task(built(name)))
                await settle()
                counts.append(len(passed))
        await asyncio.gather(*tasks)
        return [*counts, len(passed)]

    assert asyncio.run(scenario()) == [0, 0, 3, 3, 4]  # the last one goes when nothing is being built any more


def test_a_failed_build_and_a_cancelled_wait_hold_nobody_up() -> None:
    async def scenario() -> None:
        gathering = Gathering(10)
        building = gathering.building()
        building.__enter__()
        cancelled = asyncio.create_task(gathering.gathered())
        other = asyncio.create_task(gathering.gathered())
        await settle()
        cancelled.cancel()
        await settle()
        assert not other.done()
        building.__exit__(None, None, None)
        await asyncio.wait_for(other, 5)

    asyncio.run(scenario())
