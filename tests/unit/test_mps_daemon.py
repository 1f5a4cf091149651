"""The life cycle of an MPS control daemon, against an executable that stands in for NVIDIA's.

The same claims are made of the real one in tests/gpu/test_mps.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tuner_core.errors import ConflictError, TunerError
from tuner_server.gpu.lock import LOCK_DIRECTORY
from tuner_server.gpu.mps import MpsDaemon, Termination, pipe_directory_for
from tuner_server.gpu.mps_processes import find_mps_processes

STANDIN = Path(__file__).parents[1] / "gpu_standin"
CONTROL = STANDIN / "nvidia-cuda-mps-control"
CLIENT = [sys.executable, str(STANDIN / "mps_client.py"), "work"]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Short, since pipes are sockets: where a path is too long for one, the daemon takes another place for them."""
    with tempfile.TemporaryDirectory(prefix="mps-") as short:
        yield Path(short)


@pytest.fixture
def gpu() -> Iterator[str]:
    name = f"GPU-{uuid.uuid4()}"
    yield name
    (LOCK_DIRECTORY / f"tuner-{name}.lock").unlink(missing_ok=True)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "mps"
    for left in ("mps", "other"):
        for process in find_mps_processes(pipe_directory_for(tmp_path / left), CONTROL.name):
            process.signal(signal.SIGKILL)


@contextlib.asynccontextmanager
async def running(gpu: str, directory: Path, **options: object) -> AsyncIterator[MpsDaemon]:
    daemon = MpsDaemon(gpu, directory, control=str(CONTROL), watch_interval_s=0.05, **options)  # type: ignore[arg-type]
    await daemon.start()
    try:
        yield daemon
    finally:
        await daemon.stop()


