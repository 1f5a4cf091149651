"""Starts the prefork process, again when it has died, and forks children from it."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner_core.errors import TunerError
from tuner_server.processes import frames
from tuner_server.processes.handle import Child, ChildDied, describe_exit
from tuner_server.processes.prefork import Prefork, wait_or_kill
from tuner_server.processes.zygote import ROLES

log = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0


class Spawner:
    """Starts the prefork process and forks children from it; restarts it when it has died.

    Args:
        log_dir: Children append their standard output and error to ``NAME.log`` there.
        roles: Role to the module whose ``main(sock, config)`` it runs.
    """

    def __init__(self, log_dir: Path, roles: Mapping[str, str] = ROLES) -> None:
        self._log_dir = log_dir
        self._roles = dict(roles)
        self._zygote: Prefork | None = None
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

    async def _running(self) -> Prefork:
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

    async def _launch(self) -> Prefork:
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
            code = await asyncio.to_thread(wait_or_kill, process)
            raise TunerError(
                f"the process that loads TVM failed to start ({describe_exit(code)}: {_last_line(log_path)}); see "
                f"{log_path} and check that the pinned apache-tvm and apache-tvm-ffi are installed"
            )
        self.tvm_version = hello["ready"]
        return Prefork(process, reader, writer)

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
        stand_back: bool = False,
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
            stand_back: Whether it runs only while nobody else wants its cores (SCHED_IDLE).
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
            "stand_back": stand_back,
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


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no output")
