"""Limits of processes that work on IR from clients: a runaway ends that process, not the host."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path

# Beyond what the process has mapped when it starts: TVM and its libraries map gigabytes that they never touch.
_EXTRA_ADDRESS_SPACE = 16 << 30
_LARGEST_FILE = 8 << 30


def limit_resources(extra_address_space: int = _EXTRA_ADDRESS_SPACE) -> None:
    """Limit this process's address space and the size of files that it writes, for good.

    Args:
        extra_address_space: Bytes that it may map beyond what it has.
    """
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, mapped + extra_address_space),
        (resource.RLIMIT_FSIZE, _LARGEST_FILE),
    ):
        _soft, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


@contextlib.contextmanager
def limited_processor_time(seconds: int) -> Iterator[None]:
    """Have the kernel end this process (SIGXCPU) when the block takes more processor time (RLIMIT_CPU).

    Args:
        seconds: How much it may take. The kernel counts whole seconds of the process's life, so it may be one more.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time()) + seconds
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
