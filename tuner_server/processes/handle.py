"""The server's handle on one child process: ask it for work, pause it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner_server import timeline
from tuner_server.processes import frames

_TAIL_BYTES = 32 << 10  # of a child's log; TVM puts a kernel's whole source into some errors


class ChildError(Exception):
    """A child answered with an error; ``kind`` says which."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ChildDied(Exception):
    """A child ended before it answered.

    Attributes:
        code: Its exit code, negative for a signal, None when unknown.
        output: The end of what it wrote to its log since it got the request.
    """

    def __init__(self, name: str, code: int | None, output: str = "") -> None:
        super().__init__(f"{name} ended before it answered ({describe_exit(code)})")
        self.code = code
        self.output = output


class ChildTimeout(Exception):
    """A child did not answer within its deadline, and was killed."""


def describe_exit(code: int | None) -> str:
    """An exit code in words: ``exit code 1``, ``signal SIGKILL``."""
    if code is None:
        return "exit unknown"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


class Child:
    """One forked process and its request socket. Requests are answered one at a time, in order.

    Attributes:
        name: For logs, e.g. ``build-3``.
        pid: Process id, also the id of its process group.
        role: What it does: ``search``, ``build``, ``measure``.
        exited: Done when the process has ended and was reaped; its result is the exit code.
        log: File that it writes its standard output and error to; None when that is unknown.
    """

    def __init__(
        self,
        name: str,
        pid: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: Path | None = None,
        role: str = "",
    ) -> None:
        self.name = name
        self.pid = pid
        self.log = log
        self.role = role
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()
        self._ids = itertools.count()
        self._paused_since: float | None = None
        self._paused_total_s = 0.0
        self._abandoned = False
        self.exited.add_done_callback(lambda _: self._close_when_idle())

    @property
    def alive(self) -> bool:
        """Whether the process has not been reaped yet."""
        return not self.exited.done()

    @property
    def paused(self) -> bool:
        """Whether :meth:`pause` holds the process."""
        return self._paused_since is not None

    async def request(
        self, op: str, args: Mapping[str, Any], timeout_s: float | None = None, *, kill: bool = True
    ) -> dict[str, Any]:
        """Ask for one operation and wait for its answer.

        Args:
            op: Operation, a key of the role's handlers.
            args: JSON-serialisable arguments.
            timeout_s: Deadline from the moment the child gets the request, time spent paused not counted. On expiry
                the process group is killed. The same happens when the caller is cancelled.
            kill: False leaves the killing to the caller, who must end the process: it takes no more requests.

        Raises:
            ChildError: The child answered with an error.
            ChildDied: The child ended first.
            ChildTimeout: The deadline passed; the child is being killed.
        """
        async with self._lock:
            if not self.alive or self._abandoned:
                raise ChildDied(self.name, self.exited.result() if self.exited.done() else None)
            message = frames.encode({"id": next(self._ids), "op": op, "args": dict(args)})
            log_start = _size(self.log)
            exchange = asyncio.ensure_future(self._exchange(message))
            try:
                with timeline.slice(self.role, self.name, op) as about:
                    reply = await self._within(exchange, timeout_s)
                    about["cpu_s"] = (reply or {}).get("cpu_s", 0.0)
                    if "device_s" in (measured := (reply or {}).get("result", {})):
                        about["device_s"] = round(measured["device_s"], 6)
            except BaseException:  # also when the caller is cancelled: the answer would confuse the next request
                exchange.cancel()
                self._abandoned = True
                if kill:
                    self.kill()
                raise
            finally:
                if self.exited.done():
                    self._writer.close()
            if reply is None:
                self._abandoned = True
                code = await self._exit_code()
                raise ChildDied(self.name, code, _tail(self.log, log_start))
            if "error" in reply:
                raise ChildError(reply["error"]["kind"], reply["error"]["message"])
            result: dict[str, Any] = reply["result"]
            return result

    async def _exchange(self, message: bytes) -> dict[str, Any] | None:
        try:
            self._writer.write(message)
            await self._writer.drain()
            return await frames.receive_async(self._reader)
        except (ConnectionError, frames.FrameError, ValueError):  # a child may be broken in any way
            return None

    async def _within(
        self, answer: asyncio.Future[dict[str, Any] | None], timeout_s: float | None
    ) -> dict[str, Any] | None:
        start = self._active_clock()
        while True:
            left = None if timeout_s is None else timeout_s - (self._active_clock() - start)
            if left is not None and left <= 0:
                raise ChildTimeout(f"{self.name} did not answer within {timeout_s:g} s and was killed")
            done, _ = await asyncio.wait({answer}, timeout=left)
            if done:
                return answer.result()

    def _active_clock(self) -> float:
        """A clock that stands still while the process is paused."""
        now = time.monotonic()
        paused = self._paused_total_s + (now - self._paused_since if self._paused_since is not None else 0.0)
        return now - paused

    def _close_when_idle(self) -> None:
        if not self._lock.locked():
            self._writer.close()

    async def _exit_code(self) -> int | None:
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self.exited), 2.0)
        return None

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def pause(self) -> None:
        """Stop the process group (SIGSTOP) until :meth:`resume`; its deadlines stand still."""
        if self._paused_since is None:
            self._paused_since = time.monotonic()
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process group go on."""
        if self._paused_since is not None:
            self._paused_total_s += time.monotonic() - self._paused_since
            self._paused_since = None
            self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL the process group."""
        self._signal(signal.SIGKILL)

    def hang_up(self) -> None:
        """Close the socket: the role ends by itself when it is done with its present request."""
        self.resume()
        self._abandoned = True
        self._writer.close()

    async def close(self, grace_s: float = 2.0) -> None:
        """Hang up, and kill the process when it has not ended within ``grace_s``."""
        self.hang_up()
        try:
            await asyncio.wait_for(asyncio.shield(self.exited), grace_s)
        except TimeoutError:
            self.kill()
            await self._exit_code()


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


def _tail(path: Path | None, start: int) -> str:
    """The end of a file's text after ``start``."""
    if path is None:
        return ""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read(_TAIL_BYTES).decode(errors="replace")
    return ""
