"""The server's side of the prefork process: start children, talk to them, pause, kill and reap them."""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import json
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
from tuner_server import timeline
from tuner_server.processes import frames
from tuner_server.processes.zygote import ROLES

log = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0
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


class Spawner:
    """Starts the prefork process and forks children from it; restarts it when it has died.

    Args:
        log_dir: Children append their standard output and error to ``NAME.log`` there.
        roles: Role to the module whose ``main(sock, config)`` it runs.
    """

    def __init__(self, log_dir: Path, roles: Mapping[str, str] = ROLES) -> None:
        self._log_dir = log_dir
        self._roles = dict(roles)
        self._zygote: _Zygote | None = None
        self._starting = asyncio.Lock()
        self._tokens = itertools.count()
        self.tvm_version = ""

    @property
    def pid(self) -> int | None:
        """Process id of the prefork process; None when there is none."""
        return self._zygote.process.pid if self._zygote is not None and not self._zygote.ended else None

    async def start(self) -> None:
        """Start the prefork process and wait until it has imported TVM.

        Raises:
            TunerError: It ended instead, e.g. killed by SIGSEGV because of a wrong apache-tvm-ffi.
        """
        await self._running()

    async def _running(self) -> _Zygote:
        async with self._starting:
            zygote = self._zygote
            if zygote is not None:
                if not zygote.ended and zygote.process.poll() is None:
                    return zygote
                await asyncio.shield(zygote.reading)
                log.warning("the process that loads TVM ended (%s); starting it again", zygote.outcome)
            self._zygote = None
            self._zygote = await self._launch()
            return self._zygote

    async def _launch(self) -> _Zygote:
        log_path = self._log_dir / "zygote.log"
        process, ours = self._popen(log_path)
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.transport.set_write_buffer_limits(high=0)  # drain() means sent: ancillary data must not overtake
        try:
            hello = await asyncio.wait_for(frames.receive_async(reader), START_TIMEOUT_S)
        except TimeoutError:
            hello = None
        except BaseException:
            process.kill()
            writer.close()
            await asyncio.shield(asyncio.to_thread(process.wait))
            raise
        if hello is None:
            writer.close()
            code = await asyncio.to_thread(_end, process)
            raise TunerError(
                f"the process that loads TVM failed to start ({describe_exit(code)}: {_last_line(log_path)}); see "
                f"{log_path} and check that the pinned apache-tvm and apache-tvm-ffi are installed"
            )
        self.tvm_version = hello["ready"]
        return _Zygote(process, reader, writer)

    def _popen(self, log_path: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start it from this very thread: the kernel ties the life of a process to the thread that forked it."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tuner_server.processes.zygote", str(theirs.fileno()), str(os.getpid())]
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as log_file:
                process = subprocess.Popen(
                    [*command, json.dumps(self._roles)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a fork of a process with threads is not clean
                )
        except OSError as error:
            ours.close()
            raise TunerError(f"cannot start the process that loads TVM: {error}") from None
        finally:
            theirs.close()
        return process, ours

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
            ChildDied: The prefork process ended, and so did its successor.
            TunerError: It could not be started again.
        """
        log_path = self._log_dir / f"{name}.log"
        request = {
            "token": next(self._tokens),
            "role": role,
            "config": dict(config),
            "env": dict(env or {}),
            "affinity": list(affinity),
            "nice": nice,
            "address_space_bytes": address_space_bytes,
            "log": str(log_path),
        }
        ours, theirs = socket.socketpair()
        try:
            zygote = await self._running()
            try:
                pid = await zygote.fork(request, theirs)
            except ChildDied:  # it had died before, unnoticed
                zygote = await self._running()
                pid = await zygote.fork(request, theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        child = Child(name, pid, reader, writer, log_path, role)
        if on_exit is not None:
            child.exited.add_done_callback(lambda _: on_exit(child))
        zygote.adopt(child)
        return child

    async def stop(self) -> None:
        """Close every child, then the prefork process; nothing is left behind."""
        async with self._starting:
            zygote, self._zygote = self._zygote, None
            if zygote is not None:
                await zygote.stop()


class _Zygote:
    """One run of the prefork process: a restart is a new object, so that nothing of the old run reaches the new one."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.ended = False
        self._reader = reader
        self._writer = writer
        self._sending = asyncio.Lock()
        self._pending: dict[int, asyncio.Future[int]] = {}
        self._children: dict[int, Child] = {}
        self._early_exits: dict[int, int] = {}
        self.reading = asyncio.create_task(self._read())

    @property
    def outcome(self) -> str:
        """How it ended, in words."""
        return describe_exit(self.process.poll())

    async def fork(self, request: dict[str, Any], child_socket: socket.socket) -> int:
        """Ask for one child.

        Args:
            request: As :mod:`tuner_server.processes.zygote` reads it.
            child_socket: The child's end; stays open here.

        Returns:
            The child's process id.

        Raises:
            ChildDied: The prefork process ended first.
        """
        if self.ended:
            raise ChildDied("the process that loads TVM", self.process.poll())
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending[request["token"]] = waiter
        try:
            async with self._sending:
                await self._writer.drain()
                await self._pass_socket(child_socket)
                self._writer.write(frames.encode(request))
            return await waiter
        except OSError:
            raise ChildDied("the process that loads TVM", self.process.poll()) from None
        finally:
            self._pending.pop(request["token"], None)

    async def _pass_socket(self, child_socket: socket.socket) -> None:
        """One byte with the socket as ancillary data (unix(7), SCM_RIGHTS); the frame follows."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [child_socket.fileno()]))]
        with self._writer.get_extra_info("socket").dup() as control:
            while True:
                try:
                    control.sendmsg([b"\0"], rights)
                    return
                except BlockingIOError:
                    await asyncio.sleep(0.01)

    def adopt(self, child: Child) -> None:
        """Tell the child's ``exited`` when it ends."""
        self._children[child.pid] = child
        if child.pid in self._early_exits:
            self._note_exit(child.pid, self._early_exits.pop(child.pid))
        elif self.ended:
            self._note_exit(child.pid, -signal.SIGKILL)

    async def _read(self) -> None:
        while (message := await frames.receive_async(self._reader)) is not None:
            if "spawned" in message:
                waiter = self._pending.pop(message["spawned"], None)
                if waiter is not None and not waiter.done():
                    waiter.set_result(message["pid"])
            else:
                self._note_exit(message["exited"], message["code"])
        self.ended = True
        self._writer.close()
        code = await asyncio.to_thread(self.process.wait)
        for waiter in self._pending.values():
            if not waiter.done():
                waiter.set_exception(ChildDied("the process that loads TVM", code))
        for pid in list(self._children):  # the kernel kills them with it
            self._note_exit(pid, -signal.SIGKILL)

    def _note_exit(self, pid: int, code: int) -> None:
        child = self._children.pop(pid, None)
        if child is None:
            self._early_exits[pid] = code
        elif not child.exited.done():
            child.exited.set_result(code)

    async def stop(self) -> None:
        """Close every child, then the process."""
        await asyncio.gather(*(child.close() for child in list(self._children.values())))
        self._writer.close()
        await asyncio.to_thread(_end, self.process)
        await self.reading


def _end(process: subprocess.Popen[bytes]) -> int:
    """Its own exit code if it is about to exit, else that of a kill."""
    try:
        return process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


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


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no output")
