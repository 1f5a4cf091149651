"""Build processes, as the scheduler's driver sees them: killed on a deadline, recycled, never the server's end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner_core.model import FailureKind, Workload
from tuner_server import timeline
from tuner_server.build.artifact import Artifact, FallbackBuild, ModelBuild
from tuner_server.fairness import FairTurns
from tuner_server.processes.handle import Child, ChildDied, ChildError, ChildTimeout
from tuner_server.processes.spawner import Spawner
from tuner_server.trial import TrialFailed

__all__ = ["Artifact", "BuildPool", "FallbackBuild", "ModelBuild"]

MODEL_TIMEOUT_S = 900.0
_NO_GPU = {
    "CUDA_VISIBLE_DEVICES": "",  # a context made here by accident would disturb what is measured
    "CUDA_CACHE_DISABLE": "1",  # NVRTC would ask the driver for its cache with every kernel
}
CPU_LIMIT_S = 5
"""A usual candidate takes half a second; what takes ten times as long would be one of the slow ones."""


class BuildPool:
    """Builds in child processes, several at a time.

    Args:
        spawner: Where processes come from; they start at first need.
        processes: How many at most, those on lent cores aside.
        scratch: Directory for artifacts; made when missing.
        timeout_s: Deadline of one build.
        cpu_limit_s: Processor time that the build of a candidate may take, in whole seconds.
        reference_timeout_s: Deadline of one reference run.
        recycle_after: Builds after which a process is replaced, against what compilers leak.
        affinity: Cores to pin the processes to; empty: all.
        nice: Added to their niceness.
        lent: Cores whose owners use them little: one more process on each, which stands back at once for anything else.
    """

    def __init__(
        self,
        spawner: Spawner,
        processes: int,
        scratch: Path,
        timeout_s: float = 30.0,
        reference_timeout_s: float = 60.0,
        recycle_after: int = 200,
        affinity: Sequence[int] = (),
        nice: int = 0,
        cpu_limit_s: int = CPU_LIMIT_S,
        lent: Sequence[int] = (),
    ) -> None:
        self._spawner = spawner
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._cpu_limit_s = cpu_limit_s
        self._reference_timeout_s = reference_timeout_s
        self._recycle_after = recycle_after
        self._affinity = tuple(affinity)
        self._nice = nice
        self._lent = tuple(lent)
        self._places = max(1, processes) + len(self._lent)
        self._turns = FairTurns(self._places)
        self._files = itertools.count()
        self._idle: list[Child] = []
        self._children: set[Child] = set()
        self._builds: dict[Child, int] = {}
        self._on_lent: dict[Child, int] = {}
        self._starting: dict[str, int | None] = {}  # by name: the lent core, if it is for one
        self._coming: deque[asyncio.Task[Child]] = deque()
        self._paused = False
        self._stopped = False
        scratch.mkdir(parents=True, exist_ok=True)

    def prestart(self) -> None:
        """Begin to start all processes that are not there yet, so that no build has to wait for a fork."""
        for _ in range(self._places - len(self._children) - len(self._starting) - len(self._coming)):
            coming = asyncio.create_task(self._spawn())
            coming.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._coming.append(coming)

    async def build(self, workload: Workload, trace: str, target_json: str) -> Artifact:
        """Build one candidate.

        Args:
            workload: What it computes.
            trace: JSON of its schedule's trace.
            target_json: What to build for.

        Raises:
            TrialFailed: ``invalid_trace``, ``build_error``, ``build_timeout`` or ``out_of_memory``.
        """
        out = self._new_path("so")
        args = {"trace": trace, "target": target_json, "out": str(out), "cpu_limit_s": self._cpu_limit_s}
        result = await self._run("build", {**_body(workload), **args}, self._timeout_s, [out])
        return _artifact(out, result)

    async def fallback(self, workload: Workload, target_json: str) -> FallbackBuild:
        """Build a workload with the schedule that needs no trials.

        Raises:
            TrialFailed: As :meth:`build`.
        """
        out = self._new_path("so")
        result = await self._run(
            "fallback", {**_body(workload), "target": target_json, "out": str(out)}, self._timeout_s, [out]
        )
        return FallbackBuild(result["trace"], _artifact(out, result))

    async def reference(self, workload: Workload, seed: int) -> Path | None:
        """Inputs and outputs of the workload's unscheduled loops, run on the host.

        They run in a process of their own, which ends with them: code of a client may write where it should not.

        Args:
            workload: What to run.
            seed: Of the inputs.

        Returns:
            An ``.npz`` with ``in0``.. and ``out0``.., which the caller owns; None when the deadline passed.

        Raises:
            TrialFailed: It could not be built or it crashed.
        """
        out = self._new_path("npz")
        try:
            args = {**_body(workload), "args_info": workload.args_info, "seed": seed, "out": str(out)}
            await self._run("reference", args, self._reference_timeout_s, [out], once=True)
        except TrialFailed as failure:
            if failure.kind is FailureKind.BUILD_TIMEOUT:
                return None
            raise
        return out

    async def build_model(self, module_json: str, target_json: str, traces: Mapping[str, str]) -> ModelBuild:
        """Build a whole model.

        Args:
            module_json: The prepared module, its weights lifted to parameters.
            target_json: What to build for.
            traces: Trace JSON by workload digest; other operators get the fallback schedule.

        Raises:
            TrialFailed: As :meth:`build`.
        """
        out = self._new_path("so")
        args = {"module": module_json, "target": target_json, "traces": dict(traces), "out": str(out)}
        result = await self._run("model", args, MODEL_TIMEOUT_S, [out], own_cores=True)
        args_info = tuple((kind, dtype, tuple(shape)) for kind, dtype, shape in result["args_info"])
        return ModelBuild(Artifact(out, result["seconds"]), args_info, result["coverage"])

    def release(self, artifact: Artifact) -> None:
        """Delete an artifact that is not needed any more."""
        artifact.path.unlink(missing_ok=True)

    def pause(self) -> None:
        """Stop the processes (SIGSTOP) until :meth:`resume`; deadlines stand still."""
        self._paused = True
        for child in self._children:
            child.pause()

    def resume(self) -> None:
        """Let the processes go on."""
        self._paused = False
        for child in self._children:
            child.resume()

    async def stop(self) -> None:
        """End the processes; builds under way fail."""
        self._stopped = True
        self.resume()
        await asyncio.gather(*self._coming, return_exceptions=True)
        self._coming.clear()
        busy = [child for child in self._children if child not in self._idle]
        for child in busy:
            child.kill()
        await asyncio.gather(*(child.close() for child in list(self._children)))
        self._children.clear()
        self._idle.clear()

    def _new_path(self, suffix: str) -> Path:
        # never the same path twice, also across servers: a process that has loaded one would not load the other
        return self._scratch / f"{os.getpid()}-{next(self._files)}-{os.urandom(4).hex()}.{suffix}"

    async def _run(
        self,
        op: str,
        args: Mapping[str, Any],
        timeout_s: float,
        outputs: Sequence[Path],
        *,
        once: bool = False,
        own_cores: bool = False,
    ) -> dict[str, Any]:
        """One request, in a process that ends with it (``once``), or not in one on a lent core (``own_cores``)."""
        done = False
        try:
            async with self._child(once, own_cores) as child:
                result = await child.request(op, args, timeout_s)
            done = True
            return result
        except ChildError as error:
            raise TrialFailed(_kind(error.kind), str(error)) from None
        except ChildTimeout:
            raise TrialFailed(FailureKind.BUILD_TIMEOUT, f"the {op} took longer than {timeout_s:g} s") from None
        except ChildDied as error:
            if error.code == -signal.SIGXCPU:
                message = f"the {op} took more than {self._cpu_limit_s} s of processor time"
                raise TrialFailed(FailureKind.BUILD_TIMEOUT, message) from None
            raise TrialFailed(FailureKind.BUILD_ERROR, str(error)) from None
        finally:
            if not done:
                for path in outputs:
                    _remove_traces_of(path)

    @contextlib.asynccontextmanager
    async def _child(self, once: bool, own_cores: bool) -> AsyncIterator[Child]:
        async with contextlib.AsyncExitStack() as turn:
            with timeline.waiting("waiting to be built"):
                await turn.enter_async_context(self._turns.turn())
            if self._stopped:
                raise ChildDied("the build pool", None)
            child = None if once else await self._take(own_cores)
            if child is None:
                child = await self._spawn(own_cores or once)
            try:
                yield child
            except ChildError:
                await self._give_back(child, once)  # it answered: it is as good as before
                raise
            except BaseException:
                child.kill()
                self._drop(child)
                raise
            await self._give_back(child, once)

    async def _take(self, own_cores: bool) -> Child | None:
        """A process that is there, those on cores of their own first (or only), or one that is coming."""
        while self._idle:
            child = next((child for child in reversed(self._idle) if child not in self._on_lent), self._idle[-1])
            if own_cores and child in self._on_lent:
                return None
            self._idle.remove(child)
            if child.alive:
                return child
            self._drop(child)
        while self._coming and not own_cores:
            coming = self._coming.popleft()
            try:
                return await asyncio.shield(coming)
            except asyncio.CancelledError:
                if not coming.cancelled():
                    self._coming.appendleft(coming)
                raise
        return None

    async def _spawn(self, own_cores: bool = False) -> Child:
        taken = {child.name for child in self._children} | self._starting.keys()
        name = next(name for index in itertools.count() if (name := f"build-{index}") not in taken)
        core = None if own_cores else self._lent_core()
        self._starting[name] = core
        try:
            child = await self._spawner.spawn(
                "build",
                {"cubin_cache": str(self._scratch / "cubins")},
                name=name,
                env=_NO_GPU,
                affinity=self._affinity if core is None else (core,),
                nice=self._nice,
                stand_back=core is not None,
            )
            self._children.add(child)
            if core is not None:
                self._on_lent[child] = core
        finally:
            del self._starting[name]
        if self._paused:
            child.pause()
        return child

    def _lent_core(self) -> int | None:
        """A lent core for the next process; None when it is one of the others."""
        on_lent = [*self._on_lent.values(), *(core for core in self._starting.values() if core is not None)]
        others = len(self._children) + len(self._starting) - len(on_lent)
        if others < self._places - len(self._lent):
            return None
        return next((core for core in self._lent if core not in on_lent), None)

    async def _give_back(self, child: Child, once: bool) -> None:
        self._builds[child] = self._builds.get(child, 0) + 1
        if once or self._builds[child] >= self._recycle_after or self._stopped:
            self._drop(child)
            await child.close()
        else:
            self._idle.append(child)

    def _drop(self, child: Child) -> None:
        self._children.discard(child)
        self._on_lent.pop(child, None)
        self._builds.pop(child, None)


def _artifact(out: Path, result: Mapping[str, Any]) -> Artifact:
    return Artifact(out.with_suffix(result["suffix"]), result["seconds"])


def _body(workload: Workload) -> dict[str, str]:
    return {"digest": workload.digest, "body": workload.body}


def _remove_traces_of(output: Path) -> None:
    """Delete an output and whatever a killed build kept beside it under the same stem."""
    for path in output.parent.glob(f"{output.stem}.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _kind(word: str) -> FailureKind:
    try:
        return FailureKind(word)
    except ValueError:
        return FailureKind.BUILD_ERROR
