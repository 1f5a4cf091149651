"""Measurement workers on real cores with real libraries: what they time, check, survive and never do."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.integration import measured_libraries as libraries
from tests.integration.measured_libraries import MATMUL_ARGS, VECTOR_ARGS, N
from tests.integration.process_state import gone, until
from tuner_core.errors import ConflictError, TunerError
from tuner_core.model import EvaluatorSettings, FailureKind
from tuner_server.measure.fleet import MeasureRequest, WorkerFleet
from tuner_server.measure.gate import CoreGate
from tuner_server.measure.inputs import save_reference
from tuner_server.partitions.cpu import CpuPartitions
from tuner_server.partitions.interface import Partition
from tuner_server.processes.handle import Child
from tuner_server.processes.spawner import Spawner
from tuner_server.trial import TrialFailed

ROLES = {"measure": "tuner_server.measure.worker"}
ONCE = EvaluatorSettings(number=1, repeat=1, min_repeat_ms=0)
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("libraries")
    functions = {
        "matmul": libraries.matmul(),
        "wrong_matmul": libraries.matmul(depth=N - 2),
        "hang": libraries.calling("pause"),
        "crash": libraries.calling("abort"),
        "slow": libraries.calling("usleep", 200_000),
        "nan": libraries.elementwise("log_of_negative"),
        "half": libraries.elementwise("half"),
    }
    return {name: libraries.build(function, folder / f"{name}.so") for name, function in functions.items()}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def spawner(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawner]:
    spawner = Spawner(tmp_path_factory.mktemp("logs"), ROLES)
    runner.run(spawner.start())
    yield spawner
    runner.run(spawner.stop())


@pytest.fixture(scope="module")
def provider(spawner: Spawner) -> CpuPartitions:
    return CpuPartitions(spawner, sorted(os.sched_getaffinity(0))[:2])


class Recorder:
    """A pausable that writes down what happens to it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def pause(self) -> None:
        self.events.append("pause")

    def resume(self) -> None:
        self.events.append("resume")


@pytest.fixture(scope="module")
def pools() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def fleet(runner: asyncio.Runner, spawner: Spawner, provider: CpuPartitions, pools: Recorder) -> Iterator[WorkerFleet]:
    fleet = WorkerFleet(spawner, provider, CoreGate([pools]))
    runner.run(fleet.start(provider.plan(50)))
    yield fleet
    runner.run(fleet.stop())


def slow(path: Path, timeout_s: float = 10.0) -> MeasureRequest:
    """About 0.4 s on a worker."""
    return MeasureRequest(path, VECTOR_ARGS, ONCE, timeout_s)


def pids(fleet: WorkerFleet) -> list[int]:
    return [worker.pid for worker in fleet.workers()]


def test_two_workers_at_half_share_measure_side_by_side_on_their_own_cores(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]

    async def check() -> None:
        results = await asyncio.gather(
            *(fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS)) for _ in range(12))
        )
        assert {result.affinity for result in results} == {(cores[0],), (cores[1],)}
        assert {result.sm_count for result in results} == {1}
        assert max(result.neighbours for result in results) == 1
        for result in results:
            assert len(result.latencies_us) == 3
            assert result.ci_low_us <= result.median_us <= result.ci_high_us
            assert result.partition.sm_percent == 50

    runner.run(check())
    for worker in fleet.workers():
        assert os.sched_getaffinity(worker.pid) == set(worker.affinity)
        assert worker.state == "idle"


def test_a_worker_runs_as_many_threads_as_it_has_cores(
    runner: asyncio.Runner, spawner: Spawner, provider: CpuPartitions
) -> None:
    async def threads(sm_percent: int) -> int:
        partition = provider.plan(sm_percent, 1)[0]
        config = {"device": partition.tvm_device}
        child = await spawner.spawn("measure", config, name="threads", env=partition.env, affinity=partition.affinity)
        answer = await child.request("hello", {})
        await child.close()
        assert answer["sm_count"] == partition.expected_sm_count
        return int(answer["threads"])

    assert runner.run(threads(50)) == 1
    assert runner.run(threads(100)) == 2


