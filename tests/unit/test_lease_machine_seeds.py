"""Whole sharded jobs in virtual time, with instances that die, hang, vanish, restart, drain and fall behind."""

from __future__ import annotations

import random

import pytest

from tests.replay.instance import ReplayInstance
from tests.replay.source import replay_tasks
from tests.replay.world import World
from tuner_core.allocation.budget import MIN_TRIALS
from tuner_core.leases.state import LeaseSettings
from tuner_core.model import JobState, TaskState

SEEDS = 500
GROUPS = 10


def random_world(seed: int) -> World:
    """A job of a few hundred trials on three to six instances, and up to eight faults."""
    rng = random.Random(seed)
    tasks = replay_tasks(rng.randint(2, 9), untunable=rng.randint(0, 3))
    instances = [
        ReplayInstance(
            name,
            {task.name: task for task in tasks},
            trial_s=rng.uniform(0.1, 0.5),
            workers=rng.randint(1, 4),
            batch=8,
            seed=seed,
        )
        for name in "abcdef"[: rng.randint(3, 6)]
    ]
    trials = rng.randint(15, 80) * len(tasks)
    return World(tasks, instances, trials, LeaseSettings(), seed=seed, faults=rng.randint(1, 8))


def check(world: World, seed: int) -> None:
    """The promises that hold whatever happens."""
    board = world.machine.board
    assert world.machine.finished is not None
    assert world.machine.finished.state is JobState.DONE, (seed, world.machine.finished)
    for link in world.links.values():  # no lost record
        for task, records in link.instance.records.items():
            assert records.keys() <= world.store[task].keys(), seed
    for holders in world.holders.values():  # no two holders of one fencing token
        assert len(holders) == 1, seed
    counted = [trial for task in board.tasks.values() for trial in task.counted]
    assert len(counted) == len(set(counted)) == world.machine.trials, seed  # none twice, and all of them
    for task in board.tasks.values():
        assert task.counted.keys() <= world.store[task.plan.name].keys(), seed
        assert sum(task.by_instance.values()) == len(task.counted) + (not task.plan.tunable), seed
        assert not task.leases
        if task.plan.tunable:  # every task gets its trials
            assert len(task.counted) >= MIN_TRIALS, seed
            assert task.state is TaskState.TUNED, seed
        else:
            assert task.state is TaskState.SKIPPED, seed


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_sharded_job_keeps_its_promises_whatever_happens_to_its_instances(group: int) -> None:
    for seed in range(group * SEEDS // GROUPS, (group + 1) * SEEDS // GROUPS):
        world = random_world(seed)
        world.run()
        check(world, seed)
