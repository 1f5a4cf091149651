"""The server's side of the prefork process: start children, talk to them, pause, kill and reap them."""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner_core.errors import TunerError
from tuner_server.processes import frames

log = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0


class ChildError(Exception):
    """A child answered with an error; ``kind`` says which."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ChildDied(Exception):
    """A child ended before it answered. ``code`` is its exit code, negative for a signal, None when unknown."""

    def __init__(self, name: str, code: int | None) -> None:
        super().__init__(f"{name} ended before it answered ({describe_exit(code)})")
        self.code = code


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
        exited: Done when the process has ended and was reaped; its result is the exit code.
    """

    def __init__(self, name: str, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self.pid = pid
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()
        self._ids = itertools.count()
        self._paused_since: float | None = None
        self._paused_total_s = 0.0

    @property
    def alive(self) -> bool:
        """Whether the process has not been reaped yet."""
        return not self.exited.done()

    @property
    def paused(self) -> bool:
        """Whether :meth:`pause` holds the process."""
        return self._paused_since is not None

    async def request(self, op: str, args: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Ask for one operation and wait for its answer.

        Args:
            op: Operation, a key of the role's handlers.
            args: JSON-serialisable arguments.
            timeout_s: Deadline from the moment the child gets the request, time spent paused not counted. On expiry
                the process group is killed.

        Raises:
            ChildError: The child answered with an error.
            ChildDied: The child ended first.
            ChildTimeout: The deadline passed; the child is being killed.
        """
        async with self._lock:
            if not self.alive:
                raise ChildDied(self.name, self.exited.result())
            request_id = next(self._ids)
            try:
                self._writer.write(frames.encode({"id": request_id, "op": op, "args": dict(args)}))
                await self._writer.drain()
            except ConnectionError:
                raise ChildDied(self.name, await self._exit_code()) from None
            answer = asyncio.ensure_future(frames.receive_async(self._reader))
            try:
                reply = await self._within(answer, timeout_s)
            except BaseException:  # also when the caller is cancelled: the answer would confuse the next request
                answer.cancel()
                self.kill()
                raise
            if reply is None:
                raise ChildDied(self.name, await self._exit_code())
            if "error" in reply:
                raise ChildError(reply["error"]["kind"], reply["error"]["message"])
            result: dict[str, Any] = reply["result"]
            return result

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

    async def _exit_code(self) -> int | None:
        with contextlib.suppress(asyncio.TimeoutError):
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

    async def close(self, grace_s: float = 2.0) -> None:
        """Close the socket, on which the role ends by itself; kill it when it has not within ``grace_s``."""
        self.resume()
        self._writer.close()
        try:
            await asyncio.wait_for(asyncio.shield(self.exited), grace_s)
        except asyncio.TimeoutError:
            self.kill()
            await self._exit_code()


class Spawner:
    """Starts the prefork process and forks children from it; restarts it when it has died.

    Args:
        log_dir: Children append their standard output and error to ``NAME.log`` there.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._tokens = itertools.count()
        self._pending: dict[int, asyncio.Future[int]] = {}
        self._children: dict[int, Child] = {}
        self._early_exits: dict[int, int] = {}
        self.tvm_version = ""

    @property
    def pid(self) -> int | None:
        """Process id of the prefork process."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the prefork process and wait until it has imported TVM.

        Raises:
            TunerError: It ended instead, e.g. killed by SIGSEGV because of a wrong apache-tvm-ffi.
        """
        async with self._starting:
            if self._process is not None and self._process.poll() is None and self._control is not None:
                return
            ours, theirs = socket.socketpair()
            self._log_dir.mkdir(parents=True, exist_ok=True)
            with open(self._log_dir / "zygote.log", "ab") as log_file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tuner_server.processes.zygote", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,
                )
            theirs.close()
            reader, _writer = await asyncio.open_connection(sock=ours.dup())
            try:
                hello = await asyncio.wait_for(frames.receive_async(reader), START_TIMEOUT_S)
            except asyncio.TimeoutError:
                hello = None
            if hello is None:
                self._process.kill()
                code = await asyncio.to_thread(self._process.wait)
                raise TunerError(
                    f"the process that loads TVM failed to start ({describe_exit(code)}); see "
                    f"{self._log_dir / 'zygote.log'} and check that the pinned apache-tvm and apache-tvm-ffi are installed"
                )
            self.tvm_version = hello["ready"]
            self._control = ours
            self._reader_task = asyncio.create_task(self._read(reader, self._process))

    async def _read(self, reader: asyncio.StreamReader, process: subprocess.Popen[bytes]) -> None:
        while (message := await frames.receive_async(reader)) is not None:
            if "spawned" in message:
                waiter = self._pending.pop(message["spawned"], None)
                if waiter is not None and not waiter.done():
                    waiter.set_result(message["pid"])
            else:
                self._note_exit(message["exited"], message["code"])
        code = await asyncio.to_thread(process.wait)
        if self._control is not None:
            self._control.close()
            self._control = None
        for waiter in self._pending.values():
            if not waiter.done():
                waiter.set_exception(ChildDied("zygote", code))
        self._pending.clear()
        for pid in list(self._children):  # they die with it
            self._note_exit(pid, -signal.SIGKILL)

    def _note_exit(self, pid: int, code: int) -> None:
        child = self._children.pop(pid, None)
        if child is None:
            self._early_exits[pid] = code
        elif not child.exited.done():
            child.exited.set_result(code)

    async def spawn(
        self,
        role: str,
        config: Mapping[str, Any],
        *,
        name: str,
        env: Mapping[str, str] | None = None,
        affinity: Sequence[int] = (),
        nice: int = 0,
        address_space_bytes: int = 0,
        on_exit: Callable[[Child], None] | None = None,
    ) -> Child:
        """Fork one child.

        Args:
            role: ``search``, ``build`` or ``measure``.
            config: Passed to the role's ``main(sock, config)``; JSON-serialisable.
            name: For logs; also the name of its log file.
            env: Environment variables set in the child before it runs.
            affinity: Cores to pin it to; empty: all.
            nice: Added to its niceness.
            address_space_bytes: RLIMIT_AS; 0: none.
            on_exit: Called in the event loop when the child has ended.

        Raises:
            ChildDied: The prefork process ended.
            TunerError: It could not be started again.
        """
        await self.start()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        token = next(self._tokens)
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending[token] = waiter
        request = {
            "token": token,
            "role": role,
            "config": dict(config),
            "env": dict(env or {}),
            "affinity": list(affinity),
            "nice": nice,
            "address_space_bytes": address_space_bytes,
            "log": str(self._log_dir / f"{name}.log"),
        }
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
        try:
            self._control.sendmsg([b"\0"], rights)
            frames.send(self._control, request)
        except OSError:
            self._pending.pop(token, None)
            ours.close()
            raise ChildDied("zygote", None) from None
        finally:
            theirs.close()
        pid = await waiter
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        child = Child(name, pid, reader, writer)
        if on_exit is not None:
            child.exited.add_done_callback(lambda _: on_exit(child))
        self._children[pid] = child
        if pid in self._early_exits:
            self._note_exit(pid, self._early_exits.pop(pid))
        return child

    async def stop(self) -> None:
        """Close every child, then the prefork process; nothing is left behind."""
        await asyncio.gather(*(child.close() for child in list(self._children.values())))
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, 5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._reader_task is not None:
            await self._reader_task
