"""Life cycle of a CUDA MPS control daemon: one per GPU, owned by one server, private to it.

Protocol: https://docs.nvidia.com/deploy/mps/ . The control program takes one command on its standard input. The daemon
starts a server process at the first client; both inherit the daemon's environment, and by its pipe directory, which no
other daemon has, a server finds again what a predecessor left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tuner_core.errors import TunerError
from tuner_server.gpu.lock import GpuLock
from tuner_server.gpu.log_tail import LogTail
from tuner_server.gpu.mps_processes import MpsProcess, find_mps_processes

log = logging.getLogger(__name__)

CONTROL = "nvidia-cuda-mps-control"
DEFAULT_PIPE_DIRECTORY = Path("/tmp/nvidia-mps")
_SOCKET_PATH_LIMIT = 107  # sun_path, less its terminating zero
_LONGEST_NAME = "nvidia-cuda-mps-control.pid"  # of what the daemon puts into its pipe directory
_COMMAND_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 15.0
_QUIT_TIMEOUT_S = 5.0
_POLL_S = 0.05


class Termination(enum.IntEnum):
    """What came of asking the daemon to take a process off the GPU."""

    UNKNOWN = 0  # refused, or no answer
    ACCEPTED = 1
    NO_CLIENT = 2  # it is not on the GPU


@dataclass(frozen=True)
class MpsClient:
    """A process that uses the GPU through an MPS server."""

    server_pid: int
    pid: int


def find_control(name: str = CONTROL) -> str | None:
    """Path of the control program; None where MPS is not installed."""
    return shutil.which(name)


async def control_version(control: str) -> str:
    """What the control program says of its version, in one line; empty when it does not say."""
    try:
        process = await asyncio.create_subprocess_exec(
            control,
            "-v",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return ""
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _COMMAND_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return ""
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[0] if lines else ""


def pipe_directory_for(directory: Path) -> Path:
    """Where the daemon's sockets go: in ``directory`` if their paths fit into a socket address, else a short stand-in.

    Args:
        directory: The GPU's directory under the data directory.
    """
    direct = directory / "pipe"
    if len(str(direct / _LONGEST_NAME).encode()) <= _SOCKET_PATH_LIMIT:
        return direct
    digest = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"tuner-mps-{os.getuid()}-{digest}"


def _make_private(directory: Path) -> None:
    """Make a directory that only this user can enter.

    Raises:
        TunerError: It cannot be made, or another user has made it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.lstat()
    except OSError as error:
        raise TunerError(f"cannot make the MPS directory {directory}: {error.strerror}") from None
    if directory.is_symlink() or status.st_uid != os.getuid():
        raise TunerError(f"the MPS directory {directory} belongs to another user; remove it")
    directory.chmod(0o700)


