"""Where builds and measurements take turns on the same cores: let built candidates gather, then measure them together.

Without it every finished build would stop the other builds for one measurement, and workers that could run side by side
would run one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Gathering:
    """Holds back what is built until enough of it is there, or no more is coming.

    Lanes share one, so that a job's measurements fall into the pauses that another job's make anyway.

    Args:
        enough: How many go on together; 1: nobody waits.
    """

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self._building = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def enough(self) -> int:
        """How many go on together."""
        return self._enough

    @enough.setter
    def enough(self, value: int) -> None:
        self._enough = value
        self._open()

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Hold while a candidate is built or waits for its build."""
        self._building += 1
        try:
            yield
        finally:
            self._building -= 1
            self._open()

    async def gathered(self) -> None:
        """Wait, with a built candidate, for the others."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._open()
        await turn

    def _open(self) -> None:
        if self._building and len(self._waiting) < self._enough:
            return
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