def test_an_idle_server_with_two_workers_stays_below_its_memory_limit(fleet: WorkerFleet) -> None:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert set(pids(fleet)) <= {process.pid for process in family}
    own = {process.pid: process.memory_full_info().pss for process in family[1:]}
    assert sum(own.values()) < 1.0e9, own  # 1.5 GB for the whole server


def test_the_device_alone_means_no_neighbour_and_the_others_go_on_afterwards(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        before = [asyncio.create_task(fleet.measure(slow(library["slow"]))) for _ in range(2)]
        await asyncio.sleep(0)
        async with fleet.exclusive() as alone:
            assert [worker.state for worker in fleet.workers()] == ["idle", "idle"], "a measurement was under way"
            after = [asyncio.create_task(fleet.measure(slow(library["slow"]))) for _ in range(2)]
            for _ in range(3):
                result = await alone.measure(MeasureRequest(library["matmul"], MATMUL_ARGS))
                assert result.neighbours == 0
            assert not any(task.done() for task in after)
            assert [worker.state for worker in fleet.workers()] == ["idle", "idle"]
        assert len(await asyncio.gather(*before, *after)) == 4

    runner.run(check())


def test_a_steady_stream_of_trials_does_not_keep_promotion_waiting(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        stop = asyncio.Event()

        async def stream() -> int:
            count = 0
            while not stop.is_set():
                await fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE))
                count += 1
            return count

        streams = [asyncio.create_task(stream()) for _ in range(6)]
        await asyncio.sleep(0.05)
        for _ in range(3):
            async with asyncio.timeout(30), fleet.exclusive() as alone:
                await alone.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE))
        stop.set()
        assert min(await asyncio.gather(*streams)) > 0

    runner.run(check())


def test_an_exclusive_turn_that_is_cancelled_blocks_nobody(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        async def promote() -> None:
            async with fleet.exclusive() as alone:
                await alone.measure(slow(library["slow"]))

        running = asyncio.create_task(fleet.measure(slow(library["slow"])))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(promote())
        await asyncio.sleep(0.05)
        waiting.cancel()
        await fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE))
        await running
        holding = asyncio.create_task(promote())
        assert await until(lambda: any(worker.state == "measuring" for worker in fleet.workers()))
        holding.cancel()
        result = await fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE))
        assert result.neighbours == 0, "the device was given away while the worker was still measuring"

    runner.run(asyncio.wait_for(check(), 30))


def test_waiting_for_a_worker_is_not_part_of_the_deadline(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        await asyncio.gather(*(fleet.measure(slow(library["slow"], timeout_s=2.0)) for _ in range(12)))

    runner.run(check())


def test_a_hanging_candidate_times_out_and_the_capacity_comes_back(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        before = pids(fleet)
        with pytest.raises(TrialFailed, match="did not end within") as failed:
            await fleet.measure(slow(library["hang"], timeout_s=0.3))
        assert failed.value.kind is FailureKind.RUN_TIMEOUT
        await fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE))
        assert await until(lambda: fleet.capacity == 2)
        after = pids(fleet)
        lost = set(before) - set(after)
        assert len(lost) == 1 and all(gone(pid) for pid in lost)

    runner.run(check())


def test_a_crashing_candidate_is_a_run_error_and_the_workers_return(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        with pytest.raises(TrialFailed, match="SIGABRT") as failed:
            await fleet.measure(slow(library["crash"]))
        assert failed.value.kind is FailureKind.RUN_ERROR
        assert await until(lambda: fleet.capacity == 2)
        results = await asyncio.gather(
            *(fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE)) for _ in range(4))
        )
        assert len({result.affinity for result in results}) == 2

    runner.run(check())


