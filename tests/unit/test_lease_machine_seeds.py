"""Whole sharded jobs in virtual time: instances die, hang, vanish, restart, drain and fall behind, clients die, too."""

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
            factor=12.0 if rng.random() < 0.05 else 1.0,
        )
        for name in "abcdef"[: rng.randint(3, 6)]
    ]
    trials = rng.randint(15, 80) * len(tasks)
    world = World(tasks, instances, trials, LeaseSettings(), seed=seed, faults=rng.randint(1, 8))
    for _ in range(rng.choice((0, 1, 1, 2))):
        away_s = rng.choice((0.5, 5.0, 50.0))
        world.at(rng.uniform(1.0, 25.0), lambda away_s=away_s: world.client_dies(away_s))
    return world


def check(world: World, seed: int) -> None:
    """The promises that hold whatever happens."""
    board = world.machine.board
    assert world.machine.finished is not None
    assert world.machine.finished.state is JobState.DONE, (seed, world.machine.finished)
    for link in world.links.values():  # no lost record
        for task, records in link.instance.records.items():
            assert records.keys() <= world.store[task].keys(), seed
    for holders in world.holders.values():  # no two holders of one fencing token: neither asked to be,
        assert len(holders) == 1, seed
    worked = [lease for link in world.links.values() for lease in link.instance.worked]
    assert len(worked) == len(set(worked)), seed  # nor at work
    counted = [trial for task in board.tasks.values() for trial in task.counted]
    assert len(counted) == len(set(counted)) == world.expected >= world.trials, seed  # none twice, and all of them
    for task in board.tasks.values():
        assert task.counted.keys() <= world.store[task.plan.name].keys(), seed
        assert not task.leases
        if task.plan.tunable:  # every task gets its trials
            assert sum(task.by_instance.values()) == len(task.counted) >= MIN_TRIALS, seed
            fallback = task.best_trial_id.endswith("baseline/verified")
            assert task.state in ({TaskState.FALLBACK} if fallback else {TaskState.TUNED, TaskState.REUSED}), seed
            assert task.state is not TaskState.REUSED or world.epoch > 1, seed
            assert task.verified and task.best_trial_id in world.store[task.plan.name], seed
        else:
            assert task.state is TaskState.SKIPPED and not task.counted, seed
            assert task.by_instance.total() == 1 or world.epoch > 1, seed


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_sharded_job_keeps_its_promises_whatever_happens_to_its_instances(group: int) -> None:
    for seed in range(group * SEEDS // GROUPS, (group + 1) * SEEDS // GROUPS):
        world = random_world(seed)
        world.run()
        check(world, seed)
