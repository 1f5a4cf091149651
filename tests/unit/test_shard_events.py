"""A shard's events: in sequence, kept for those who come back, never without bound."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import pytest

from tuner_core.errors import UnavailableError
from tuner_core.proto.tuner.v1 import leases_pb2 as pb
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.shard_events import EVENTS_KEPT, EventLog


def log_of(count: int, keep: int = EVENTS_KEPT) -> EventLog:
    log = EventLog("life-1", ["a"], lambda: pb.ShardHeartbeat(doing="nothing"), keep)
    for number in range(1, count + 1):
        log.publish(sm.TellTrial(0, 1 << 33, f"{number:064x}", float(number), "worker_lost"))
    return log


async def read(log: EventLog, after: int, incarnation: str, count: int) -> list[pb.WatchShardResponse]:
    found = []
    events = log.follow(after, incarnation, 0.01)
    async for response in events:
        found.append(response)
        if len(found) == count:
            break
    await events.aclose()
    return found


def numbers(responses: list[pb.WatchShardResponse]) -> list[int]:
    return [response.sequence for response in responses if not response.HasField("heartbeat")]


@pytest.mark.parametrize(
    ("after", "incarnation", "expected"),
    [
        (0, "", [1, 2, 3]),
        (2, "life-1", [3]),
        (3, "life-1", []),
        (2, "life-0", [1, 2, 3]),  # of a life before: its numbers mean nothing
        (99, "life-1", [1, 2, 3]),
    ],
)
def test_a_follower_goes_on_where_it_was(after: int, incarnation: str, expected: list[int]) -> None:
    found = asyncio.run(read(log_of(3), after, incarnation, len(expected) + 2))
    assert numbers(found) == expected
    assert (
        found[0].HasField("heartbeat") and found[0].incarnation == "life-1"
    )  # at once, and at the end for lack of news
    assert found[-1].HasField("heartbeat") and found[-1].sequence == 3


def test_only_the_newest_events_are_kept() -> None:
    log = log_of(50, keep=20)
    assert numbers(asyncio.run(read(log, 0, "", 21))) == list(range(31, 51))
    assert len(log._events) == 20


def test_ten_thousand_events_take_less_than_four_megabytes() -> None:
    log = log_of(EVENTS_KEPT + 5)
    assert sum(sys.getsizeof(event) for event in log._events.values()) + sys.getsizeof(log._events) < 4e6


def test_a_slow_follower_that_is_overtaken_sees_a_gap_and_no_error() -> None:
    async def follow() -> list[int]:
        log = log_of(5, keep=5)
        events = log.follow(0, "", 10.0)
        await anext(events)
        first = await anext(events)
        for number in range(20):
            log.publish(sm.TellTrial(0, 1, f"more-{number}", 1.0))
        rest = [await anext(events) for _ in range(5)]
        await events.aclose()
        return numbers([first, *rest])

    assert asyncio.run(follow()) == [1, 21, 22, 23, 24, 25]


@pytest.mark.parametrize("error", [None, UnavailableError("stopping")])
def test_followers_get_what_there_is_before_the_end(error: UnavailableError | None) -> None:
    async def follow(end: Callable[[EventLog], None]) -> list[int]:
        log = log_of(1)
        found = []
        events = log.follow(0, "", 10.0)
        await anext(events)
        assert log.followers == 1
        log.publish(sm.TellEnded(0, 1, "draining", 1))
        end(log)
        try:
            async for response in events:
                found.append(response)
        except UnavailableError:
            found.append(pb.WatchShardResponse(sequence=-1))
        assert log.followers == 0
        return numbers(found)

    expected = [1, 2] if error is None else [1, 2, -1]
    assert asyncio.run(follow(lambda log: log.end(error))) == expected