def test_a_measurement_whose_worker_is_killed_from_outside_is_made_again(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        trial = asyncio.create_task(fleet.measure(slow(library["slow"])))
        assert await until(lambda: any(worker.state == "measuring" for worker in fleet.workers()))
        victim = next(worker for worker in fleet.workers() if worker.state == "measuring")
        os.kill(victim.pid, signal.SIGKILL)
        result = await trial
        assert result.affinity != victim.affinity, "it should have gone to the other worker"
        assert await until(lambda: fleet.capacity == 2)

    runner.run(check())


def test_a_trial_that_loses_two_workers_is_recorded_as_worker_lost(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        trial = asyncio.create_task(fleet.measure(slow(library["hang"])))
        killed = {0}

        def measuring() -> list[int]:
            return [
                worker.pid for worker in fleet.workers() if worker.state == "measuring" and worker.pid not in killed
            ]

        for _ in range(2):
            assert await until(lambda: bool(measuring()))
            victim = measuring()[0]
            killed.add(victim)
            os.kill(victim, signal.SIGKILL)
        with pytest.raises(TrialFailed) as failed:
            await trial
        assert failed.value.kind is FailureKind.WORKER_LOST
        assert await until(lambda: fleet.capacity == 2)

    runner.run(asyncio.wait_for(check(), 30))


def test_an_idle_worker_that_dies_is_replaced(runner: asyncio.Runner, fleet: WorkerFleet) -> None:
    async def check() -> None:
        victim = pids(fleet)[0]
        os.kill(victim, signal.SIGKILL)
        assert await until(lambda: fleet.capacity == 2 and victim not in pids(fleet))

    runner.run(check())


def test_a_cancelled_caller_does_not_cost_a_worker(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        before = pids(fleet)
        trials = [asyncio.create_task(fleet.measure(slow(library["slow"]))) for _ in range(5)]
        await asyncio.sleep(0.05)
        for trial in trials:
            trial.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*trials, return_exceptions=True)
        )
        results = await asyncio.gather(
            *(fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE)) for _ in range(4))
        )
        assert len(results) == 4
        assert pids(fleet) == before

    runner.run(check())


def test_a_hopeless_candidate_is_sampled_once(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    async def check() -> None:
        request = MeasureRequest(library["matmul"], MATMUL_ARGS, give_up_above_us=0.001)
        hopeless = await fleet.measure(request)
        assert hopeless.gave_up and len(hopeless.latencies_us) == 1
        fine = await fleet.measure(dataclasses.replace(request, give_up_above_us=1e9))
        assert not fine.gave_up and len(fine.latencies_us) == 3

    runner.run(check())


def test_a_worker_cannot_take_the_memory_of_the_host(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path], provider: CpuPartitions
) -> None:
    elements = provider.plan(50)[0].memory_bytes // 4

    async def check() -> None:
        huge = (("TENSOR", "float32", (elements,)),) * 2
        with pytest.raises(TrialFailed) as failed:
            await fleet.measure(MeasureRequest(library["slow"], huge, ONCE))
        assert failed.value.kind is FailureKind.OUT_OF_MEMORY
        assert fleet.capacity == 2

    runner.run(check())


def test_a_library_that_does_not_load_is_a_run_error(
    runner: asyncio.Runner, fleet: WorkerFleet, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not an ELF file")
    with pytest.raises(TrialFailed) as failed:
        runner.run(fleet.measure(MeasureRequest(broken, MATMUL_ARGS)))
    assert failed.value.kind is FailureKind.RUN_ERROR
    assert "\n" not in str(failed.value)


def test_a_worker_keeps_no_library_after_its_measurement(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path], tmp_path: Path
) -> None:
    async def measure(index: int) -> None:
        copy = tmp_path / f"{index}.so"
        copy.write_bytes(library["matmul"].read_bytes())
        await fleet.measure(MeasureRequest(copy, MATMUL_ARGS, ONCE))

    async def many() -> None:
        await asyncio.gather(*(measure(index) for index in range(20)))

    runner.run(many())
    for pid in pids(fleet):
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "tvm" in mapped
        assert str(tmp_path) not in mapped


# Correctness


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "matmul.npz"
    rng = np.random.default_rng(3)
    a, b = (rng.uniform(0.1, 1, (N, N)).astype("float32") for _ in range(2))
    save_reference(path, [a, b], [a @ b])
    return path


@pytest.mark.parametrize(
    ("name", "verdict"), [("matmul", "ok"), ("wrong_matmul", "wrong_result")], ids=["right", "two terms short"]
)
def test_a_kernel_is_compared_with_its_reference(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path], reference: Path, name: str, verdict: str
) -> None:
    outcome = runner.run(fleet.check(library[name], MATMUL_ARGS, reference))
    assert outcome.verdict == verdict
    assert (outcome.max_error or 0) > (1e-3 if verdict == "wrong_result" else -1)


