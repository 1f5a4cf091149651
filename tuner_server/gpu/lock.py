"""One server per GPU: a lock that the kernel drops when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from tuner_core.errors import ConflictError, TunerError

LOCK_DIRECTORY = Path("/tmp")  # not tempfile's: TMPDIR may differ from user to user


class GpuLock:
    """Holds a GPU for this process, on the whole host, whatever the data directory.

    Args:
        uuid: The GPU.
        directory: Where the lock files lie; the same for all servers of the host.

    Raises:
        ConflictError: Another server holds it.
        TunerError: The lock file cannot be opened.
    """

    def __init__(self, uuid: str, directory: Path = LOCK_DIRECTORY) -> None:
        path = directory / f"tuner-{uuid}.lock"
        self._fd = _open(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            who = f" (pid {holder})" if holder.isdigit() else ""
            raise ConflictError(
                f"another tuner-server{who} uses the GPU {uuid}; stop it, or choose another device with --device"
            ) from None
        with contextlib.suppress(OSError):  # another user's file: held all the same, only without our name in it
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let the next server have it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)


def _open(path: Path) -> int:
    # Without O_CREAT first: in a sticky directory the kernel refuses it on another user's file. To lock, reading is
    # enough.
    for flags in (os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            reason = error.strerror
    raise TunerError(f"cannot open the GPU's lock {path}: {reason}")
