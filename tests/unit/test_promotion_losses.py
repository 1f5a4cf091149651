"""What a promotion does when processes under it are lost through no fault of its candidates."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tuner_core.model import FailureKind, Workload
from tuner_server.build.pool import BuildPool
from tuner_server.scheduler.performer import _insist
from tuner_server.scheduler.references import References
from tuner_server.trial import TrialFailed

LOST = TrialFailed(FailureKind.WORKER_LOST, "twice: measure-0 ended (signal SIGKILL)")


class Answers:
    """Gives or raises one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.left = list(answers)

    async def __call__(self, *_asked: object, **_how: object) -> Any:
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_candidate_whose_workers_were_lost_is_measured_again_and_a_failing_one_is_not() -> None:
    assert asyncio.run(_insist(Answers(LOST, 3.5))) == 3.5
    with pytest.raises(TrialFailed, match="twice"):
        asyncio.run(_insist(Answers(LOST, LOST, 3.5)))
    with pytest.raises(TrialFailed, match="illegal"):
        asyncio.run(_insist(Answers(TrialFailed(FailureKind.RUN_ERROR, "illegal"), 3.5)))


class Pool:
    """Makes references as it is told to."""

    def __init__(self, *answers: Any) -> None:
        self.reference = Answers(*answers)


def references(pool: Pool) -> References:
    return References(cast(BuildPool, pool), [cast(Workload, SimpleNamespace(description="matmul"))], seed=1)


def test_a_reference_whose_process_was_killed_is_made_again(tmp_path: Path) -> None:
    killed = TrialFailed(FailureKind.BUILD_ERROR, "build-0 ended before it answered (signal SIGKILL)")
    made = tmp_path / "reference.npz"
    made.touch()

    async def body() -> None:
        of_task = references(Pool(killed, made))
        of_task.begin(0)
        assert await of_task.get(0) == await of_task.get(0) == made
        await of_task.drop(0)
        assert not made.exists()
        assert await references(Pool(killed, killed)).get(0) is None, "the fallback schedule is left to compare with"

    asyncio.run(body())


def test_references_are_made_before_they_are_wanted_one_at_a_time(tmp_path: Path) -> None:
    under_way: list[str] = []
    most = 0
    may_end = asyncio.Event()

    class Slow:
        async def reference(self, workload: Any, seed: int) -> Path:
            nonlocal most
            under_way.append(workload.description)
            most = max(most, len(under_way))
            await may_end.wait()
            under_way.remove(workload.description)
            made = tmp_path / f"{workload.description}.npz"
            made.touch()
            return made

    async def body() -> None:
        workloads = [cast(Workload, SimpleNamespace(description=name)) for name in ("a", "b", "c", "d")]
        found = References(cast(BuildPool, Slow()), workloads, seed=1)
        for index in (0, 1, 2, 3, 0):
            found.foresee(index)
        await asyncio.sleep(0.01)
        assert under_way == ["a"] and most == 1
        found.begin(2)  # its task is promoted by now, and cannot wait for its turn
        await found.drop(3)  # it needs none any more
        await asyncio.sleep(0.01)
        assert under_way == ["a", "c"]
        may_end.set()
        assert await found.get(1) == tmp_path / "b.npz"
        await asyncio.sleep(0.01)
        assert not (tmp_path / "d.npz").exists()
        await found.drop_all()
        assert not list(tmp_path.iterdir())

    asyncio.run(body())