def test_without_a_reference_the_fallback_on_the_device_is_compared_with(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path]
) -> None:
    right = runner.run(fleet.check(library["matmul"], MATMUL_ARGS, None, library["matmul"]))
    wrong = runner.run(fleet.check(library["wrong_matmul"], MATMUL_ARGS, None, library["matmul"]))
    nothing = runner.run(fleet.check(library["matmul"], MATMUL_ARGS, None, None))
    assert (right.verdict, wrong.verdict, nothing.verdict) == ("ok", "wrong_result", "inconclusive")


def test_an_output_that_is_not_written_is_wrong(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path], tmp_path: Path
) -> None:
    vector = np.linspace(0.1, 1, N, dtype="float32")
    save_reference(tmp_path / "copy.npz", [vector], [vector])
    outcome = runner.run(fleet.check(library["half"], VECTOR_ARGS, tmp_path / "copy.npz"))
    assert outcome.verdict == "wrong_result"
    assert outcome.max_error is None


def test_nan_is_wrong_in_the_output_and_inconclusive_in_the_reference(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path], tmp_path: Path
) -> None:
    vector = np.linspace(0.1, 1, N, dtype="float32")
    save_reference(tmp_path / "finite.npz", [vector], [vector])
    save_reference(tmp_path / "nan.npz", [vector], [np.full_like(vector, np.nan)])
    finite = runner.run(fleet.check(library["nan"], VECTOR_ARGS, tmp_path / "finite.npz"))
    nan = runner.run(fleet.check(library["nan"], VECTOR_ARGS, tmp_path / "nan.npz"))
    assert (finite.verdict, nan.verdict) == ("wrong_result", "inconclusive")


# Whole models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": libraries.build_model(folder / "plain.so"),
        "shifted": libraries.build_model(folder / "shifted.so", shift=1.0),
        "nan": libraries.build_model(folder / "nan.so", nan=True),
    }


@pytest.mark.parametrize(
    ("baseline", "tuned", "match"), [("plain", "plain", True), ("plain", "shifted", False), ("nan", "nan", None)]
)
def test_two_builds_of_a_model_are_timed_in_turn_and_compared(
    runner: asyncio.Runner,
    fleet: WorkerFleet,
    models: dict[str, Path],
    baseline: str,
    tuned: str,
    match: bool | None,
) -> None:
    result = runner.run(fleet.measure_models(models[baseline], models[tuned], libraries.MODEL_ARGS, rounds=4))
    assert result.outputs_match is match
    assert result.rounds == 4
    assert result.baseline_us > 0 and result.tuned_us > 0
    assert bool(result.message) == (match is not True)


# The gate


def test_measurements_pause_search_and_build_as_one_phase_where_no_core_is_spare(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path], pools: Recorder
) -> None:
    async def side_by_side() -> None:
        await asyncio.gather(*(fleet.measure(slow(library["slow"])) for _ in range(2)))

    pools.events.clear()
    runner.run(side_by_side())
    assert pools.events == ["pause", "resume"]


def test_the_pools_go_on_after_a_failure(
    runner: asyncio.Runner, fleet: WorkerFleet, library: dict[str, Path], pools: Recorder
) -> None:
    pools.events.clear()
    with pytest.raises(TrialFailed):
        runner.run(fleet.measure(slow(library["hang"], timeout_s=0.1)))
    assert pools.events == ["pause", "resume"]
    assert runner.run(until(lambda: fleet.capacity == 2))


def test_with_spare_cores_only_promotion_pauses_the_pools(
    runner: asyncio.Runner, spawner: Spawner, provider: CpuPartitions, library: dict[str, Path]
) -> None:
    pools = Recorder()

    async def check() -> None:
        partitions = provider.plan(50, 1)
        spare = provider.spare_cores(partitions)
        assert len(spare) == 1 and spare[0] not in partitions[0].affinity
        fleet = WorkerFleet(spawner, provider, CoreGate([pools], spare=bool(spare)))
        await fleet.start(partitions)
        await fleet.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE))
        assert pools.events == []
        async with fleet.exclusive() as alone:
            await alone.measure(MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE))
        assert pools.events == ["pause", "resume"]
        await fleet.stop()

    runner.run(check())


