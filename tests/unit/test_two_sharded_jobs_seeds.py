"""Two sharded jobs for the same operators in virtual time, over one shared store, while instances and clients fail."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from tests.replay.instance import ReplayInstance, Said
from tests.replay.source import ReplayTask, replay_tasks
from tests.replay.world import Link, World
from tuner_core.leases import messages as m
from tuner_core.leases.state import LeaseSettings
from tuner_core.model import JobState, TaskState

TTL_S = 30.0
SEEDS = 90
GROUPS = 3


@dataclass
class SharedStore:
    """Claims and published results that the servers of both jobs see.

    Attributes:
        claims: Holder and end by task.
        published: Job, trial and latency by task; the first stays.
    """

    claims: dict[str, tuple[str, float]] = field(default_factory=dict)
    published: dict[str, tuple[str, str, float]] = field(default_factory=dict)

    def take(self, task: str, job: str, now_s: float) -> str:
        """Who else holds the task; nobody: it is the job's now."""
        holder, ends_s = self.claims.get(task, (job, 0.0))
        if holder != job and ends_s > now_s:
            return holder
        self.claims[task] = (job, now_s + TTL_S)
        return ""

    def renew(self, task: str, job: str, now_s: float) -> None:
        if self.claims.get(task, ("", 0.0))[0] == job:
            self.claims[task] = (job, now_s + TTL_S)

    def publish(self, task: str, job: str, trial: str, latency_us: float) -> None:
        self.published.setdefault(task, (job, trial, latency_us))
        if self.claims.get(task, ("", 0.0))[0] == job:
            del self.claims[task]


class ClaimingInstance(ReplayInstance):
    """Claims what it is leased, renews while it has leases, publishes what it promotes."""

    job: str
    shared: SharedStore

    def __post_init__(self) -> None:
        super().__post_init__()
        self.claimed: set[str] = set()

    def restart(self) -> None:
        super().restart()
        self.claimed.clear()

    def run_until(self, now_s: float) -> None:
        for task in self.claimed if self.holds else ():
            self.shared.renew(task, self.job, now_s)
        super().run_until(now_s)

    def ask(self, now_s: float, wanted: m.Grant) -> None:
        task, token = wanted.task, wanted.token
        if (wanted.trials or wanted.conclude) and token > self.newest(task):
            if self.shared.take(task, self.job, now_s):
                self.end_at_once(task, token, "held")
                return
            if wanted.take_over and task in self.shared.published:
                self.end_at_once(task, token, "published")
                return
            self.claimed.add(task)
        self.grant(now_s, task, token, wanted.trials, wanted.conclude)

    def _say(self, kind: str, work, **more) -> None:  # type: ignore[no-untyped-def]
        super()._say(kind, work, **more)
        said = self.said[-1]
        if said.reason in ("concluded", "revoked", "expired", "held", "published"):
            self.claimed.discard(said.task)
        if said.reason == "concluded":
            assert said.latency_us is not None
            self.shared.publish(said.task, self.job, said.trial_id, said.latency_us)


class JobWorld(World):
    """One of the jobs."""

    def __init__(self, job: str, shared: SharedStore, *arguments, **options) -> None:  # type: ignore[no-untyped-def]
        self.job = job
        self.shared = shared
        self.held = 0
        super().__init__(*arguments, **options)
        for link in self.links.values():
            assert isinstance(link.instance, ClaimingInstance)
            link.instance.job, link.instance.shared = job, shared
        self.at(400.0, self._repair)

    def _repair(self) -> None:
        """Somebody sees to the instances: one that was drained for good is started again, too."""
        for name, link in self.links.items():
            link.up, link.hung, link.cut, link.lag_s, link.instance.factor = True, False, False, 0.0, 1.0
            link.instance.restart()
            self._wakes.pop(name, None)
            self._connect(name)

    @property
    def over(self) -> bool:
        return not self.away and self.machine.finished is not None

    @property
    def next_s(self) -> float:
        return self._queue[0][0]

    def step(self) -> None:
        self.now_s, _, what = heapq.heappop(self._queue)
        assert self.now_s < 5000.0, f"{self.job} does not end: {self.said[-5:]}"
        what()

    def _tick(self) -> None:
        super()._tick()
        for name, link in self.links.items():  # one that is slow to answer is asked again, as the driver does
            state = self.machine.board.instances.get(name)
            if not self.away and link.reachable and state is not None and not state.alive:
                self._connect(name)

    def _perform(self, instruction: m.Instruction) -> None:
        if isinstance(instruction, m.Grant):
            wanted = instruction
            self.holders.setdefault((wanted.task, wanted.token), set()).add(wanted.instance)

            def ask(one: ReplayInstance) -> None:
                assert isinstance(one, ClaimingInstance)
                one.ask(self.now_s, wanted)

            self._call(wanted.instance, ask, "grant", wanted.task, wanted.token)
            return
        super()._perform(instruction)

    def _hear(self, link: Link, said: Said) -> None:
        if said.reason not in ("held", "published"):
            super()._hear(link, said)
            return
        same = (self.now_s, link.instance.name, said.task, said.token, said.reason)
        if said.reason == "held":
            self.held += 1
            self.feed(m.LeaseEnded(*same, holder="the other"))
        else:
            _, trial, latency_us = self.shared.published[said.task]
            self.feed(m.LeaseEnded(*same, True, latency_us, trial, baseline_us=9.0, reused=8))