class MpsDaemon:
    """The control daemon of one GPU.

    Args:
        uuid: The GPU.
        directory: Directory of this GPU under the server's data directory; holds pipes and logs.
        control: Path of the control program.
        external: Use the daemon that the operator runs (at CUDA_MPS_PIPE_DIRECTORY or the default place): it is neither
            started, stopped nor cleaned up.
        watch_interval_s: Seconds between looks at the daemon's process.

    Attributes:
        pipe_directory: CUDA_MPS_PIPE_DIRECTORY of its clients.
        log_directory: CUDA_MPS_LOG_DIRECTORY of its clients.
        on_death: Called in the event loop when the daemon is found dead; nothing is restarted until :meth:`revive`.
    """

    def __init__(
        self,
        uuid: str,
        directory: Path,
        *,
        control: str,
        external: bool = False,
        watch_interval_s: float = 0.5,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.uuid = uuid
        self.external = external
        environment = os.environ if environment is None else environment
        self._base_env = dict(environment)
        self._base_env.pop("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", None)  # a daemon's would cap all of its clients
        self._control = control
        self.on_death: Callable[[], None] | None = None
        self._watch_interval_s = watch_interval_s
        self._lock: GpuLock | None = None
        self._changing = asyncio.Lock()
        self._tail: LogTail | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[bool] | None = None
        self._process: MpsProcess | None = None
        if external:
            self.pipe_directory = Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", DEFAULT_PIPE_DIRECTORY))
            self.log_directory = Path(environment.get("CUDA_MPS_LOG_DIRECTORY", "/var/log/nvidia-mps"))
        else:
            self.pipe_directory = pipe_directory_for(directory)
            self.log_directory = directory / "log"

    @property
    def client_env(self) -> dict[str, str]:
        """Environment by which a process becomes a client of this daemon."""
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_directory),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log_directory),
        }

    @property
    def pid(self) -> int | None:
        """Process id of the daemon; None before a start, or when it is another's."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Take the GPU, clear away what a predecessor left, start the daemon (or find the operator's).

        Raises:
            ConflictError: Another server holds the GPU.
            TunerError: The daemon does not start; says why.
        """
        if self.external:
            if not await self.healthy():
                raise TunerError(
                    f"no MPS control daemon answers at {self.pipe_directory}; start it (nvidia-cuda-mps-control -d), "
                    "set CUDA_MPS_PIPE_DIRECTORY to its directory, or let the server run its own (mps: auto)"
                )
            return
        self._lock = GpuLock(self.uuid)
        try:
            async with self._changing:
                await self._launch()
        except BaseException:
            self._lock.release()
            self._lock = None
            raise
        self._tail = LogTail((self.log_directory / "control.log", self.log_directory / "server.log"), log)
        self._tail.start()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End the daemon and its servers, and give the GPU back. An operator's daemon is left alone."""
        for task in (self._watcher, self._reviving, self._tail):
            if task is not None:
                task.cancel()
        self._watcher = self._reviving = None
        if self._lock is None:
            return
        async with self._changing:
            await self._end(await asyncio.to_thread(self._remaining))
            self._process = None
            _empty(self.pipe_directory)
            if self.pipe_directory.name != "pipe":
                with contextlib.suppress(OSError):
                    self.pipe_directory.rmdir()
        if self._tail is not None:
            self._tail.drain()
            self._tail = None
        self._lock.release()
        self._lock = None

    async def revive(self) -> bool:
        """Start the daemon again if it is gone or does not answer; its remaining servers end with their clients.

        Returns:
            Whether it had to be started.

        Raises:
            TunerError: It does not start, or is an operator's and does not answer.
        """
        if self.external:
            if await self.healthy():
                return False
            raise TunerError(f"the MPS control daemon at {self.pipe_directory} does not answer; start it again")
        # one look for all who ask at the same time: after a fault every worker does
        if self._reviving is None or self._reviving.done():
            self._reviving = asyncio.create_task(self._revive())
        return await asyncio.shield(self._reviving)

    async def _revive(self) -> bool:
        async with self._changing:
            if self._lock is None:  # or a stop has come first: nobody would end what is started now
                raise TunerError("the MPS control daemon has not been started")
            if await self.healthy():
                return False
            log.warning("the MPS control daemon of %s is gone; starting it again", self.uuid)
            await self._launch()
            return True

    async def _launch(self) -> None:
        await self._end(await asyncio.to_thread(self._remaining))
        _make_private(self.pipe_directory.parent if self.pipe_directory.name == "pipe" else self.pipe_directory)
        _make_private(self.pipe_directory)
        _make_private(self.log_directory)
        _empty(self.pipe_directory)
        with tempfile.TemporaryFile() as output:
            process = await asyncio.create_subprocess_exec(
                self._control,
                "-d",
                env={**self._base_env, **self.client_env, "CUDA_VISIBLE_DEVICES": self.uuid},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,  # a file, not a pipe: the daemon keeps it open
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the server, which stops the daemon after its clients
            )
            try:
                code = await asyncio.wait_for(process.wait(), _START_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                raise TunerError(f"{self._control} -d did not return within {_START_TIMEOUT_S:g} s") from None
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()
        if code:
            raise TunerError(f"the MPS control daemon did not start: {said[-1] if said else f'exit code {code}'}")
        deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
        while not await self.healthy():
            if asyncio.get_running_loop().time() > deadline:
                raise TunerError("the MPS control daemon started but does not answer; see " + str(self.log_directory))
            await asyncio.sleep(_POLL_S)
        daemons = [found for found in await asyncio.to_thread(self._remaining) if found.is_control]
        self._process = daemons[0] if daemons else None
        log.info("MPS control daemon of %s runs (pid %s, pipes in %s)", self.uuid, self.pid, self.pipe_directory)

    def _remaining(self) -> list[MpsProcess]:
        return find_mps_processes(self.pipe_directory, Path(self._control).name)

    async def _end(self, processes: list[MpsProcess]) -> None:
        """End these processes: by command, then SIGTERM, then SIGKILL."""
        if not processes:
            return
        log.info("ending MPS processes %s of %s", [process.pid for process in processes], self.uuid)
        if any(process.is_control for process in processes):
            with contextlib.suppress(TunerError):
                await self.command("quit")
            await self._gone(_QUIT_TIMEOUT_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            # found anew: a daemon that answers "quit" may leave a server that it could not end
            for process in await asyncio.to_thread(self._remaining):
                process.signal(number)
            if await self._gone(2.0):
                return
        raise TunerError(f"MPS processes of {self.uuid} do not end; end them by hand: {self._remaining()}")

    async def _gone(self, timeout_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while await asyncio.to_thread(self._remaining):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _watch(self) -> None:
        """Notice the daemon's death: what is left of its servers is useless to new clients, so end that too."""
        reported: MpsProcess | None = None
        while True:
            await asyncio.sleep(self._watch_interval_s)
            process = self._process
            if process is None or process is reported or self._changing.locked() or process.alive():
                continue
            reported = process
            log.error("the MPS control daemon of %s (pid %d) has died", self.uuid, process.pid)
            async with self._changing:
                if process is self._process:
                    for left in await asyncio.to_thread(self._remaining):
                        left.signal(signal.SIGKILL)
            if self.on_death is not None:
                self.on_death()

    # Commands

    async def command(self, text: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
        """Give the daemon one command.

        Args:
            text: e.g. ``get_server_list``.
            timeout_s: Deadline.

        Returns:
            What it printed.

        Raises:
            TunerError: No daemon, a refused command, or no answer in time.
        """
        process = await asyncio.create_subprocess_exec(
            self._control,
            env={**self._base_env, **self.client_env},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(f"{text}\n".encode()), timeout_s)
        except TimeoutError:
            raise TunerError(f"the MPS control daemon did not answer {text!r} within {timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        said = output.decode(errors="replace").strip()
        if process.returncode:
            raise TunerError(f"MPS refused {text!r}: {said.splitlines()[-1] if said else process.returncode}")
        return said

    async def healthy(self) -> bool:
        """Whether the daemon answers a command."""
        try:
            await self.command("get_server_list")
        except TunerError:
            return False
        return True

    async def servers(self) -> list[int]:
        """Process ids of the MPS servers.

        Raises:
            TunerError: The daemon does not answer.
        """
        return _pids(await self.command("get_server_list"))

    async def clients(self) -> list[MpsClient]:
        """The clients of all servers.

        Raises:
            TunerError: The daemon does not answer.
        """
        found: list[MpsClient] = []
        for server in await self.servers():
            with contextlib.suppress(TunerError):  # a server that ended in between
                found += [MpsClient(server, pid) for pid in _pids(await self.command(f"get_client_list {server}"))]
        return found

    async def terminate_client(self, pid: int, timeout_s: float = 3.0) -> Termination:
        """Take a process off the GPU without harm to its neighbours.

        The process's CUDA calls fail from then on (cudaErrorMpsClientTerminated), also one in the middle of a kernel.
        It stays in the list of clients until it exits.

        Args:
            pid: The process.
            timeout_s: Deadline for the daemon's answers together.
        """
        try:
            async with asyncio.timeout(timeout_s):
                found = [client for client in await self.clients() if client.pid == pid]
                for client in found:
                    await self.command(f"terminate_client {client.server_pid} {client.pid}", timeout_s)
        except (TunerError, TimeoutError) as error:
            log.warning("cannot terminate MPS client %d: %s", pid, str(error) or f"no answer within {timeout_s:g} s")
            return Termination.UNKNOWN
        return Termination.ACCEPTED if found else Termination.NO_CLIENT

    async def is_client(self, pid: int, timeout_s: float = 1.5) -> bool:
        """Whether a process is, or may be, on the GPU.

        Args:
            pid: The process.
            timeout_s: Deadline for the daemon's answers together.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return any(client.pid == pid for client in await self.clients())
        except (TunerError, TimeoutError):
            return True


def _pids(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


def _empty(directory: Path) -> None:
    """Remove the daemon's files; only ever called on a pipe directory that is ours alone."""
    with contextlib.suppress(OSError):
        for entry in directory.iterdir():
            with contextlib.suppress(OSError):
                entry.unlink()
