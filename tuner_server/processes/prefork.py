"""The server's side of one run of the prefork process: have it fork, learn of ends, close it."""

from __future__ import annotations

import array
import asyncio
import signal
import socket
import subprocess
from typing import Any

from tuner_server.processes import frames
from tuner_server.processes.handle import Child, ChildDied, describe_exit


class Prefork:
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
        await asyncio.to_thread(wait_or_kill, self.process)
        await self.reading


def wait_or_kill(process: subprocess.Popen[bytes]) -> int:
    """Its own exit code if it is about to exit, else that of a kill."""
    try:
        return process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
