"""When a task has had enough trials, and which tasks are worth none, against cases worked out by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tests.replay.instance import ReplayInstance
from tests.replay.source import ReplayTask
from tests.replay.world import World
from tests.unit.test_scheduler_machine import SimulatedEngine
from tuner_client.job import job_report
from tuner_client.render.tasks import final_view
from tuner_core.allocation.budget import MIN_TRIALS, negligible_tasks
from tuner_core.allocation.options import negligible_share_of, stopping_of
from tuner_core.allocation.stopping import EarlyStopping, weighted_latency_us
from tuner_core.errors import UsageError
from tuner_core.leases import messages as lease_messages
from tuner_core.leases.machine import LeaseMachine
from tuner_core.leases.state import LeaseSettings, TaskHistory
from tuner_core.leases.state import TaskPlan as LeasePlan
from tuner_core.model import JobState, TaskState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.machine import JobMachine, Limits, TaskPlan
from tuner_server.scheduler.validation import validate_spec

FOUR = EarlyStopping(patience=4, min_progress=0.01)


def test_progress_is_measured_over_the_last_trials_and_against_the_whole_model() -> None:
    history = [100.0, 60.0, 50.0, 50.0, 49.0, 49.0]  # the last four won 60 - 49 = 11 us
    assert not FOUR.stands_still(1, history, 5, model_us=1000.0)
    assert FOUR.stands_still(1, history, 5, model_us=1101.0)  # which is under 1 % of this model
    assert not FOUR.stands_still(2, history, 5, model_us=1101.0)  # but not where it is called twice


def test_a_task_is_not_stopped_before_its_patience_has_passed_in_this_run() -> None:
    flat = [50.0] * 20
    assert FOUR.stands_still(1, flat, 19, model_us=50.0)
    assert not FOUR.stands_still(1, flat, 3, model_us=50.0)  # the others are from before
    assert not FOUR.stands_still(1, [50.0] * 4, 19, model_us=50.0)
    assert not EarlyStopping().stands_still(1, flat, 19, model_us=50.0)


def test_the_weighted_latency_is_of_what_is_known() -> None:
    assert weighted_latency_us([(2, 10.0), (3, None), (1, 5.0)]) == 25.0


def test_small_tasks_are_dropped_together_and_not_one_by_one() -> None:
    # 1,000 us in all; 1 % is 10: 2 + 3 + 4 = 9 fit, 8 more do not
    weighted = {0: 3.0, 1: 800.0, 2: 8.0, 3: 2.0, 4: 4.0}
    assert negligible_tasks(weighted, others_us=183.0, share=0.01) == [3, 0, 4]
    assert negligible_tasks(weighted, others_us=183.0, share=0.0) == []
    assert negligible_tasks({7: 0.0}, others_us=0.0, share=0.0) == []


def test_what_a_job_leaves_open_has_defaults() -> None:
    spec = tuning_pb2.JobSpec()
    assert (stopping_of(spec).patience, negligible_share_of(spec)) == (128, 0.005)
    spec = tuning_pb2.JobSpec(early_stopping=0, negligible_percent=0.0)
    assert (stopping_of(spec).patience, negligible_share_of(spec)) == (0, 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("early_stopping", -1),
        ("negligible_percent", 100.0),
        ("negligible_percent", float("nan")),
        ("experience", "mine"),
        ("build_cost_weight", -0.1),
    ],
)
def test_a_job_with_an_option_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        validate_spec(tuning_pb2.JobSpec(sm_percent=100, trials=1, **{field: value}))


class Flat(SimulatedEngine):
    """The first task improves with every trial, the others' latency does not change after their first one."""

    @staticmethod
    def latency(task: int, trace: str) -> float:
        number = 0 if trace.startswith("fallback") else int(trace.rpartition("c")[2]) + 1
        return 5000.0 - 5 * number if task == 0 else 100.0


@pytest.mark.parametrize("seed", range(5))
def test_trials_of_a_task_that_stands_still_go_to_one_that_improves(seed: int) -> None:
    plans = [TaskPlan("improves", 1, True), TaskPlan("stands still", 60, True)]
    limits = Limits(batch=4, batches_at_once=4)
    without = Flat(JobMachine(plans, 400, limits), seed)
    without.run()
    stopped = Flat(JobMachine(plans, 400, limits, EarlyStopping(patience=40)), seed)
    assert stopped.run().state is JobState.DONE
    assert sum(stopped.measured.values()) == 400
    still = stopped.machine.tasks[1]
    assert still.stopped_early
    assert still.state is TaskState.TUNED
    assert 40 <= stopped.measured[1] <= 40 + 2 * 4 + 4 < without.measured[1]  # what was in flight is finished
    assert not stopped.machine.tasks[0].stopped_early
    assert sum("stopped early" in line for line in stopped.said) == 1


def test_a_job_whose_tasks_all_stand_still_ends_before_its_budget_does() -> None:
    engine = Flat(JobMachine([TaskPlan("x", 1, False), TaskPlan("y", 1, True)], 4000, Limits(), EarlyStopping(64)))
    assert engine.run().state is JobState.DONE
    assert 64 <= engine.measured[1] < 200
    assert len(engine.unmeasured_when_preparing) == 1  # the untuned model is built beside the last trials all the same


