"""Search processes and the sessions on them, as the scheduler's driver sees them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuner_core.model import Workload
from tuner_server.fairness import FairTurns
from tuner_server.processes.handle import Child, ChildDied, ChildError, ChildTimeout
from tuner_server.processes.spawner import Spawner
from tuner_server.search.messages import KnownTrial, Lesson, SearchFailed, SearchLost, SearchSettings

__all__ = ["KnownTrial", "SearchFailed", "SearchLost", "SearchPool", "SearchSettings"]

log = logging.getLogger(__name__)

PIECE = 4
"""Candidates that a process hands over at once: a fifth of a second of its work."""


@dataclass
class _Slot:
    name: str
    child: Child | None = None
    sessions: set[str] = field(default_factory=set)
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    turns: FairTurns = field(default_factory=lambda: FairTurns(1))


class SearchPool:
    """Runs search sessions in child processes; a session stays on the process that it was opened on.

    Args:
        spawner: Where processes come from; they start at first need.
        processes: How many at most; sessions of different processes run at the same time.
        settings: For every session.
        affinity: Cores to pin the processes to; empty: all.
        nice: Added to their niceness.
    """

    def __init__(
        self,
        spawner: Spawner,
        processes: int = 1,
        settings: SearchSettings | None = None,
        affinity: Sequence[int] = (),
        nice: int = 0,
    ) -> None:
        self._spawner = spawner
        self._settings = settings or SearchSettings()
        self._affinity = tuple(affinity)
        self._nice = nice
        self._slots = [_Slot(f"search-{index}") for index in range(max(1, processes))]
        self._homes: dict[str, tuple[_Slot, Child]] = {}
        self._batches: dict[str, asyncio.Lock] = {}
        self._taught: set[tuple[int, str]] = set()
        self._prestarting: set[asyncio.Task[Child]] = set()
        self._paused = False
        self._stopped = False

    def prestart(self, sessions: int) -> None:
        """Begin to start the processes that so many sessions will have, so that none has to wait for a fork."""
        for slot in self._slots[:sessions]:
            if slot.child is None:
                starting = asyncio.create_task(self._child(slot))
                self._prestarting.add(starting)
                starting.add_done_callback(self._prestarted)

    def _prestarted(self, starting: asyncio.Task[Child]) -> None:
        self._prestarting.discard(starting)
        if not starting.cancelled() and (error := starting.exception()) is not None:
            log.warning("a search process did not start: %s", error)

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._homes)

    async def open(
        self,
        session: str,
        workload: Workload,
        target_json: str,
        *,
        seed: int,
        known: Sequence[KnownTrial] = (),
        seeds: Sequence[str] = (),
        lessons: Sequence[Lesson] = (),
        shared_with: str | None = "",
        cost_weight: float | None = None,
    ) -> None:
        """Open a session, in place of one of the same name.

        Args:
            session: Its name.
            workload: What to schedule.
            target_json: For which target.
            seed: Of its random choices.
            known: Trials from before; never proposed again.
            seeds: Traces to propose first: they were good elsewhere.
            lessons: Trials of other operators on this target. A process learns those of a target once.
            shared_with: Sessions with the same word learn from each other's trials, if their target is the same; None:
                this one learns from nobody.
            cost_weight: Replaces that of the settings.

        Raises:
            SearchFailed: The workload or target is not accepted.
            SearchLost: The process died over it.
        """
        if session in self._homes:
            await self.close(session)
        slot = min(self._slots, key=lambda slot: len(slot.sessions))
        slot.sessions.add(session)
        try:
            child = await self._child(slot)
            self._homes[session] = (slot, child)
            taught = (child.pid, target_json) in self._taught
            if lessons:
                self._taught.add((child.pid, target_json))
            await self._request(
                session,
                "open",
                {
                    "body": workload.body,
                    "target": target_json,
                    "seed": seed,
                    "known": _rows(known),
                    "seeds": list(seeds),
                    "shared_with": shared_with,
                    "cost_weight": self._settings.cost_weight if cost_weight is None else cost_weight,
                    "lessons": [] if taught else [[lesson.task, lesson.trace, lesson.median_us] for lesson in lessons],
                },
            )
        except BaseException:
            slot.sessions.discard(session)
            self._homes.pop(session, None)
            raise

    async def generate(self, session: str, count: int) -> list[str]:
        """New candidates of a session; earlier ones need not have been reported.

        Args:
            session: An open session.
            count: How many at most.

        Returns:
            Traces as JSON, new ones only; empty when the space seems exhausted.

        Raises:
            SearchFailed: Not one valid schedule can be sampled; the text says why.
            SearchLost: The process died; open the session again.
        """
        return [trace async for traces, _ in self.generate_in_pieces(session, count) for trace in traces]

    async def generate_in_pieces(self, session: str, count: int) -> AsyncIterator[tuple[list[str], bool]]:
        """The same, a few candidates at a time, so that these can be built while the others are applied.

        Batches of one session come one after the other.

        Yields:
            Traces, and whether more follow.

        Raises:
            SearchFailed, SearchLost: As :meth:`generate`.
        """
        left = count
        async with self._batches.setdefault(session, asyncio.Lock()):
            while left:
                piece = min(left, PIECE)
                left -= piece
                asked = {"count": piece, "following": left, "continued": left + piece < count}
                traces = list((await self._request(session, "generate", asked))["traces"])
                if len(traces) < piece:
                    left = 0
                yield traces, left > 0

    async def report(self, session: str, trials: Sequence[KnownTrial]) -> None:
        """Tell a session how trials came out.

        Raises:
            SearchLost: The process died; open the session again.
        """
        if trials:
            await self._request(session, "report", {"trials": _rows(trials)})

    async def close(self, session: str) -> None:
        """Forget a session; one that is unknown or lost is closed already."""
        with contextlib.suppress(SearchLost, SearchFailed):
            await self._request(session, "close", {})
        self._forget(session)

    def pause(self) -> None:
        """Stop the processes (SIGSTOP) until :meth:`resume`; deadlines stand still."""
        self._paused = True
        for slot in self._slots:
            if slot.child is not None:
                slot.child.pause()

    def resume(self) -> None:
        """Let the processes go on."""
        self._paused = False
        for slot in self._slots:
            if slot.child is not None:
                slot.child.resume()

    async def stop(self) -> None:
        """End the processes; every session is lost."""
        self._stopped = True
        self.resume()
        await asyncio.gather(*self._prestarting, return_exceptions=True)
        children = [slot.child for slot in self._slots if slot.child is not None]
        await asyncio.gather(*(child.close() for child in children))
        self._homes.clear()

    async def _child(self, slot: _Slot) -> Child:
        async with slot.starting:
            if self._stopped:
                raise SearchLost("the search processes have been stopped")
            if slot.child is None or not slot.child.alive:
                config = {"settings": self._settings.to_json()}
                try:
                    slot.child = await self._spawner.spawn(
                        "search",
                        config,
                        name=slot.name,
                        env={"CUDA_VISIBLE_DEVICES": ""},  # see tuner_server.build.pool
                        affinity=self._affinity,
                        nice=self._nice,
                    )
                except ChildDied as error:
                    raise SearchLost(str(error)) from None
                if self._paused:
                    slot.child.pause()
            return slot.child

    async def _request(self, session: str, op: str, args: Mapping[str, Any]) -> dict[str, Any]:
        if session not in self._homes:
            raise SearchLost(f"session {session} is not open")
        slot, child = self._homes[session]
        # shielded: cancelling a request kills its process, and with it the sessions of other tasks
        work = asyncio.ensure_future(self._in_turn(slot, child, op, {"session": session, **args}))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_ignore_outcome)
            raise
        except ChildError as error:
            if error.kind == "unknown_session":
                self._forget(session)
                raise SearchLost(str(error)) from None
            raise SearchFailed(str(error)) from None
        except (ChildDied, ChildTimeout) as error:
            self._lose(child)
            raise SearchLost(str(error)) from None

    async def _in_turn(self, slot: _Slot, child: Child, op: str, args: Mapping[str, Any]) -> dict[str, Any]:
        async with slot.turns.turn():
            return await child.request(op, args, self._settings.timeout_s)

    def _lose(self, child: Child) -> None:
        child.kill()
        lost = [session for session, (_, home) in self._homes.items() if home is child]
        log.warning("%s is gone, and %d sessions with it", child.name, len(lost))
        for session in lost:
            self._forget(session)
        for slot in self._slots:
            if slot.child is child:
                slot.child = None

    def _forget(self, session: str) -> None:
        if session in self._homes:
            self._homes.pop(session)[0].sessions.discard(session)
            self._batches.pop(session, None)


def _rows(trials: Sequence[KnownTrial]) -> list[list[Any]]:
    return [[trial.trace, trial.median_us] for trial in trials]


def _ignore_outcome(work: asyncio.Future[dict[str, Any]]) -> None:
    if not work.cancelled():
        work.exception()
