"""The two builds of a job's model: side by side, the untuned one early, and none left behind."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

from tuner_core.model import FailureKind
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_server.build.pool import Artifact, ModelBuild
from tuner_server.lanes.lane import Lane
from tuner_server.measure.requests import ModelMeasurement
from tuner_server.scheduler.whole_model import WholeModel
from tuner_server.trial import TrialFailed

SPEC = tuning_pb2.JobSpec(lifted_module_zlib=zlib.compress(b"module"))


class FakeLane:
    """Builds end when the test says so; measuring takes no time."""

    target_json = "{}"

    def __init__(self) -> None:
        self.building: dict[str, asyncio.Future[ModelBuild]] = {}
        self.released: list[str] = []
        self.measured: tuple[str, str] | None = None
        self.build = self.fleet = self

    async def build_model(self, module: str, target_json: str, traces: Mapping[str, str]) -> ModelBuild:
        assert (module, target_json) == ("module", self.target_json)
        end = self.building["tuned" if traces else "untuned"] = asyncio.get_running_loop().create_future()
        return await end

    def end(self, *names: str) -> None:
        for name in names:
            self.building[name].set_result(ModelBuild(Artifact(Path(name), 1.0), (), {}))

    async def alone(self, work: Callable[[Any], Awaitable[ModelMeasurement]]) -> ModelMeasurement:
        return await work(self)

    async def measure_models(self, baseline: Path, tuned: Path, _args_info: object) -> ModelMeasurement:
        self.measured = (baseline.name, tuned.name)
        return ModelMeasurement(200.0, 100.0, True, 5)

    def release(self, artifact: Artifact) -> None:
        self.released.append(artifact.path.name)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def model(lane: FakeLane, spec: tuning_pb2.JobSpec = SPEC) -> WholeModel:
    return WholeModel(spec, cast(Lane, lane))


def test_the_untuned_model_is_built_early_and_the_tuned_one_beside_it() -> None:
    async def body() -> None:
        lane = FakeLane()
        whole = model(lane)
        whole.prepare()
        await settle()
        assert set(lane.building) == {"untuned"}
        measuring = asyncio.create_task(whole.measure({"digest": "trace"}))
        await settle()
        assert set(lane.building) == {"untuned", "tuned"}
        lane.end("tuned", "untuned")
        measured = await measuring
        assert (measured.baseline_us, measured.tuned_us, measured.outputs_match) == (200.0, 100.0, True)
        assert lane.measured == ("untuned", "tuned")
        assert sorted(lane.released) == ["tuned", "untuned"]

    asyncio.run(body())


def test_without_schedules_one_build_is_both() -> None:
    async def body() -> None:
        lane = FakeLane()
        measuring = asyncio.create_task(model(lane).measure({}))
        await settle()
        lane.end("untuned")
        assert (await measuring).tuned_us == 100.0
        assert lane.measured == ("untuned", "untuned") and lane.released == ["untuned"]

    asyncio.run(body())


def test_a_failed_build_is_said_and_the_other_one_given_up() -> None:
    async def body() -> None:
        lane = FakeLane()
        measuring = asyncio.create_task(model(lane).measure({"digest": "trace"}))
        await settle()
        lane.building["tuned"].set_exception(TrialFailed(FailureKind.BUILD_ERROR, "out of registers"))
        measured = await measuring
        assert measured.tuned_us is None and "out of registers" in measured.message
        assert lane.building["untuned"].cancelled() and lane.released == []

    asyncio.run(body())


def test_what_was_prepared_is_given_up_at_the_end_of_a_job() -> None:
    async def body() -> None:
        waiting, done, without = FakeLane(), FakeLane(), FakeLane()
        for lane in (waiting, done):
            whole = model(lane)
            whole.prepare()
            await settle()
            if lane is done:
                lane.end("untuned")
                await settle()
            await whole.stop()
        assert waiting.building["untuned"].cancelled() and done.released == ["untuned"]
        nothing = model(without, tuning_pb2.JobSpec())
        nothing.prepare()
        assert (await nothing.measure({})).baseline_us is None and not without.building

    asyncio.run(body())
