"""Follow another program's log files into the server's own log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

_MAX_BYTES_PER_LOOK = 64 << 10
# The daemon says this of healthy clients too, and of every client that ends in order (seen with driver 580).
_NOISE = ("User did not send valid credentials", "with status 806, assuming client")
_WARNINGS = ("error", "fault", "fail", "fatal", "abnormal")


class LogTail:
    """Copies lines as they are added; what a file held before :meth:`start` is not repeated.

    Args:
        paths: The files; they may appear later, and may be replaced.
        target: Where the lines go.
        interval_s: Seconds between looks.
    """

    def __init__(self, paths: Sequence[Path], target: logging.Logger, interval_s: float = 0.5) -> None:
        self._offsets = {path: _size(path) for path in paths}
        self._partial: dict[Path, bytes] = {}
        self._target = target
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    def cancel(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        while True:
            self.drain()
            await asyncio.sleep(self._interval_s)

    def drain(self) -> None:
        """Copy what has been added since the last look."""
        for path, offset in self._offsets.items():
            size = _size(path)
            if size < offset:  # replaced
                offset = 0
            if size == offset:
                self._offsets[path] = offset
                continue
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(offset)
                added = file.read(_MAX_BYTES_PER_LOOK)
                self._offsets[path] = offset + len(added)
                *lines, rest = (self._partial.get(path, b"") + added).split(b"\n")
                self._partial[path] = rest[-_MAX_BYTES_PER_LOOK:]
                for line in lines:
                    self._copy(path, line.decode(errors="replace").strip())

    def _copy(self, path: Path, line: str) -> None:
        if not line or any(noise in line for noise in _NOISE):
            return
        level = logging.WARNING if any(word in line.lower() for word in _WARNINGS) else logging.DEBUG
        self._target.log(level, "%s: %s", path.stem, line)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
