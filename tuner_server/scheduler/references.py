"""What candidates are checked against: one reference for each task that is promoted, made once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from tuner_core.errors import TunerError
from tuner_core.model import Workload
from tuner_server import timeline
from tuner_server.build.pool import BuildPool
from tuner_server.trial import TrialFailed

log = logging.getLogger(__name__)


class References:
    """Inputs and outputs of unscheduled operators, by task.

    Args:
        build: Runs them.
        workloads: The operators, by task.
        seed: Of the inputs.
    """

    def __init__(self, build: BuildPool, workloads: Sequence[Workload], seed: int) -> None:
        self._build = build
        self._workloads = workloads
        self._seed = seed
        self._tasks: dict[int, asyncio.Task[Path | None]] = {}
        self._foreseen: deque[int] = deque()
        self._foreseeing: asyncio.Task[None] | None = None

    def foresee(self, index: int) -> None:
        """A task will be promoted: its reference is made some time before.

        One such at a time, so that candidates get nearly all of the build processes; and none is waited for when the
        task's last trial is in.
        """
        if index in self._foreseen or index in self._tasks:
            return
        self._foreseen.append(index)
        if self._foreseeing is None or self._foreseeing.done():
            self._foreseeing = asyncio.create_task(self._make_foreseen())

    async def _make_foreseen(self) -> None:
        while self._foreseen:
            index = self._foreseen.popleft()
            self.begin(index)
            await asyncio.wait([self._tasks[index]])

    def begin(self, index: int) -> None:
        """Begin with a task's reference; nothing happens when it is under way or there."""
        if index not in self._tasks:
            self._tasks[index] = asyncio.create_task(self._make(self._workloads[index]))

    async def get(self, index: int) -> Path | None:
        """A task's reference; None when there is none: it took too long, or cannot be made."""
        self.begin(index)
        return await asyncio.shield(self._tasks[index])

    async def drop(self, index: int) -> None:
        """Delete a task's reference: inputs and outputs of large operators take many megabytes."""
        with contextlib.suppress(ValueError):
            self._foreseen.remove(index)
        task = self._tasks.pop(index, None)
        if task is None:
            return
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, TunerError):
            path = await task
            if path is not None:
                path.unlink(missing_ok=True)

    async def drop_all(self) -> None:
        """Delete all of them."""
        self._foreseen.clear()
        if self._foreseeing is not None:
            self._foreseeing.cancel()
        for index in list(self._tasks):
            await self.drop(index)

    async def _make(self, workload: Workload) -> Path | None:
        with timeline.of_task(workload.description):
            return await self._try(workload)

    async def _try(self, workload: Workload) -> Path | None:
        try:
            return await self._build.reference(workload, seed=self._seed)
        except TrialFailed as failure:  # its process may have been killed from outside
            log.warning("%s: no reference (%s); trying once more", workload.description, failure)
        try:
            return await self._build.reference(workload, seed=self._seed)
        except TrialFailed as failure:
            log.warning("%s: no reference: %s", workload.description, failure)
            return None
