"""What the kernel says about a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


def state(pid: int) -> str:
    """One letter, e.g. R, S, T (stopped), Z; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that someone else has to reap counts as ended)."""
    return state(pid) in ("", "Z", "X")


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    """Poll; False when the limit passed first."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    """:func:`wait_until` inside an event loop."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not condition():
                await asyncio.sleep(0.02)
    return condition()


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