def client(daemon: MpsDaemon) -> subprocess.Popen[str]:
    process = subprocess.Popen(CLIENT, env={**os.environ, **daemon.client_env}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "attached\n"
    return process


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Waits for something that must happen; the test run's own limit ends it if it does not."""
    for _ in range(600):
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen")


def mps_processes(daemon: MpsDaemon) -> list[int]:
    return [process.pid for process in find_mps_processes(daemon.pipe_directory, CONTROL.name)]


def test_it_starts_answers_and_leaves_nothing_behind(gpu: str, directory: Path) -> None:
    async def body() -> None:
        async with running(gpu, directory) as daemon:
            assert await daemon.healthy()
            assert daemon.pid in mps_processes(daemon)
            assert (directory / "pipe").stat().st_mode & 0o077 == 0
            worker = client(daemon)
            assert [known.pid for known in await daemon.clients()] == [worker.pid]
        assert worker.wait() == 3
        assert mps_processes(daemon) == []
        assert list((directory / "pipe").iterdir()) == []

    asyncio.run(body())


def test_one_server_per_gpu(gpu: str, directory: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with running(gpu, directory):
            other = MpsDaemon(gpu, tmp_path / "other", control=str(CONTROL))
            with pytest.raises(ConflictError, match=rf"pid {os.getpid()}\) uses the GPU {gpu}"):
                await other.start()
        async with running(gpu, tmp_path / "other"):
            pass  # free again

    asyncio.run(body())


SERVER = """
import asyncio, json, sys
from pathlib import Path
from tuner_server.gpu.lock import LOCK_DIRECTORY
from tuner_server.gpu.mps import MpsDaemon
async def main():
    daemon = MpsDaemon(sys.argv[1], Path(sys.argv[2]), control=sys.argv[3])
    await daemon.start()
    print(json.dumps(daemon.client_env), flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def test_a_killed_servers_daemon_is_cleared_away_and_no_other(gpu: str, directory: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, gpu, str(directory), str(CONTROL)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=STANDIN.parents[1])
    assert server.stdout is not None
    env = json.loads(server.stdout.readline())
    left_client = subprocess.Popen(CLIENT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
    assert left_client.stdout is not None and left_client.stdout.readline() == "attached\n"
    server.kill()
    server.wait()
    left = {process.pid for process in find_mps_processes(directory / "pipe", CONTROL.name)}
    assert len(left) == 2  # daemon and server outlive it

    async def body() -> None:
        async with running(f"{gpu}-2", tmp_path / "other") as other, running(gpu, directory) as daemon:
            assert left.isdisjoint(mps_processes(daemon))
            assert await other.healthy()  # somebody else's
            assert await daemon.healthy()

    asyncio.run(body())
    (LOCK_DIRECTORY / f"tuner-{gpu}-2.lock").unlink()
    assert left_client.wait() == 3


def test_a_dead_daemon_is_noticed_and_revived(gpu: str, directory: Path) -> None:
    async def body() -> None:
        died = asyncio.Event()
        async with running(gpu, directory) as daemon:
            daemon.on_death = died.set
            worker = client(daemon)
            first = daemon.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await died.wait()
            assert worker.wait() == 3  # its server is ended too: new clients could not join it
            assert not await daemon.healthy()
            assert await daemon.revive()
            assert daemon.pid != first
            assert await daemon.healthy()
            assert not await daemon.revive()
            client(daemon).kill()

    asyncio.run(body())


def test_what_came_and_went_under_fire_is_stopped_in_the_end(gpu: str, directory: Path) -> None:
    async def body() -> None:
        async with running(gpu, directory) as daemon:
            daemon.on_death = (died := asyncio.Event()).set
            first = client(daemon)
            (server,) = await daemon.servers()
            os.kill(server, signal.SIGKILL)
            assert first.wait() == 3
            second = client(daemon)  # the daemon starts another server for it
            assert daemon.pid is not None
            os.kill(daemon.pid, signal.SIGKILL)
            await died.wait()
            assert second.wait() == 3
            assert await daemon.revive()
            third = client(daemon)
            assert len(mps_processes(daemon)) == 2
        assert third.wait() == 3
        assert mps_processes(daemon) == []

    asyncio.run(body())


def test_it_is_not_revived_by_who_asks_while_it_is_stopped(gpu: str, directory: Path) -> None:
    async def body() -> None:
        async with running(gpu, directory) as daemon:
            stopping = asyncio.create_task(daemon.stop())
            await asyncio.sleep(0)
            with pytest.raises(TunerError, match="has not been started"):
                await daemon.revive()
            await stopping
            assert mps_processes(daemon) == []

    asyncio.run(body())


def test_terminating_a_client_leaves_its_neighbour_alone_and_killing_one_does_not(gpu: str, directory: Path) -> None:
    async def body() -> None:
        async with running(gpu, directory) as daemon:
            first, second, third = client(daemon), client(daemon), client(daemon)
            assert await daemon.terminate_client(first.pid) is Termination.ACCEPTED
            assert first.wait() == 3
            assert {known.pid for known in await daemon.clients()} == {second.pid, third.pid}
            assert await daemon.terminate_client(first.pid) is Termination.NO_CLIENT
            second.kill()
            assert third.wait() == 3

    asyncio.run(body())


def test_a_daemon_that_does_not_start_says_why_and_frees_the_gpu(gpu: str, directory: Path) -> None:
    directory.mkdir()
    (directory / "refuse-start").touch()

    async def body() -> None:
        with pytest.raises(TunerError, match="did not start: Failed to start: the driver is not loaded"):
            async with running(gpu, directory):
                pass
        (directory / "refuse-start").unlink()
        async with running(gpu, directory):
            pass

    asyncio.run(body())


def test_an_operators_daemon_is_used_and_left_running(gpu: str, directory: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with running(gpu, directory) as operators:
            environment = {**os.environ, **operators.client_env}
            external = MpsDaemon(gpu, tmp_path / "x", control=str(CONTROL), external=True, environment=environment)
            await external.start()
            assert external.pipe_directory == operators.pipe_directory
            worker = client(external)
            assert await external.terminate_client(worker.pid)
            await external.stop()
            assert await operators.healthy()
        with pytest.raises(TunerError, match="no MPS control daemon answers at"):
            await external.start()

    asyncio.run(body())


def test_its_log_goes_to_ours_without_the_noise(gpu: str, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with running(gpu, directory) as daemon:
            worker = client(daemon)
            await until(lambda: any("Starting new server" in line for line in caplog.messages))
            (server,) = await daemon.servers()
            os.kill(server, signal.SIGKILL)
            worker.wait()
            await until(lambda: daemon_knows_no_server(daemon))
            await until(lambda: any(f"Server {server} exited" in line for line in caplog.messages))

    async def daemon_knows_no_server(daemon: MpsDaemon) -> bool:
        return not await daemon.servers()

    with caplog.at_level(logging.DEBUG, "tuner_server.gpu"):
        asyncio.run(body())
    assert not any("valid credentials" in line for line in caplog.messages)


def test_a_long_data_directory_still_gives_sockets_that_fit(gpu: str, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)

    async def body() -> None:
        async with running(gpu, deep) as daemon:
            assert len(str(daemon.pipe_directory)) < 80
            assert daemon.pipe_directory.stat().st_mode & 0o077 == 0
            client(daemon).kill()
        assert not daemon.pipe_directory.exists()

    asyncio.run(body())
