"""Builds in real processes: what comes out runs and is right, and nothing that goes wrong reaches the server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.process_state import until
from tests.integration.small_workloads import LLVM, copy_of, forbidden, matmul, model_json, slow_to_build
from tuner_core.compiler.trace import apply_trace
from tuner_core.compiler.workload import module_from_body
from tuner_core.model import FailureKind, Workload
from tuner_server.build import link
from tuner_server.build.pool import Artifact, BuildPool
from tuner_server.processes.spawner import Spawner
from tuner_server.search.pool import SearchPool
from tuner_server.trial import TrialFailed

UNSCHEDULED = "[[],[]]"


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
def pool(runner: asyncio.Runner, spawner: Spawner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuildPool]:
    pool = BuildPool(spawner, 2, tmp_path_factory.mktemp("scratch"))
    yield pool
    runner.run(pool.stop())


@pytest.fixture(scope="module")
def traces(runner: asyncio.Runner, spawner: Spawner) -> list[str]:
    async def draw() -> list[str]:
        search = SearchPool(spawner)
        await search.open("session", matmul(), LLVM, seed=1)
        found = await search.generate("session", 4)
        await search.stop()
        return found

    return runner.run(draw())


def run(artifact: Artifact, workload: Workload, inputs: list[Any]) -> np.ndarray[Any, Any]:
    import tvm

    output = tvm.runtime.tensor(np.zeros(workload.args_info[-1][2], workload.args_info[-1][1]))
    tvm.runtime.load_module(str(artifact.path))["main"](*map(tvm.runtime.tensor, inputs), output)
    return output.numpy()


def pids(pool: BuildPool) -> set[int]:
    return {child.pid for child in pool._children}


def test_a_built_candidate_computes_what_its_workload_says(
    runner: asyncio.Runner, pool: BuildPool, traces: list[str]
) -> None:
    workload = matmul()
    a, b = np.random.default_rng(0).uniform(0.1, 1.0, (2, 64, 64)).astype("float32")

    async def build_all() -> list[Artifact]:
        return await asyncio.gather(*(pool.build(workload, trace, LLVM) for trace in traces))

    artifacts = runner.run(build_all())
    assert len({artifact.path for artifact in artifacts}) == len(traces)
    for artifact in artifacts:
        np.testing.assert_allclose(run(artifact, workload, [a, b]), a @ b + 1, rtol=1e-4)
        assert artifact.seconds > 0
        pool.release(artifact)
        assert not artifact.path.exists()


def test_a_trace_that_does_not_apply_is_an_invalid_trace(
    runner: asyncio.Runner, pool: BuildPool, traces: list[str]
) -> None:
    for workload, trace in ((copy_of(8), traces[0]), (matmul(), "not JSON"), (matmul(), '[[["Odd",[],[],[]]],[]]')):
        with pytest.raises(TrialFailed) as failed:
            runner.run(pool.build(workload, trace, LLVM))
        assert failed.value.kind is FailureKind.INVALID_TRACE


def test_a_target_that_cannot_be_built_for_is_a_build_error(
    runner: asyncio.Runner, pool: BuildPool, traces: list[str]
) -> None:
    with pytest.raises(TrialFailed) as failed:
        runner.run(pool.build(matmul(), traces[0], '{"kind":"llvm","mtriple":"no-such-machine"}'))
    assert failed.value.kind is FailureKind.BUILD_ERROR


def test_code_that_a_client_may_not_send_is_refused(runner: asyncio.Runner, pool: BuildPool) -> None:
    with pytest.raises(TrialFailed, match="not accepted") as failed:
        runner.run(pool.fallback(forbidden(), LLVM))
    assert failed.value.kind is FailureKind.BUILD_ERROR


def test_a_build_over_its_deadline_is_killed_and_the_next_one_works(
    runner: asyncio.Runner, spawner: Spawner, tmp_path: Path, traces: list[str]
) -> None:
    async def check() -> None:
        pool = BuildPool(spawner, 1, tmp_path, timeout_s=0.01)
        with pytest.raises(TrialFailed) as failed:
            await pool.build(matmul(), traces[0], LLVM)
        assert failed.value.kind is FailureKind.BUILD_TIMEOUT
        assert not [path for path in tmp_path.iterdir() if path.name != "cubins"]
        pool._timeout_s = 30.0
        assert (await pool.build(matmul(), traces[0], LLVM)).path.exists()
        await pool.stop()

    runner.run(check())


def test_a_build_over_its_processor_time_is_ended_and_the_next_one_works(
    runner: asyncio.Runner, spawner: Spawner, tmp_path: Path
) -> None:
    async def check() -> None:
        pool = BuildPool(spawner, 1, tmp_path, cpu_limit_s=0)  # up to the next whole second of the process's life
        workload = slow_to_build()
        with pytest.raises(TrialFailed, match="processor time") as failed:
            await pool.build(workload, UNSCHEDULED, LLVM)
        assert failed.value.kind is FailureKind.BUILD_TIMEOUT
        pool._cpu_limit_s = 60
        assert (await pool.build(workload, UNSCHEDULED, LLVM)).path.exists()
        await pool.stop()

    runner.run(check())


def test_the_death_of_a_build_process_fails_its_build_only(
    runner: asyncio.Runner, pool: BuildPool, traces: list[str]
) -> None:
    async def check() -> None:
        pool.release(await pool.build(matmul(), traces[0], LLVM))  # so that there is a process
        pool.pause()
        doomed = asyncio.create_task(pool.build(matmul(), traces[0], LLVM))
        assert await until(lambda: pool._turns._free == 1)
        busy = pool._children - set(pool._idle)
        assert len(busy) == 1
        os.kill(busy.pop().pid, signal.SIGKILL)
        with pytest.raises(TrialFailed, match="SIGKILL") as failed:
            await doomed
        assert failed.value.kind is FailureKind.BUILD_ERROR
        pool.resume()
        pool.release(await pool.build(matmul(), traces[0], LLVM))

    runner.run(check())


def test_an_idle_process_that_died_is_replaced(runner: asyncio.Runner, pool: BuildPool, traces: list[str]) -> None:
    async def check() -> None:
        pool.release(await pool.build(matmul(), traces[0], LLVM))
        for child in list(pool._idle):
            os.kill(child.pid, signal.SIGKILL)
            await child.exited
        pool.release(await pool.build(matmul(), traces[0], LLVM))

    runner.run(check())


def test_a_cancelled_build_frees_its_turn(runner: asyncio.Runner, pool: BuildPool, traces: list[str]) -> None:
    async def check() -> None:
        pool.pause()
        waiting = [asyncio.create_task(pool.build(matmul(), traces[0], LLVM)) for _ in range(2)]
        assert await until(lambda: pool._turns._free == 0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        pool.resume()
        pool.release(await asyncio.wait_for(pool.build(matmul(), traces[0], LLVM), 30))

    runner.run(check())


def test_processes_are_replaced_after_some_builds(
    runner: asyncio.Runner, spawner: Spawner, tmp_path: Path, traces: list[str]
) -> None:
    async def check() -> None:
        pool = BuildPool(spawner, 1, tmp_path, recycle_after=2)
        seen = []
        for _ in range(4):
            building = asyncio.create_task(pool.build(matmul(), traces[0], LLVM))
            assert await until(lambda: bool(pids(pool)))
            seen += pids(pool)
            await building
        assert seen[0] == seen[1] != seen[2] == seen[3]
        assert not Path(f"/proc/{seen[0]}").exists()
        await pool.stop()

    runner.run(check())


def test_processes_on_lent_cores_stand_back_and_all_are_started_beforehand_only_once(
    runner: asyncio.Runner, spawner: Spawner, tmp_path: Path
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    pool = BuildPool(spawner, 1, tmp_path, affinity=cores[:1], lent=cores[-1:])
    slow, (model_of, _) = slow_to_build(), model_json()

    async def body() -> None:
        pool.prestart()
        pool.prestart()
        await until(lambda: len(pool._children) == 2)
        before = pids(pool)
        pool.prestart()
        built = await asyncio.gather(*(pool.fallback(matmul(), LLVM) for _ in range(4)))
        assert len(built) == 4 and pids(pool) == before, "those that were there built everything"
        policies = {os.sched_getscheduler(pid): os.sched_getaffinity(pid) for pid in before}
        assert policies == {os.SCHED_OTHER: {cores[0]}, os.SCHED_IDLE: {cores[-1]}}
        lent = next(child for child in pool._children if os.sched_getscheduler(child.pid) == os.SCHED_IDLE)
        os.kill(lent.pid, signal.SIGKILL)
        await lent.exited
        await asyncio.gather(*(pool.fallback(matmul(), LLVM) for _ in range(2)))
        again = [os.sched_getscheduler(pid) for pid in pids(pool)]
        assert sorted(again) == sorted([os.SCHED_OTHER, os.SCHED_IDLE]), "its successor stands back like it"

        busy = asyncio.create_task(pool.build(slow, UNSCHEDULED, LLVM))
        ordinary = next(child for child in pool._children if os.sched_getscheduler(child.pid) == os.SCHED_OTHER)
        await until(lambda: ordinary not in pool._idle)
        model = asyncio.create_task(pool.build_model(model_of, LLVM, {}))
        await until(lambda: len(pool._children) == 3)
        by_class = [os.sched_getscheduler(pid) for pid in pids(pool)]
        await model
        assert by_class.count(os.SCHED_OTHER) == 2, "a model, which uses many cores, was not put on a lent one"
        busy.cancel()

    try:
        runner.run(body())
    finally:
        runner.run(pool.stop())


def test_a_pool_that_is_stopped_while_it_starts_leaves_no_process(
    runner: asyncio.Runner, spawner: Spawner, tmp_path: Path
) -> None:
    pool = BuildPool(spawner, 3, tmp_path)

    async def body() -> list[int]:
        pool.prestart()
        await until(lambda: bool(pool._children))
        started = list(pids(pool))
        await pool.stop()
        return started

    for pid in runner.run(body()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not pool._children


def test_a_reference_holds_inputs_and_right_outputs(runner: asyncio.Runner, pool: BuildPool) -> None:
    before = pids(pool)
    first, again, other = (runner.run(pool.reference(matmul(), seed=seed)) for seed in (3, 3, 4))
    assert first is not None and again is not None and other is not None
    with np.load(first) as arrays, np.load(again) as same, np.load(other) as different:
        assert set(arrays) == {"in0", "in1", "out0", "terms"}
        assert int(arrays["terms"]) == 64  # products that an output adds up, by which its tolerance goes
        np.testing.assert_allclose(arrays["out0"], arrays["in0"] @ arrays["in1"] + 1, rtol=1e-4)
        assert arrays["in0"].min() >= 0.1
        np.testing.assert_array_equal(arrays["in0"], same["in0"])
        assert not np.array_equal(arrays["in0"], different["in0"])
    assert pids(pool) == before  # it ran in a process of its own
    leftovers = {path.name for path in first.parent.glob(f"{first.stem}*")}
    assert leftovers == {first.name}


def test_a_reference_over_its_deadline_is_none(runner: asyncio.Runner, spawner: Spawner, tmp_path: Path) -> None:
    async def check() -> None:
        pool = BuildPool(spawner, 1, tmp_path, reference_timeout_s=0.01)
        assert await pool.reference(matmul(), seed=1) is None
        await pool.stop()

    runner.run(check())


def test_a_fallback_needs_no_search_and_its_trace_replays(runner: asyncio.Runner, pool: BuildPool) -> None:
    workload = matmul()
    built = runner.run(pool.fallback(workload, LLVM))
    a, b = np.random.default_rng(0).uniform(0.1, 1.0, (2, 64, 64)).astype("float32")
    np.testing.assert_allclose(run(built.artifact, workload, [a, b]), a @ b + 1, rtol=1e-4)
    apply_trace(module_from_body(workload.body), built.trace)
    assert json.loads(built.trace)[0]


def test_a_model_is_built_without_and_with_traces(runner: asyncio.Runner, pool: BuildPool, traces: list[str]) -> None:
    import tvm
    from tvm import relax

    module, digest = model_json()
    untuned = runner.run(pool.build_model(module, LLVM, {}))
    tuned = runner.run(pool.build_model(module, LLVM, {digest: traces[0], "unused": traces[0]}))
    assert (untuned.coverage["tuned_calls"], tuned.coverage["tuned_calls"]) == (0, 2)
    assert tuned.coverage["unused"] == ["unused"]
    a, b = np.random.default_rng(0).uniform(0.0, 0.1, (2, 64, 64)).astype("float32")
    for built in (untuned, tuned):
        machine = relax.VirtualMachine(tvm.runtime.load_module(str(built.artifact.path)), tvm.cpu())
        output = machine["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b))
        np.testing.assert_allclose(output.numpy(), (a @ b + 1) @ b + 1, rtol=1e-4)


def test_a_broken_body_is_a_build_error(runner: asyncio.Runner, pool: BuildPool, traces: list[str]) -> None:
    with pytest.raises(TrialFailed) as failed:
        runner.run(pool.build(dataclasses.replace(matmul(), body="{}", digest="0"), traces[0], LLVM))
    assert failed.value.kind is FailureKind.BUILD_ERROR


def test_without_a_linker_the_compiler_driver_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    source, compiled, library = tmp_path / "a.c", tmp_path / "a.o", tmp_path / "a.so"
    source.write_text("int answer(void) { return 42; }")
    import subprocess

    subprocess.run(["cc", "-c", "-fPIC", str(source), "-o", str(compiled)], check=True)
    which = shutil.which
    monkeypatch.setattr(link.shutil, "which", lambda name: None if name == "ld" else which(name))
    link._command.cache_clear()
    try:
        link.link_shared(str(library), [str(compiled)])
    finally:
        link._command.cache_clear()
    assert ctypes.CDLL(str(library)).answer() == 42


def test_a_refusing_linker_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.o"
    broken.write_text("not an object")
    with pytest.raises(link.LinkError, match="broken.o"):
        link.link_shared(str(tmp_path / "out.so"), [str(broken)])


def test_a_stopped_pool_leaves_no_process_and_refuses_work(
    runner: asyncio.Runner, spawner: Spawner, tmp_path: Path, traces: list[str]
) -> None:
    async def check() -> None:
        pool = BuildPool(spawner, 1, tmp_path)
        await pool.build(matmul(), traces[0], LLVM)
        left = pids(pool)
        await pool.stop()
        assert not any(Path(f"/proc/{pid}").exists() for pid in left)
        with pytest.raises(TrialFailed):
            await pool.build(matmul(), traces[0], LLVM)

    runner.run(check())
