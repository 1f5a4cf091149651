"""The prefork process and its children: forks of a process that has TVM, deadlines, pauses, deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.process_state import gone, open_files, state, until, wait_until
from tuner_core.errors import TunerError
from tuner_server.processes.handle import Child, ChildDied, ChildError, ChildTimeout
from tuner_server.processes.spawner import Spawner

ODD = {"odd": "tests.integration.odd_role"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def spawner(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawner]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        spawner = Spawner(tmp_path_factory.mktemp("logs"), ODD)
        runner.run(spawner.start())
        yield spawner
        runner.run(spawner.stop())


def test_a_child_is_a_fork_of_a_process_that_has_tvm(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        core = min(os.sched_getaffinity(0))
        child = await spawner.spawn("odd", {}, name="fork", env={"TVM_NUM_THREADS": "1"}, affinity=[core], nice=3)
        facts = await child.request("facts", {}, 20)
        assert facts["parent"] == spawner.pid
        assert facts["tvm"] is True
        assert facts["env"]["TVM_NUM_THREADS"] == "1"
        assert facts["affinity"] == [core]
        assert facts["nice"] == os.nice(0) + 3
        assert facts["group"] == child.pid
        await child.close()
        assert child.exited.result() == 0

    runner.run(check())


def test_errors_keep_their_kind_and_the_child_goes_on(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        child = await spawner.spawn("odd", {}, name="errors")
        with pytest.raises(ChildError, match="too slow") as refused:
            await child.request("refuse", {"kind": "run_error", "message": "too slow"})
        assert refused.value.kind == "run_error"
        with pytest.raises(ChildError, match="KeyError") as broken:
            await child.request("break", {})
        assert broken.value.kind == "internal"
        assert await child.request("echo", {"still": "here"}) == {"still": "here"}
        await child.close()

    runner.run(check())


def test_time_spent_paused_is_not_part_of_a_deadline(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        child = await spawner.spawn("odd", {}, name="pause")
        child.pause()
        request = asyncio.create_task(child.request("work", {"cpu_s": 0.1}, timeout_s=2.5))
        assert await until(lambda: state(child.pid) == "T"), "the process was not stopped"
        await asyncio.sleep(2.8)  # longer than the deadline
        assert not request.done()
        child.resume()
        assert await request == {}
        await child.close()

    runner.run(check())


def test_a_deadline_still_counts_the_time_between_pauses(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        child = await spawner.spawn("odd", {}, name="pauses")
        request = asyncio.create_task(child.request("sleep", {"s": 3600}, timeout_s=0.5))
        while not request.done():
            child.pause()
            await asyncio.sleep(0.05)
            child.resume()
            await asyncio.sleep(0.05)
        with pytest.raises(ChildTimeout):
            request.result()

    runner.run(asyncio.wait_for(check(), 30))


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_giving_up_on_a_child_kills_it_and_what_it_started(runner: asyncio.Runner, spawner: Spawner, how: str) -> None:
    async def check() -> None:
        child = await spawner.spawn("odd", {}, name="hang")
        compiler = (await child.request("start_compiler", {}))["pid"]
        if how == "timeout":
            with pytest.raises(ChildTimeout, match="hang did not answer"):
                await child.request("sleep", {"s": 3600}, timeout_s=0.1)
        else:
            request = asyncio.create_task(child.request("sleep", {"s": 3600}))
            await asyncio.sleep(0.1)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        assert await asyncio.wait_for(child.exited, 20) == -signal.SIGKILL
        assert await until(lambda: gone(compiler)), "what the child had started was left behind"
        with pytest.raises(ChildDied):
            await child.request("echo", {})

    runner.run(check())


def test_a_caller_may_keep_the_killing_to_itself(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        child = await spawner.spawn("odd", {}, name="spared")
        with pytest.raises(ChildTimeout):
            await child.request("sleep", {"s": 3600}, timeout_s=0.1, kill=False)
        await asyncio.sleep(0.2)
        assert child.alive
        with pytest.raises(ChildDied):  # the answer to the first would be taken for the answer to the second
            await asyncio.wait_for(child.request("echo", {}), 20)
        child.kill()
        assert await child.exited == -signal.SIGKILL

    runner.run(check())


def test_a_child_that_dies_says_how(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        ended: list[Child] = []
        child = await spawner.spawn("odd", {}, name="exits", on_exit=ended.append)
        with pytest.raises(ChildDied, match="exit code 7"):
            await child.request("exit", {"code": 7})
        assert ended == [child]
        child = await spawner.spawn("odd", {}, name="aborts")
        with pytest.raises(ChildDied, match="SIGABRT") as died:
            await child.request("abort", {})
        assert died.value.code == -signal.SIGABRT

    runner.run(check())


def test_a_child_that_ignores_the_close_is_killed(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        child = await spawner.spawn("odd", {"stubborn": True}, name="stubborn")
        child.pause()
        await child.close(grace_s=0.2)
        assert child.exited.result() == -signal.SIGKILL

    runner.run(check())


def test_children_leave_neither_descriptors_nor_zombies(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def many() -> list[int]:
        config = {"padding": "x" * 20_000}  # more than the control socket buffers at once
        children = await asyncio.gather(*(spawner.spawn("odd", config, name="many") for _ in range(40)))
        assert len({child.pid for child in children}) == 40
        answers = await asyncio.gather(*(child.request("echo", {"n": n}) for n, child in enumerate(children)))
        assert [answer["n"] for answer in answers] == list(range(40))
        await asyncio.gather(*(child.close() for child in children))
        return [child.pid for child in children]

    runner.run(many())
    before = open_files()
    pids = runner.run(many())
    assert open_files() <= before
    assert all(state(pid) == "" for pid in pids)


def test_the_death_of_the_prefork_process_takes_its_children_and_is_recovered_from(
    runner: asyncio.Runner, spawner: Spawner
) -> None:
    async def check() -> None:
        old = spawner.pid
        assert old is not None
        children = [await spawner.spawn("odd", {}, name=f"orphan-{index}") for index in range(2)]
        asked = asyncio.create_task(children[0].request("sleep", {"s": 3600}))
        children[1].pause()
        await asyncio.sleep(0.05)
        os.kill(old, signal.SIGKILL)
        fresh = await spawner.spawn("odd", {}, name="fresh")  # at once, before the death was noticed
        assert spawner.pid not in (None, old)
        with pytest.raises(ChildDied):
            await asyncio.wait_for(asked, 20)
        assert await until(lambda: all(gone(child.pid) for child in children)), "a child outlived the prefork process"
        assert all(child.exited.done() for child in children)
        again = await spawner.spawn("odd", {}, name="again")
        for child in (fresh, again):
            assert await child.request("echo", {"a": 1}, 20) == {"a": 1}
            await child.close()

    runner.run(check())


_SERVER = """
import asyncio, sys
from pathlib import Path
from tuner_server.processes.spawner import Spawner

