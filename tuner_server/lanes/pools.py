"""The search and build processes of a server, shared by all of its lanes."""

from __future__ import annotations

import os
from pathlib import Path

from tuner_server import timeline
from tuner_server.build.pool import BuildPool
from tuner_server.config import ServerConfig
from tuner_server.processes.spawner import Spawner
from tuner_server.search.messages import SearchSettings
from tuner_server.search.pool import SearchPool

BUILD_NICENESS = 5
"""There is a build process for every core; where a search wants one, too, it gets three quarters of it (sched(7))."""


class WorkPools:
    """Search and build, on the cores that no measurement uses, or on all where none are left.

    Builds take up what workers leave of their cores, too, where these may be lent.

    Args:
        config: Numbers of processes and deadlines.
        spawner: Starts the processes.
        scratch: Directory for artifacts.
    """

    def __init__(self, config: ServerConfig, spawner: Spawner, scratch: Path) -> None:
        self._config = config
        self._spawner = spawner
        self._scratch = scratch
        self._arranged: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._search: SearchPool | None = None
        self._build: BuildPool | None = None
        self._pause = timeline.Span("pause", "search and build", "paused")
        self.cores = 1

    @property
    def search(self) -> SearchPool:
        """The search processes."""
        assert self._search is not None, "the pools have not been arranged"
        return self._search

    @property
    def build(self) -> BuildPool:
        """The build processes."""
        assert self._build is not None, "the pools have not been arranged"
        return self._build

    async def arrange(self, spare: tuple[int, ...], lent: tuple[int, ...] = ()) -> None:
        """Have pools on these cores; called only while no job uses them.

        Args:
            spare: Cores that no measurement uses; empty: there are none, so all cores are used in turns.
            lent: Cores of workers on which builds may run while these do nothing.
        """
        if (spare, lent) == self._arranged:
            return
        await self.stop()
        config, cores = self._config, len(spare) or len(os.sched_getaffinity(0))
        self.cores = cores + len(lent)
        search_processes = config.search_processes or _share_of(cores, 0.4)
        build_processes = config.build_processes or cores
        self._search = SearchPool(self._spawner, search_processes, SearchSettings(), affinity=spare)
        self._build = BuildPool(
            self._spawner,
            build_processes,
            self._scratch,
            timeout_s=config.build_timeout_s,
            reference_timeout_s=config.reference_timeout_s,
            affinity=spare,
            nice=BUILD_NICENESS if spare else 0,
            lent=lent,
        )
        self._arranged = (spare, lent)

    def pause(self) -> None:
        """Stop the processes until :meth:`resume`; deadlines stand still."""
        if self._arranged is not None:
            self._pause.begin()
            self.search.pause()
            self.build.pause()

    def resume(self) -> None:
        """Let the processes go on."""
        if self._arranged is not None:
            self.search.resume()
            self.build.resume()
            self._pause.end()

    async def stop(self) -> None:
        """End the processes."""
        if self._arranged is not None:
            self._arranged = None
            await self.search.stop()
            await self.build.stop()


def _share_of(cores: int, share: float) -> int:
    return max(1, round(cores * share))
