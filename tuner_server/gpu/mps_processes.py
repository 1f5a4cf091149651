"""Find the MPS processes that use a given pipe directory, and no others."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MpsProcess:
    """A control daemon or MPS server. With the start time a pid that was given to another process is told apart."""

    pid: int
    start_time: int
    is_control: bool

    def alive(self) -> bool:
        """Whether that very process still runs."""
        return _start_time(self.pid) == self.start_time

    def signal(self, number: int) -> None:
        """Send a signal, unless the process is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


def _start_time(pid: int) -> int | None:
    """Clock ticks between the host's boot and the start of a process (proc(5)); None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def find_mps_processes(pipe_directory: Path, control_name: str) -> list[MpsProcess]:
    """This user's MPS daemons and servers with that pipe directory in their environment.

    A control program that merely gives a command is not among them.

    Args:
        pipe_directory: CUDA_MPS_PIPE_DIRECTORY, as it was given to the daemon.
        control_name: File name of the control program.
    """
    wanted = b"CUDA_MPS_PIPE_DIRECTORY=" + os.fsencode(pipe_directory)
    found: list[MpsProcess] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            names = {os.path.basename(os.fsdecode(word)) for word in command[:4]}
            if not any(name.startswith("nvidia-cuda-mps-") or name == control_name for name in names):
                continue
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
        except OSError:
            continue
        started = _start_time(int(entry.name))
        if started is not None:
            is_control = control_name in names
            if is_control and b"-d" not in command:
                continue
            found.append(MpsProcess(int(entry.name), started, is_control))
    return found