def two_jobs(seed: int, *, faults: bool) -> tuple[JobWorld, JobWorld]:
    """The same tasks twice, on one to three instances each."""
    rng = random.Random(seed)
    tasks: list[ReplayTask] = replay_tasks(rng.randint(1, 6))
    shared = SharedStore()

    def job(name: str) -> JobWorld:
        instances = [
            ClaimingInstance(
                f"{name}{index}",
                {task.name: task for task in tasks},
                trial_s=rng.uniform(0.1, 0.5),
                workers=rng.randint(1, 4),
                batch=8,
                seed=seed,
            )
            for index in range(rng.randint(1, 3))
        ]
        trials = rng.randint(15, 60) * len(tasks)
        number = rng.randint(1, 6) if faults else 0
        world = JobWorld(name, shared, tasks, instances, trials, LeaseSettings(), seed=rng.random(), faults=number)
        if faults and rng.random() < 0.5:
            away_s = rng.choice((0.5, 5.0, 50.0, 500.0))
            world.at(rng.uniform(1.0, 25.0), lambda: world.client_dies(away_s))
        return world

    first, second = job("red"), job("blue")
    delay_s = rng.choice((0.0, 1.0, 10.0))
    for when_s, order, what in second._queue[:]:
        second._queue[second._queue.index((when_s, order, what))] = (when_s + delay_s, order, what)
    heapq.heapify(second._queue)
    return first, second


def run(*worlds: JobWorld) -> None:
    """Both to their ends, on one clock."""
    while left := [world for world in worlds if not world.over]:
        min(left, key=lambda world: world.next_s).step()


def test_each_operator_is_tuned_by_one_of_two_jobs_when_nothing_fails() -> None:
    waited = 0
    for seed in range(20):
        worlds = two_jobs(seed, faults=False)
        run(*worlds)
        for name in worlds[0].machine.board.tasks:
            tasks = [world.machine.board.tasks[name] for world in worlds]
            tuned = [task for task in tasks if task.state in (TaskState.TUNED, TaskState.FALLBACK) and task.counted]
            assert len(tuned) == 1, (seed, name)
            (other,) = (task for task in tasks if task is not tuned[0])
            assert other.state is TaskState.REUSED and not other.counted and other.verified, (seed, name)
            assert other.best_trial_id == tuned[0].best_trial_id
        waited += any(world.held for world in worlds)
    assert waited > 10  # the others began so late that they found everything published


@pytest.mark.parametrize("group", range(GROUPS))
def test_both_jobs_end_with_every_operator_published_whatever_fails(group: int) -> None:
    for seed in range(group * SEEDS // GROUPS, (group + 1) * SEEDS // GROUPS):
        worlds = two_jobs(seed, faults=True)
        run(*worlds)
        for world in worlds:
            assert world.machine.finished is not None
            assert world.machine.finished.state is JobState.DONE, (seed, world.machine.finished)
            assert all(task.verified and task.awaited is None for task in world.machine.board.tasks.values()), seed
            assert all(len(holders) == 1 for holders in world.holders.values()), seed
