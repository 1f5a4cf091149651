"""The part of the host's cores that a server keeps to, and other servers that use the same."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tuner_core.errors import UsageError
from tuner_server.partitions.host import physical_core, portions, usable_cores


def keep_to(wanted: str) -> None:
    """Have this process, and all that it starts, use no other cores. Called before anything is started.

    Args:
        wanted: See :func:`own_part`; empty: all that there are.

    Raises:
        UsageError: There are no such cores.
    """
    if wanted:
        os.sched_setaffinity(0, own_part(wanted, usable_cores()))


def own_part(
    wanted: str, usable: Sequence[int], physical: Callable[[int], tuple[int, int]] = physical_core
) -> tuple[int, ...]:
    """The cores that ``--cores`` names.

    Args:
        wanted: ``K/N``, the K-th of N equal parts, whole physical cores where there are enough; or ``0-15,32``.
        usable: Cores that this process may use, siblings side by side.
        physical: The physical core of a core.

    Raises:
        UsageError: It is neither, or there are no such cores.
    """
    number, slash, parts = wanted.partition("/")
    try:
        if slash:
            index, count = int(number), int(parts)
            if not 1 <= index <= count:
                raise ValueError
        else:
            ends = [part.partition("-") for part in wanted.split(",")]
            listed = {core for first, _, last in ends for core in range(int(first), int(last or first) + 1)}
            if not listed:
                raise ValueError
    except ValueError:
        raise UsageError(f"--cores {wanted}: wants a part as in 1/2, or cores as in 0-15 or 0,2") from None
    if slash:
        if count > len(usable):
            raise UsageError(f"--cores {wanted}: there are only {len(usable)} cores")
        return tuple(portions(usable, count, physical)[index - 1])
    if missing := sorted(listed - set(usable)):
        raise UsageError(f"--cores {wanted}: this process may not use {', '.join(map(str, missing))}")
    return tuple(sorted(listed))


class CoreClaim:
    """Says to other servers of this user which cores this one uses, until it ends.

    Args:
        cores: They.
        name: Of this server, for people.
        folder: Where the servers of this host tell each other; None: below the directory for temporary files.

    Attributes:
        sharing: Names of servers that use some of them, too.
    """

    def __init__(self, cores: Sequence[int], name: str, folder: Path | None = None) -> None:
        self.sharing: list[str] = []
        self._held: int | None = None
        folder = folder or Path(tempfile.gettempdir()) / f"tuner-cores-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                return
            for path in sorted(folder.iterdir()):
                self._look_at(path, set(cores))
            self._file = folder / f"{os.getpid()}-{os.urandom(4).hex()}"
            self._held = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._held, fcntl.LOCK_EX)
            os.write(self._held, json.dumps({"cores": list(cores), "name": name}).encode())
        except (OSError, ValueError):  # without it, nobody is warned
            return

    def _look_at(self, path: Path, cores: set[int]) -> None:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # its server lives
                claim = json.loads(file.read() or b"{}")
                if cores.intersection(claim.get("cores", ())):
                    self.sharing = sorted([*self.sharing, str(claim["name"])])
            else:
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of them."""
        if self._held is not None:
            self._file.unlink(missing_ok=True)
            os.close(self._held)
            self._held = None
