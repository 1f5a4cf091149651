"""When a process gives memory that it has freed back to the kernel. Without glibc nothing of this happens."""

from __future__ import annotations

import ctypes

# Of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Give freed memory back to the kernel late: a compiler frees all at the end of a build, and then wants it again.

    A build had 6,200 page faults, a twentieth of its time (benchmarks/NOTES.md). It costs up to 32 MB for each process,
    until :func:`release_freed_memory`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 32 << 20)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TOP_PAD, 8 << 20)


def release_freed_memory() -> None:
    """Give all freed memory back to the kernel now."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
