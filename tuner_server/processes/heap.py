"""How a process keeps memory that it has freed."""

from __future__ import annotations

import ctypes

# Of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Give freed memory back to the kernel late: a compiler frees all at the end of a build, and then wants it again.

    Costs up to 32 MB for each process. A build had 6,200 page faults, a twentieth of its time (benchmarks/NOTES.md).
    Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 32 << 20)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TOP_PAD, 8 << 20)
