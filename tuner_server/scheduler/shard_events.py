"""What a shard has to tell its client: events in sequence, kept for a while, so that a broken connection loses none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tuner_core.errors import TunerError
from tuner_core.proto.tuner.v1 import leases_pb2 as pb
from tuner_server.scheduler import shard_messages as sm

EVENTS_KEPT = 10_000
"""Serialized, of about 250 bytes each: a shard keeps less than 4 MB."""


class EventLog:
    """Events of one incarnation of a shard, numbered from 1.

    Args:
        incarnation: Of the shard.
        names: Task names by index.
        heartbeat: Makes the heartbeat that followers get when nothing happens.
        keep: How many events are kept for those who come back.

    Attributes:
        followers: How many listen now.
    """

    def __init__(
        self, incarnation: str, names: list[str], heartbeat: Callable[[], pb.ShardHeartbeat], keep: int = EVENTS_KEPT
    ) -> None:
        self.incarnation = incarnation
        self.followers = 0
        self._names = names
        self._heartbeat = heartbeat
        self._keep = keep
        self._events: dict[int, bytes] = {}
        self._last = 0
        self._news = asyncio.Event()
        self._ended = False
        self._error: TunerError | None = None

    def publish(self, told: sm.Tell) -> None:
        """Add an event and wake those who listen."""
        self._last += 1
        response = self._response(told)
        response.sequence, response.incarnation = self._last, self.incarnation
        self._events[self._last] = response.SerializeToString()
        self._events.pop(self._last - self._keep, None)
        self._wake()

    def end(self, error: TunerError | None = None) -> None:
        """Let every follower have what there is, and then the error, or the end."""
        self._ended, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(
        self, after: int, incarnation: str, heartbeat_s: float
    ) -> AsyncGenerator[pb.WatchShardResponse, None]:
        """A heartbeat, then events, and a heartbeat whenever nothing happened for a while.

        Args:
            after: Sequence number of the last event that the follower has.
            incarnation: That it is of; empty: of the present one. Of another one, events come from the first on.
            heartbeat_s: How long a while is.

        Raises:
            TunerError: The shard ended otherwise than by being closed.
        """
        if incarnation not in ("", self.incarnation) or not 0 <= after <= self._last:
            after = 0
        self.followers += 1
        try:
            yield self._beat(after)
            while True:
                news = self._news
                after = max(after, self._last - self._keep)
                while after < self._last:
                    after = max(after + 1, self._last - self._keep + 1)
                    yield pb.WatchShardResponse.FromString(self._events[after])
                if self._news is not news:
                    continue
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return
                try:
                    await asyncio.wait_for(news.wait(), heartbeat_s)
                except TimeoutError:
                    yield self._beat(after)
        finally:
            self.followers -= 1

    def _beat(self, sequence: int) -> pb.WatchShardResponse:
        return pb.WatchShardResponse(sequence=sequence, incarnation=self.incarnation, heartbeat=self._heartbeat())

    def _response(self, told: sm.Tell) -> pb.WatchShardResponse:
        name = self._names[told.task]
        match told:
            case sm.TellBaseline():
                baseline = pb.BaselineMeasured(
                    task=name, token=told.token, latency_us=told.latency_us, trial_id=told.trial_id, error=told.error
                )
                return pb.WatchShardResponse(baseline=baseline)
            case sm.TellTrial():
                trial = pb.TrialFinished(
                    task=name,
                    token=told.token,
                    trial_id=told.trial_id,
                    latency_us=told.latency_us,
                    failure=told.failure,
                )
                return pb.WatchShardResponse(trial=trial)
            case sm.TellEnded():
                ended = pb.LeaseEnded(
                    task=name,
                    token=told.token,
                    reason=told.reason,
                    measured=told.measured,
                    verified=told.verified,
                    best_latency_us=told.best_us,
                    best_trial_id=told.best_trial_id,
                    error=told.error,
                    fallback=told.fallback,
                    baseline_latency_us=told.baseline_us,
                    holder=told.holder,
                    reused=told.reused,
                )
                return pb.WatchShardResponse(ended=ended)
