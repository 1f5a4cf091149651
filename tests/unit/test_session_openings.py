"""What a job's searches are opened with, by the experience that it asks for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.contract.record_values import make_workload
from tuner_core.model import EvaluatorSettings
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.wire import workload_to_message
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.performer import Performer
from tuner_server.scheduler.progress import TaskPlan, TaskProgress
from tuner_server.scheduler.report import JobFacts
from tuner_server.search.messages import Lesson

LESSON = Lesson("other", "[[],[]]", 1.0)


class Past:
    """What the store would give."""

    async def seeds(self, key: Any) -> list[str]:
        return ["a good one elsewhere"]

    async def lessons(self, key: Any) -> list[Lesson]:
        return [LESSON]


def opened_with(experience: str) -> dict[str, Any]:
    """What the search pool is told when a job with that experience opens its only task."""
    opened: dict[str, Any] = {}

    class Search:
        async def open(self, *_: Any, **how: Any) -> None:
            opened.update(how)

    task = tuning_pb2.TaskSpec(name="t", workload=workload_to_message(make_workload("mine")), weight=1, tunable=True)
    facts = JobFacts("j1", tuning_pb2.JobSpec(tasks=[task], experience=experience), 0.0, "here")
    lane = SimpleNamespace(
        search=Search(),
        build=None,
        evaluator=EvaluatorSettings(),
        device=SimpleNamespace(model="X"),
        target_json="{}",
        target_digest="t",
        sm_count=32,
        tvm_version="1",
        prestart=lambda sessions: None,
    )

    async def check() -> None:
        tasks = [TaskProgress(0, TaskPlan("t", 1, True))]
        performer = Performer(facts, [make_workload("mine")], lane, None, tasks, lambda event: None, Past())  # type: ignore[arg-type]
        performer._references = SimpleNamespace(foresee=lambda index: None)  # type: ignore[assignment]
        performer.perform(m.OpenSession(0, ()))
        await asyncio.gather(*performer._work)

    asyncio.run(check())
    return opened


def test_a_search_that_learns_from_its_job_begins_with_what_was_good_at_other_shares() -> None:
    opened = opened_with("job")
    assert opened["shared_with"] == "j1"
    assert list(opened["seeds"]) == ["a good one elsewhere"]
    assert list(opened["lessons"]) == []


@pytest.mark.parametrize("experience", ["", "store"])
def test_by_default_records_of_other_operators_are_lessons(experience: str) -> None:
    opened = opened_with(experience)
    assert opened["shared_with"] == ""
    assert list(opened["lessons"]) == [LESSON] and list(opened["seeds"]) == ["a good one elsewhere"]


def test_a_search_without_experience_begins_with_nothing() -> None:
    opened = opened_with("none")
    assert opened["shared_with"] is None
    assert list(opened["lessons"]) == list(opened["seeds"]) == []
