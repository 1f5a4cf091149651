"""Whole servers in virtual time: the server's own state machines over a :class:`Pipeline`.

:class:`ShardServer` takes the place of a :class:`ReplayInstance` in a :class:`World`; :class:`PlainJob` is the same job
on one server, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.replay.instance import Refused, Said
from tests.replay.pipeline import Clock, Costs, Pipeline
from tests.replay.source import ReplayTask, replay_tasks
from tests.replay.world import MODEL_S, World
from tuner_core.allocation.budget import DEFAULT_NEGLIGIBLE_SHARE as NEGLIGIBLE
from tuner_core.errors import ConflictError
from tuner_core.leases.state import LeaseSettings
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.machine import JobMachine
from tuner_server.scheduler.progress import TaskPlan
from tuner_server.scheduler.shard_machine import ShardMachine

LEASE_S = 15.0
TICK_S = 1.0


class PlainJob:
    """A job of one server.

    Args:
        tasks: Its tasks.
        trials: Its budget.
        costs: Of the server.
        seed: Of everything random.

    Attributes:
        counted_s: When its trials ended.
    """

    def __init__(
        self, tasks: Sequence[ReplayTask], trials: int, costs: Costs, *, seed: int = 0, negligible: float = NEGLIGIBLE
    ) -> None:
        self.clock = Clock()
        self.pipeline = Pipeline(tasks, costs, self.clock, self._handle, f"plain/{seed}")
        plans = [TaskPlan(task.name, task.weight, task.tunable) for task in tasks]
        self.machine = JobMachine(
            plans, trials, costs.limits.for_tasks(sum(task.tunable for task in tasks)), negligible_share=negligible
        )
        self.counted_s: list[float] = []

    @property
    def now_s(self) -> float:
        """Virtual seconds since it began."""
        return self.clock.now_s

    def run(self, limit_s: float = 5000.0) -> None:
        """Until it has ended."""
        self._handle(m.Started({index: m.Known() for index in range(len(self.pipeline.tasks))}))
        while self.machine.finished is None:
            assert self.clock.next_due_s() < limit_s
            self.clock.run_until(self.clock.next_due_s())

    def _handle(self, event: m.Event) -> None:
        if isinstance(event, m.TrialMeasured | m.TrialFailed):
            self.counted_s.append(self.now_s)
        for instruction in self.machine.handle(event):
            self.pipeline.perform(instruction)


class ShardServer:
    """One server's part of a sharded job, as a :class:`World` wants it.

    Args:
        name: Of the instance.
        tasks: The job's tasks.
        costs: Of the server.
        seed: Of everything random.
    """

    def __init__(self, name: str, tasks: Sequence[ReplayTask], costs: Costs, *, seed: int = 0) -> None:
        self.name = name
        self.costs = costs
        self.workers, self.batch, self.wanted = costs.workers, costs.batch, costs.in_flight
        self.incarnation = f"{name}/0"
        self.draining = False
        self.clock = Clock()
        self.pipeline = Pipeline(tasks, costs, self.clock, self._handle, f"{name}/{seed}")
        plans = [TaskPlan(task.name, task.weight, task.tunable) for task in tasks]
        self.machine = ShardMachine(plans, LEASE_S)
        self.index = {task.name: number for number, task in enumerate(tasks)}
        self.records: dict[str, dict[str, float | None]] = {task.name: {} for task in tasks}
        self.said: list[Said] = []
        self.clock.after(TICK_S, self._tick)
        self._opened = False

    def next_due_s(self) -> float:
        """When something will happen by itself."""
        return self.clock.next_due_s()

    def run_until(self, now_s: float) -> None:
        """Let everything happen that is due."""
        self.clock.run_until(now_s)

    def grant(self, now_s: float, task: str, token: int, trials: int, conclude: bool) -> None:
        """See ``GrantLease``."""
        if not self._opened:
            self._opened = True
            self.clock.after(self.costs.store_s, lambda: self._handle(sm.LaneOpened(self.costs.limits)))
        try:
            claim = trials > 0 or conclude
            self._act(self.machine.grant(self.index[task], token, trials, conclude, now_s, claim=claim))
        except ConflictError:
            raise Refused("old") from None

    def renew(self, now_s: float, leases: Iterable[tuple[str, int]]) -> list[str]:
        """See ``RenewLeases``."""
        named = {number: name for name, number in self.index.items()}
        return [named[lost] for lost in self.machine.renew([(self.index[t], token) for t, token in leases], now_s)]

    def revoke(self, now_s: float, task: str, token: int) -> None:
        """See ``RevokeLease``."""
        self._handle(sm.LeaseRevoked(self.index[task], token))

    def warm(self, task: str, records: dict[str, float | None]) -> None:
        """Take in records of others."""
        self.records[task].update(records)

    def _tick(self) -> None:
        self._handle(sm.Tick(self.clock.now_s))
        self.clock.after(TICK_S, self._tick)

    def _handle(self, event: Any) -> None:
        self._act(self.machine.handle(event))

    def _act(self, instructions: Sequence[Any]) -> None:
        for instruction in instructions:
            match instruction:
                case sm.TellBaseline() | sm.TellTrial() | sm.TellEnded():
                    self._tell(instruction)
                case sm.LookUp(index):
                    self.clock.after(self.costs.store_s, lambda index=index: self._look_up(index))
                case sm.TakeClaim(index):
                    claimed = sm.ClaimAnswered(index, fresh=False)
                    self.clock.after(self.costs.store_s, lambda claimed=claimed: self._handle(claimed))
                case sm.ReleaseClaim():
                    pass
                case _:
                    self.pipeline.perform(instruction)

    def _look_up(self, index: int) -> None:
        task = self.pipeline.tasks[index]
        records = self.records[task.name]
        baseline = f"{task.name}/baseline"
        trials = tuple(m.KnownTrial(one, us) for one, us in records.items() if one.rpartition("/")[2].isdigit())
        known = m.Known(trials)
        if (us := records.get(baseline)) is not None:
            known = m.Known(trials, baseline=m.KnownTrial(baseline, us), baseline_trial_id=baseline)
        self._handle(sm.KnownFound(index, known))

    def _tell(self, told: sm.Tell) -> None:
        task = self.pipeline.tasks[told.task]
        said = Said(len(self.said) + 1, "", task.name, told.token)
        match told:
            case sm.TellBaseline():
                more: dict[str, Any] = {"kind": "baseline", "trial_id": told.trial_id, "latency_us": told.latency_us}
            case sm.TellTrial():
                more = {
                    "kind": "trial", "trial_id": told.trial_id, "latency_us": told.latency_us, "failure": told.failure
                }  # fmt: skip
            case sm.TellEnded():
                more = {
                    "kind": "ended", "trial_id": told.best_trial_id, "latency_us": told.best_us, "reason": told.reason,
                    "measured": told.measured,
                }  # fmt: skip
        if more["trial_id"]:
            self.records[task.name][more["trial_id"]] = more["latency_us"]
        self.said.append(replace(said, **more))


def build_share(server: PlainJob | ShardServer, since_s: float, until_s: float) -> float:
    """Share of the build processes' time within a span in which they built."""
    seconds = server.pipeline.build.busy_s(since_s, until_s)
    return seconds / (server.pipeline.costs.build * max(1e-9, until_s - since_s))


