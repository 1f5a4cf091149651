"""What runs inside a child process: take a request, do the work, answer; one at a time."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from tuner_server.processes import frames

Handler = Callable[[dict[str, Any]], dict[str, Any]]
_PR_SET_PDEATHSIG = 1
IDLE_S = 1.0
"""Without a request for so long a process has nothing to do."""


class WorkError(Exception):
    """A request failed in a way that its sender distinguishes.

    Attributes:
        kind: Short machine-readable word, e.g. a :class:`tuner_core.model.FailureKind` value.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def die_with_parent(expected_parent: int) -> None:
    """Ask the kernel to SIGKILL this process when its parent ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected_parent:  # it ended before the call took effect
        os._exit(1)


def one_line(error: BaseException, limit: int = 500) -> str:
    """An exception as one line for a record or a log: its type and the last non-empty line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:limit]


def cpu_s() -> float:
    """Processor time of this process, its threads, and the children that it has waited for, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def serve(sock: socket.socket, handlers: Mapping[str, Handler], idle: Callable[[], None] | None = None) -> None:
    """Answer requests until the peer closes.

    Args:
        sock: Connected stream socket; requests are ``{"id", "op", "args"}``.
        handlers: One function per operation; it raises :class:`WorkError` for failures with a kind.
        idle: Called once after a request (or the start) when no other has come within :data:`IDLE_S`.
    """
    while (request := _next_request(sock, idle)) is not None:
        reply: dict[str, Any] = {"id": request["id"]}
        before_s = cpu_s()
        try:
            reply["result"] = handlers[request["op"]](request["args"])
        except WorkError as error:
            reply["error"] = {"kind": error.kind, "message": str(error)}
        except Exception as error:
            traceback.print_exc()
            reply["error"] = {"kind": "internal", "message": one_line(error)}
        reply["cpu_s"] = round(cpu_s() - before_s, 4)
        frames.send(sock, reply)


def _next_request(sock: socket.socket, idle: Callable[[], None] | None) -> dict[str, Any] | None:
    if idle is not None and not select.select([sock], [], [], IDLE_S)[0]:
        idle()
    return frames.receive(sock)