async def main():
    spawner = Spawner(Path(sys.argv[1]), {"odd": "tests.integration.odd_role"})
    busy = await spawner.spawn("odd", {}, name="busy")
    paused = await spawner.spawn("odd", {}, name="paused")
    request = asyncio.create_task(busy.request("work", {"cpu_s": 3600}))
    paused.pause()
    print(spawner.pid, busy.pid, paused.pid, flush=True)
    await request

asyncio.run(main())
"""


def test_a_killed_server_leaves_no_orphan(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert server.stdout is not None
    pids = [int(word) for word in server.stdout.readline().split()]
    assert len(pids) == 3 and not any(gone(pid) for pid in pids)
    server.kill()
    server.wait()
    server.stdout.close()
    assert wait_until(lambda: all(gone(pid) for pid in pids)), f"left behind: {[p for p in pids if not gone(p)]}"


def test_a_failed_start_says_why_and_where_to_look(runner: asyncio.Runner, tmp_path: Path) -> None:
    broken = Spawner(tmp_path, {"odd": "tests.no_such_role"})
    with pytest.raises(TunerError) as failed:
        runner.run(broken.start())
    message = str(failed.value)
    assert "\n" not in message
    assert "exit code 1" in message
    assert "No module named 'tests.no_such_role'" in message
    assert str(tmp_path / "zygote.log") in message
    assert "No module named" in (tmp_path / "zygote.log").read_text()
    runner.run(broken.stop())


def test_an_unwritable_log_directory_is_one_line(runner: asyncio.Runner, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a directory should be")
    with pytest.raises(TunerError, match="cannot start the process that loads TVM"):
        runner.run(Spawner(tmp_path / "logs", ODD).start())