def test_builds_stand_still_for_short_kernels_only_where_workers_have_cores_of_their_own(
    runner: asyncio.Runner, spawner: Spawner, provider: CpuPartitions, library: dict[str, Path]
) -> None:
    pools = Recorder()
    request = MeasureRequest(library["matmul"], MATMUL_ARGS, ONCE)

    async def check() -> None:
        partitions = [dataclasses.replace(part, quiet_below_us=50.0) for part in provider.plan(50, 1)]
        fleet = WorkerFleet(spawner, provider, CoreGate([pools], spare=True))
        await fleet.start(partitions)
        async with fleet.exclusive() as alone:
            await alone.measure(dataclasses.replace(request, expected_us=50.0))
            assert pools.events == []
            await alone.measure(dataclasses.replace(request, expected_us=49.0))
            assert pools.events == ["pause", "resume"]
            await alone.measure(request)  # nobody knows how long it takes
            assert pools.events == ["pause", "resume"] * 2
        await fleet.stop()

    runner.run(check())


# Starting, stopping, and devices on which faults spread


def test_a_worker_whose_share_was_not_granted_is_not_used(
    runner: asyncio.Runner, spawner: Spawner, provider: CpuPartitions
) -> None:
    async def check() -> None:
        fleet = WorkerFleet(spawner, provider, CoreGate())
        good, other = provider.plan(50)
        with pytest.raises(TunerError, match="sees 1 cores instead of the 2 of its share of 50 %"):
            await fleet.start([good, dataclasses.replace(other, expected_sm_count=2)])
        assert fleet.capacity == 0 and fleet.workers() == []

    runner.run(check())


def test_stopping_ends_every_worker_and_fails_what_waits(
    runner: asyncio.Runner, spawner: Spawner, provider: CpuPartitions, library: dict[str, Path]
) -> None:
    async def check() -> None:
        fleet = WorkerFleet(spawner, provider, CoreGate())
        await fleet.start(provider.plan(50))
        workers = pids(fleet)
        trials = [asyncio.create_task(fleet.measure(slow(library["hang"]))) for _ in range(4)]
        assert await until(lambda: all(worker.state == "measuring" for worker in fleet.workers()))
        await fleet.stop()
        ends = await asyncio.gather(*trials, return_exceptions=True)
        assert all(isinstance(end, ConflictError) for end in ends), ends
        assert await until(lambda: all(gone(pid) for pid in workers))
        with pytest.raises(ConflictError):
            await fleet.measure(slow(library["slow"]))

    runner.run(asyncio.wait_for(check(), 30))


class SpreadingFaults(CpuPartitions):
    """Cores that behave like a GPU under MPS: who dies takes the neighbours' measurements along."""

    faults_spread = True

    def __init__(self, spawner: Spawner, cores: list[int]) -> None:
        super().__init__(spawner, cores)
        self.prepared: list[int] = []

    async def prepare_worker(self, partition: Partition) -> None:
        self.prepared.append(partition.index)

    async def stop_worker(self, child: Child) -> bool:
        await super().stop_worker(child)
        return True


def test_where_faults_spread_the_innocent_is_measured_again_and_the_guilty_found_alone(
    runner: asyncio.Runner, spawner: Spawner, library: dict[str, Path]
) -> None:
    async def check() -> None:
        provider = SpreadingFaults(spawner, sorted(os.sched_getaffinity(0))[:2])
        fleet = WorkerFleet(spawner, provider, CoreGate())
        await fleet.start(provider.plan(50))
        first = pids(fleet)
        innocent = asyncio.create_task(fleet.measure(slow(library["slow"])))
        guilty = asyncio.create_task(fleet.measure(slow(library["crash"])))
        result = await innocent
        assert result.neighbours == 0, "the timing beside the fault was kept"
        with pytest.raises(TrialFailed, match="SIGABRT") as failed:
            await guilty
        assert failed.value.kind is FailureKind.RUN_ERROR
        assert await until(lambda: fleet.capacity == 2)
        assert not set(first) & set(pids(fleet)), "a neighbour of the fault was kept"
        assert provider.prepared.count(0) >= 2 and provider.prepared.count(1) >= 2
        await fleet.stop()

    runner.run(asyncio.wait_for(check(), 60))
