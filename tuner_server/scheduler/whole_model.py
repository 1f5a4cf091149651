"""The end of a job: the model built untuned and tuned, and both measured in turn."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Mapping

from tuner_core.errors import TunerError
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_server.build.pool import ModelBuild
from tuner_server.lanes.lane import Lane
from tuner_server.scheduler import messages as m
from tuner_server.trial import TrialFailed


class WholeModel:
    """The model of one job. Its two builds run side by side; the untuned one needs no result and may begin earlier.

    Args:
        spec: The job.
        lane: Builds and measures.
    """

    def __init__(self, spec: tuning_pb2.JobSpec, lane: Lane) -> None:
        self._spec = spec
        self._lane = lane
        self._baseline: asyncio.Task[ModelBuild] | None = None

    def prepare(self) -> None:
        """Begin to build the untuned model; nothing happens when that is under way, or there is no model."""
        if self._baseline is None and self._spec.lifted_module_zlib:
            self._baseline = asyncio.create_task(self._build({}))
            self._baseline.add_done_callback(lambda build: build.cancelled() or build.exception())

    async def measure(self, traces: Mapping[str, str]) -> m.ModelMeasured:
        """Latency of the untuned model and of the one with these schedules, and whether their outputs agree.

        Args:
            traces: By workload digest.
        """
        self.prepare()
        baseline, self._baseline = self._baseline, None
        if baseline is None:
            return m.ModelMeasured(None, None, None)
        tuned = asyncio.create_task(self._build(traces)) if traces else baseline
        try:
            before, after = await asyncio.gather(baseline, tuned)
            paths = before.artifact.path, after.artifact.path
            result = await self._lane.fleet.alone(lambda alone: alone.measure_models(*paths, before.args_info))
            return m.ModelMeasured(result.baseline_us, result.tuned_us, result.outputs_match)
        except TrialFailed as failure:
            return m.ModelMeasured(None, None, None, f"the whole model could not be measured: {failure}")
        finally:
            for build in {baseline, tuned}:
                await self._release(build)

    async def stop(self) -> None:
        """Give up what was prepared."""
        if self._baseline is not None:
            await self._release(self._baseline)
            self._baseline = None

    async def _build(self, traces: Mapping[str, str]) -> ModelBuild:
        module = zlib.decompress(self._spec.lifted_module_zlib).decode()
        return await self._lane.build.build_model(module, self._lane.target_json, traces)

    async def _release(self, build: asyncio.Task[ModelBuild]) -> None:
        build.cancel()
        with contextlib.suppress(asyncio.CancelledError, TrialFailed, TunerError):
            self._lane.build.release((await build).artifact)
