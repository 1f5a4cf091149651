"""How much a shard has in flight: as a job of the server's own, by candidates, however its trials are leased."""

from __future__ import annotations

import pytest

from tests.unit.test_shard_machine import BATCH, SimulatedEngine
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import shard_messages as sm


@pytest.mark.parametrize("seed", range(10))
def test_a_lease_that_is_extended_in_time_always_has_about_two_batches_in_flight(seed: int) -> None:
    engine = SimulatedEngine(seed, batches_at_once=2, batches_per_task=2)
    engine.grant(1, 3 * BATCH)
    engine.run(1)  # the look-up
    trials = 3 * BATCH
    task = engine.machine.tasks[0]
    while trials < 20 * BATCH:
        told = len(engine.trials(1))
        engine.run(1)
        if len(engine.trials(1)) > told and trials - len(engine.trials(1)) <= 2 * BATCH:
            trials += BATCH
            engine.grant(1, trials)
        assert BATCH < task.outstanding <= (2 + 1 / 3) * BATCH
    engine.run()
    assert engine.ends() == [(1, "measured", trials)]


def test_leases_that_are_extended_trial_by_trial_are_searched_in_whole_batches() -> None:
    engine = SimulatedEngine(batches_at_once=4)
    ahead = 2 * BATCH + 1
    granted = [ahead, ahead]
    for task in (0, 1):
        engine.grant(1, granted[task], task=task)
        engine.handle(sm.KnownFound(task, m.Known()))
    engine.asked.clear()
    while max(granted) < 12 * BATCH:
        engine.run(1)
        for task in (0, 1):
            if len(engine.trials(1, task)) + ahead > granted[task]:
                granted[task] += 1
                engine.grant(1, granted[task], task=task)
    assert {count for _, count in engine.asked} == {BATCH}
    engine.run()
    assert [engine.ends(task) for task in (0, 1)] == [[(1, "measured", trials)] for trials in granted]


def test_stragglers_do_not_keep_a_lease_from_its_next_batch() -> None:
    engine = SimulatedEngine(batches_at_once=4)
    engine.grant(1, 12 * BATCH)
    engine.run(1)  # the look-up
    at_first = engine.machine.in_flight
    answer, slow, trials = engine.answer, {}, 12 * BATCH

    def hold(instruction: sm.Instruction) -> list[sm.Event]:
        if isinstance(instruction, m.RunTrial) and instruction.batch not in slow:
            slow[instruction.batch] = instruction  # one of each batch takes long to build
            return []
        return answer(instruction)

    engine.answer = hold  # type: ignore[method-assign]
    engine.run()
    assert engine.machine.tasks[0].measured > at_first, "the processes would stand idle until the slow ones are built"
    assert engine.machine.in_flight == len(slow)
    reported = [trial.trace for one in engine.reported for trial in one.results]
    assert set(engine.trials(1)) >= {f"id-{trace}" for trace in reported} and len(reported) >= at_first - len(slow)
    engine.answer = answer  # type: ignore[method-assign]
    engine.pending += slow.values()
    engine.run()
    assert engine.ends() == [(1, "measured", trials)] and set(engine.runs.values()) == {1}
    reported = [trial.trace for one in engine.reported for trial in one.results]
    assert len(reported) == len(set(reported)) == trials, "everything is reported, and once"


def test_a_task_has_more_in_flight_when_the_other_leases_have_nothing_left_to_ask_for() -> None:
    engine = SimulatedEngine(batches_at_once=12)
    limits = engine.limits.for_tasks(2)
    answer = engine.answer
    engine.answer = lambda one: [] if isinstance(one, m.RunTrial) and one.task else answer(one)  # type: ignore[method-assign]
    engine.grant(1, 1, task=1)  # its only candidate takes long to build
    engine.grant(1, 400)
    engine.run()
    assert engine.ends() == [(1, "measured", 400)]
    each = limits.batch * limits.batches_per_task
    assert each < max(outstanding for outstanding, _ in engine.asked) <= 2 * each


def test_no_more_is_in_flight_than_allowed_and_none_of_the_leases_starves() -> None:
    engine = SimulatedEngine(batches_at_once=4)
    limits = engine.limits.for_tasks(2)
    engine.grant(1, 40)
    engine.grant(1, 40, task=1)
    engine.run(2)
    for _ in range(60):
        engine.run(1)
        assert engine.machine.in_flight <= limits.batch * limits.batches_at_once
    measured = [task.measured for task in engine.machine.tasks]
    assert min(measured[:2]) > 0


@pytest.mark.parametrize("trials", [2, 64])
def test_as_much_is_in_flight_as_for_a_job_of_the_servers_own_however_the_trials_are_leased(trials: int) -> None:
    engine = SimulatedEngine(batches_at_once=9)
    limits = engine.limits.for_tasks(2)
    for task in (0, 1):
        engine.grant(1, trials, task=task)
        engine.handle(sm.KnownFound(task, m.Known()))
    while trials < 64:  # slice by slice, while nothing is generated yet
        trials += 2
        for task in (0, 1):
            engine.grant(1, trials, task=task)
    in_flight = limits.batch * limits.batches_at_once
    assert in_flight - BATCH <= engine.machine.in_flight <= in_flight