def job_of_many_operators(tunable: int = 17, negligible: int = 8, untunable: int = 16) -> list[ReplayTask]:
    """Operators in such numbers as ResNet-50 has them, those included that turn out not to be worth trials."""
    tasks = replay_tasks(tunable + negligible, untunable=untunable)
    return [_tiny(task) if tunable <= index < tunable + negligible else task for index, task in enumerate(tasks)]


def _tiny(task: ReplayTask) -> ReplayTask:
    trials = tuple(value if isinstance(value, str) else value / 1000 for value in task.trials)
    return replace(task, baseline_us=task.baseline_us / 1000, trials=trials)


@dataclass(frozen=True)
class Spread:
    """How a job went on several servers, and on one.

    Attributes:
        search: How many times faster it was from the first to the last trial.
        job: The same over the whole job, but for the measurement of the model.
        busy: Share of the build processes' time in which they built, from the first trial to the last.
    """

    search: float
    job: float
    busy: float


def spread(
    servers: int,
    trials: int,
    costs: Costs,
    *,
    tasks: list[ReplayTask] | None = None,
    seed: int = 0,
    heartbeat_s: float = 5.0,
) -> Spread:
    """Run a job on one server, by itself, and sharded over several, each like the one.

    Args:
        servers: How many.
        trials: Its budget.
        costs: Of each server.
        tasks: Its operators; without them those of :func:`job_of_many_operators`.
        seed: Of everything random.
        heartbeat_s: Of the leases.
    """
    tasks = tasks or job_of_many_operators()
    alone = PlainJob(tasks, trials, costs, seed=seed)
    alone.run()
    members = [ShardServer(f"i{number}", tasks, costs, seed=seed) for number in range(servers)]
    settings = LeaseSettings(heartbeat_s=heartbeat_s, negligible_share=NEGLIGIBLE)
    world = World(tasks, members, trials, settings, seed=seed, network_s=(0.002, 0.01), connect_s=0.05)
    world.run()
    first_s, last_s = world.counted_s[0], world.counted_s[-1]
    return Spread(
        search=(alone.counted_s[-1] - alone.counted_s[0]) / (last_s - first_s),
        job=(alone.now_s - costs.model_s) / (world.now_s - MODEL_S),
        busy=sum(build_share(one, first_s, last_s) for one in members) / servers,
    )