class Unequal(SimulatedEngine):
    """Task n's fallback takes ten times as long as that of the task before."""

    def _answer(self, instruction: m.Instruction) -> list[m.Event]:
        if isinstance(instruction, m.MeasureBaseline):
            return [m.BaselineMeasured(instruction.task, f"fallback{instruction.task}", 10.0**instruction.task)]
        return super()._answer(instruction)


@pytest.mark.parametrize("seed", range(5))
def test_tasks_that_hardly_matter_get_no_trials(seed: int) -> None:
    plans = [TaskPlan(f"t{n}", 1, True, cost=2.0**n) for n in range(5)]
    engine = Unequal(JobMachine(plans, 400, Limits(batch=8, batches_at_once=8), negligible_share=0.005), seed)
    assert engine.run().state is JobState.DONE
    assert sum(engine.measured.values()) == 400
    assert all(engine.measured[n] >= MIN_TRIALS for n in range(2, 5))
    assert engine.measured[0] == engine.measured[1] == 0, "the heaviest ones begin before the baselines are known"
    for number in (0, 1):
        task = engine.machine.tasks[number]
        assert (task.state, task.best_us) == (TaskState.SKIPPED, 10.0**number)
        assert "0.5 %" in task.error


def test_a_repeated_job_with_negligible_tasks_measures_nothing() -> None:
    plans = [TaskPlan(f"t{n}", 1, True) for n in range(5)]
    machine = JobMachine(plans, 400, Limits(batch=8), negligible_share=0.005)
    trials = tuple(m.KnownTrial(f"c{n}", 5.0 + n) for n in range(100))
    known = {n: m.Known(trials, best_verified=trials[0], baseline=m.KnownTrial("f", 10.0**n)) for n in range(1, 5)} | {
        0: m.Known(baseline=m.KnownTrial("f", 1.0))
    }
    engine = SimulatedEngine(machine)
    assert engine.run(known).state is JobState.DONE
    assert engine.measured.total() == 0
    assert machine.tasks[0].state is TaskState.SKIPPED


def sharded(settings: LeaseSettings, us: dict[str, float], trials: int, seed: int) -> World:
    """A job on two instances; whatever the schedule, a task takes as long as its baseline."""
    tasks = [ReplayTask(name, name, 1, True, latency, (latency,) * 500) for name, latency in us.items()]
    instances = [ReplayInstance(name, {task.name: task for task in tasks}, batch=8, seed=seed) for name in "ab"]
    world = World(tasks, instances, trials, settings, seed=seed)
    world.run()
    assert world.machine.finished is not None
    assert world.machine.finished.state is JobState.DONE
    return world


@pytest.mark.parametrize("seed", range(5))
def test_a_sharded_job_leases_no_more_trials_of_tasks_that_stand_still(seed: int) -> None:
    us = {"a": 500.0, "b": 50.0}
    tasks = sharded(LeaseSettings(stopping=EarlyStopping(patience=48)), us, 1500, seed).machine.board.tasks
    for task in tasks.values():
        assert task.stopped_early
        assert task.verified
        assert 48 <= len(task.counted) < 48 + 8 * 16  # what was leased ahead is finished
    assert (
        sum(len(task.counted) for task in sharded(LeaseSettings(), us, 400, seed).machine.board.tasks.values()) == 400
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_sharded_job_leases_no_trials_of_tasks_that_hardly_matter(seed: int) -> None:
    us = {"a": 900.0, "b": 500.0, "c": 3.0, "d": 2.0}
    board = sharded(LeaseSettings(negligible_share=0.005), us, 300, seed).machine.board
    assert {name for name, task in board.tasks.items() if task.counted} == {"a", "b"}
    assert {board.tasks[name].state for name in "cd"} == {TaskState.SKIPPED}
    assert sum(len(task.counted) for task in board.tasks.values()) == 300
    everything = sharded(LeaseSettings(), us, 300, seed).machine.board
    assert all(len(task.counted) >= MIN_TRIALS for task in everything.tasks.values())


def test_a_repeated_sharded_job_with_negligible_tasks_leases_nothing() -> None:
    known = {
        "a": TaskHistory(reused=300, best_us=5.0, baseline_us=900.0, published_us=5.0, published_id="p"),
        "b": TaskHistory(baseline_us=2.0),
    }
    plans = [LeasePlan("a", 1, True, 900.0), LeasePlan("b", 1, True, 2.0)]
    for share, expected in ((0.0, 150), (0.005, 0)):
        machine = LeaseMachine(plans, 300, LeaseSettings(negligible_share=share), known=known)
        machine.handle(lease_messages.InstanceJoined(0.0, "one", "1", 1, 8))
        board = machine.board
        assert board.unassigned + sum(task.new_trials for task in board.tasks.values()) == expected


def test_the_table_and_the_json_say_which_operators_were_stopped() -> None:
    status = tuning_pb2.JobStatus(job="j", status="done", trials_budget=400, trials_measured=150)
    status.tasks.add(name="a", description="conv", state="tuned", trials=140, stopped_early=True)
    status.tasks.add(name="b", description="dense", state="tuned", trials=10)
    report = job_report(status)
    assert [task["stopped_early"] for task in report.document()["tasks"]] == [True, False]
    console = Console(width=120, file=io.StringIO())
    console.print(final_view(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "140, stopped" in text and "10, stopped" not in text
    assert "1 operator stopped early, 250 of the budget not needed" in text
