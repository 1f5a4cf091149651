"""A server's scratch directory for artifacts; what killed servers left of theirs is removed at the next start."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_PREFIX = "tuner-"
_LOCK = "in-use"


class Scratch:
    """A directory that lives as long as its process, in memory where there is a place for that.

    Artifacts are many, small and short-lived. The directory holds a locked file; the kernel gives the lock up when the
    process ends in any way, and whoever makes the next directory in the same place removes those without a lock.

    Args:
        root: Where to make it; None: in memory, or else where temporary files go.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or _in_memory() or Path(tempfile.gettempdir())
        _remove_abandoned(self._root)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._root))
            with contextlib.suppress(OSError):  # removed by another server's start, before it was locked
                self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if (self.path / _LOCK).exists():
                    return
                os.close(self._lock)

    def remove(self) -> None:
        """Delete it with everything in it. A second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _in_memory() -> Path | None:
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


def _remove_abandoned(root: Path) -> None:
    for lock in root.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # another user's, or in use
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
                log.info("removed %s, which a killed server left", lock.parent)
            finally:
                os.close(descriptor)
