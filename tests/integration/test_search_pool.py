"""Search sessions on real processes and real design spaces."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.process_state import state, until
from tests.integration.small_workloads import LLVM, copy_of, matmul
from tuner_core.compiler.trace import apply_trace
from tuner_core.compiler.workload import module_from_body
from tuner_server.processes.spawner import Spawner
from tuner_server.search.pool import KnownTrial, SearchFailed, SearchLost, SearchPool, SearchSettings

CUDA_WITHOUT_ROOM = (
    '{"kind":"cuda","arch":"sm_90","max_threads_per_block":1024,"max_shared_memory_per_block":16,"thread_warp_size":32}'
)
SETTINGS = SearchSettings(attempts_per_candidate=24)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def spawner(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawner]:
    spawner = Spawner(tmp_path_factory.mktemp("logs"))
    runner.run(spawner.start())
    yield spawner
    runner.run(spawner.stop())


@pytest.fixture(scope="module")
def pool(runner: asyncio.Runner, spawner: Spawner) -> Iterator[SearchPool]:
    pool = SearchPool(spawner, 1, SETTINGS)
    yield pool
    runner.run(pool.stop())


def decisions(trace: str) -> list[Any]:
    return [decision for _, decision in json.loads(trace)[1]]


def test_candidates_apply_to_their_workload_and_never_repeat(runner: asyncio.Runner, pool: SearchPool) -> None:
    workload = matmul()

    async def check() -> list[str]:
        await pool.open("repeat", workload, LLVM, seed=1)
        first = await pool.generate("repeat", 20)
        second = await pool.generate("repeat", 20)  # the first batch is still out
        await pool.report("repeat", [KnownTrial(trace, 50.0 + n) for n, trace in enumerate(first)])
        third = await pool.generate("repeat", 20)
        await pool.close("repeat")
        return first + second + third

    traces = runner.run(check())
    assert len(traces) == 60
    import tvm_ffi

    mod = module_from_body(workload.body)
    modules = {tvm_ffi.structural_hash(apply_trace(mod, trace).mod) for trace in traces}
    assert len(modules) == 60


def test_equal_seeds_give_equal_candidates(runner: asyncio.Runner, pool: SearchPool) -> None:
    async def draw(seed: int) -> list[str]:
        await pool.open("seed", matmul(), LLVM, seed=seed)
        traces = await pool.generate("seed", 5)
        await pool.close("seed")
        return traces

    assert runner.run(draw(5)) == runner.run(draw(5)) != runner.run(draw(6))


def test_known_trials_are_learned_from_and_not_proposed_again(runner: asyncio.Runner, pool: SearchPool) -> None:
    def cost(trace: str) -> float:  # unrolling is good: the last choice of the categorical decision
        return 100.0 / (1 + max(d for d in decisions(trace) if isinstance(d, int)))

    async def check() -> tuple[list[str], list[str], list[str]]:
        await pool.open("cold", matmul(), LLVM, seed=2)
        before = await pool.generate("cold", 48)
        await pool.close("cold")
        known = [KnownTrial(trace, cost(trace)) for trace in before]
        await pool.open("warm", matmul(), LLVM, seed=2, known=known)
        after = await pool.generate("warm", 24)
        await pool.report("warm", [KnownTrial(trace, None) for trace in after[:12]])
        last = await pool.generate("warm", 12)
        await pool.close("warm")
        return before, after, last

    before, after, last = runner.run(check())
    assert not set(after) & set(before)
    assert not set(last) & set(before + after)
    average_before = sum(map(cost, before)) / len(before)
    average_after = sum(map(cost, after)) / len(after)
    assert average_after < 0.75 * average_before


def test_a_space_with_few_schedules_ends_empty_and_not_with_an_error(runner: asyncio.Runner, pool: SearchPool) -> None:
    async def check() -> list[list[str]]:
        await pool.open("few", copy_of(2), LLVM, seed=3)
        batches = [await pool.generate("few", 16) for _ in range(4)]
        await pool.close("few")
        return batches

    batches = runner.run(check())
    found = [trace for batch in batches for trace in batch]
    assert found
    assert len(set(found)) == len(found)
    assert batches[-1] == []


def test_a_task_without_a_valid_schedule_says_what_rejected_them(runner: asyncio.Runner, pool: SearchPool) -> None:
    async def check() -> None:
        await pool.open("never", matmul(), CUDA_WITHOUT_ROOM, seed=4)
        with pytest.raises(SearchFailed, match="shared memory: "):
            await pool.generate("never", 2)
        await pool.close("never")

    runner.run(check())


def test_a_workload_that_cannot_be_read_is_refused(runner: asyncio.Runner, pool: SearchPool) -> None:
    import dataclasses

    async def check() -> None:
        with pytest.raises(SearchFailed, match="IR"):
            await pool.open("broken", dataclasses.replace(matmul(), body="{}"), LLVM, seed=1)
        with pytest.raises(SearchLost):
            await pool.generate("broken", 1)

    runner.run(check())


def test_traces_of_other_tools_are_accepted_as_known(runner: asyncio.Runner, pool: SearchPool) -> None:
    async def check() -> list[str]:
        foreign = [KnownTrial("[[], []]", 3.0), KnownTrial("not JSON", None), KnownTrial('[[["Odd"]],[[0]]]', 1.0)]
        await pool.open("foreign", matmul(), LLVM, seed=1, known=foreign)
        traces = await pool.generate("foreign", 2)
        await pool.close("foreign")
        return traces

    assert len(runner.run(check())) == 2


def test_the_death_of_a_process_loses_its_sessions_and_no_others(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        pool = SearchPool(spawner, 2, SETTINGS)
        await asyncio.gather(*(pool.open(name, matmul(), LLVM, seed=1) for name in ("one", "two", "three")))
        victims = [slot for slot in pool._slots if "one" in slot.sessions]
        assert victims[0].child is not None
        os.kill(victims[0].child.pid, signal.SIGKILL)
        lost = sorted(victims[0].sessions)
        with pytest.raises(SearchLost, match="SIGKILL"):
            await pool.generate("one", 1)
        kept = {"one", "two", "three"} - set(lost)
        assert kept
        for name in kept:
            assert await pool.generate(name, 1)
        for name in lost:
            with pytest.raises(SearchLost):
                await pool.report(name, [KnownTrial("[[],[]]", 1.0)])
            await pool.open(name, matmul(), LLVM, seed=1)
            assert await pool.generate(name, 1)
        await pool.stop()

    runner.run(check())


def test_cancelling_a_request_spares_the_other_sessions_of_the_process(
    runner: asyncio.Runner, pool: SearchPool
) -> None:
    async def check() -> None:
        await pool.open("cancelled", matmul(), LLVM, seed=1)
        await pool.open("kept", matmul(), LLVM, seed=1)
        request = asyncio.create_task(pool.generate("cancelled", 64))
        await asyncio.sleep(0.05)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert await pool.generate("kept", 1)
        await pool.close("cancelled")
        await pool.close("kept")

    runner.run(check())


def test_a_paused_pool_stands_still_and_then_goes_on(runner: asyncio.Runner, pool: SearchPool) -> None:
    async def check() -> None:
        await pool.open("paused", matmul(), LLVM, seed=1)
        child = pool._slots[0].child
        assert child is not None
        pool.pause()
        request = asyncio.create_task(pool.generate("paused", 2))
        assert await until(lambda: state(child.pid) == "T")
        await asyncio.sleep(0.3)
        assert not request.done()
        pool.resume()
        assert len(await request) == 2
        await pool.close("paused")

    runner.run(check())


def test_a_stopped_pool_leaves_no_process(runner: asyncio.Runner, spawner: Spawner) -> None:
    async def check() -> None:
        pool = SearchPool(spawner, 1, SETTINGS)
        await pool.open("last", copy_of(8), LLVM, seed=1)
        child = pool._slots[0].child
        assert child is not None
        await pool.stop()
        assert not Path(f"/proc/{child.pid}").exists()
        with pytest.raises(SearchLost):
            await pool.generate("last", 1)

    runner.run(check())


def test_sessions_learn_from_those_they_share_with_and_from_no_others(runner: asyncio.Runner, pool: SearchPool) -> None:
    def cost(trace: str) -> float:  # the innermost factor of the columns, as vector code has it
        return 100.0 / decisions(trace)[1][-1]

    async def check() -> dict[str | None, float]:
        await pool.open("teacher", matmul(48), LLVM, seed=1, shared_with="a")
        for _ in range(3):
            await pool.report("teacher", [KnownTrial(t, cost(t)) for t in await pool.generate("teacher", 16)])
        costs: dict[str | None, float] = {}
        for group in ("a", "b", None):
            await pool.open(f"pupil of {group}", matmul(96), LLVM, seed=1, shared_with=group)
            costs[group] = sum(map(cost, await pool.generate(f"pupil of {group}", 16)))
        return costs

    costs = runner.run(check())
    assert costs["b"] == costs[None]  # as if nobody had searched before
    assert costs["a"] < 0.7 * costs["b"]


def test_a_batch_comes_in_pieces_and_the_next_one_after_it(runner: asyncio.Runner, pool: SearchPool) -> None:
    """The first candidates can be built while the others are applied; both batches are ranked in one go each."""

    async def check() -> tuple[list[tuple[int, bool]], list[int], list[int]]:
        await pool.open("pieces", matmul(), LLVM, seed=1)
        seen: list[tuple[int, bool]] = []
        order: list[int] = []

        async def take(batch: int, count: int) -> None:
            async for traces, more in pool.generate_in_pieces("pieces", count):
                seen.append((len(traces), more))
                order.append(batch)

        asked: list[int] = []
        request = pool._request

        async def spied(session: str, op: str, args: Any) -> dict[str, Any]:
            asked.append(args["following"])
            return await request(session, op, args)

        pool._request = spied  # type: ignore[method-assign]
        try:
            await asyncio.gather(take(1, 10), take(2, 8))
        finally:
            pool._request = request  # type: ignore[method-assign]
        await pool.close("pieces")
        return seen, order, asked

    seen, order, asked = runner.run(check())
    assert seen == [(4, True), (4, True), (2, False), (4, True), (4, False)]
    assert order == [1, 1, 1, 2, 2]
    assert asked == [6, 2, 0, 4, 0]
