"""Where the embedded store, the jobs and the logs live, and who holds them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from tuner_core.errors import ConflictError, TunerError


def default_data_dir() -> Path:
    """``TUNER_DATA_DIR``, else ``tuner`` in the user's data directory (XDG base directory specification)."""
    if override := os.environ.get("TUNER_DATA_DIR"):
        return Path(override)
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(base) / "tuner"


def lock_is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file at this moment; False where there is no such file."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class Holder:
    """The server that holds a data directory."""

    pid: int
    address: str


class DataDirLock:
    """A data directory held by one server at a time. The kernel drops the lock when the holder ends, however it ends.

    Args:
        path: The directory; made when missing.

    Raises:
        ConflictError: Another server holds it.
        TunerError: It cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(path / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TunerError(
                f"cannot write the data directory {path} ({error.strerror}); choose another with --data-dir"
            ) from None
        if not _lock(self._fd):
            holder = read_holder(path)
            os.close(self._fd)
            who = f" (pid {holder.pid}, {holder.address})" if holder else ""
            raise ConflictError(
                f"another tuner-server{who} uses the data directory {path}; stop it or choose another with --data-dir"
            ) from None

    def announce(self, address: str) -> None:
        """Write who holds the directory and where it listens, for clients on this host.

        Raises:
            TunerError: The directory is full.
        """
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "address": address}).encode(), 0)
        except OSError as error:
            raise TunerError(f"cannot write the data directory ({error.strerror})") from None

    def release(self) -> None:
        """Let the next server have it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)


def _lock(fd: int) -> bool:
    """Hold the file alone; False when another server does.

    :func:`read_holder` shares the lock for an instant. Whoever could share it too is beside such readers only, and
    waits for them.
    """
    while True:
        for mode in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            try:
                fcntl.flock(fd, mode | fcntl.LOCK_NB)
            except OSError:
                continue
            if mode == fcntl.LOCK_EX:
                return True
            fcntl.flock(fd, fcntl.LOCK_UN)
            time.sleep(random.uniform(0.001, 0.01))  # two servers that start at once must not keep in step
            break
        else:
            return False


def read_holder(path: Path) -> Holder | None:
    """The server that holds ``path`` now and has announced itself, or None."""
    try:
        fd = os.open(path / "server.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None  # nobody holds it
        except OSError:
            pass
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(os.pread(fd, 4096, 0))
            return Holder(int(said["pid"]), str(said["address"]))
        return None
    finally:
        os.close(fd)
