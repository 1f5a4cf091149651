"""A whole sharded job in virtual time: the lease machine, replaying instances, and a network that misbehaves.

Everything random comes from one seed, so that every run can be repeated.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.replay.instance import Refused, ReplayInstance, Said
from tests.replay.source import ReplayTask
from tuner_core.leases import messages as m
from tuner_core.leases.machine import LeaseMachine
from tuner_core.leases.state import LeaseSettings, TaskHistory
from tuner_core.model import TaskState

MODEL_S = 1.0
"""How long the measurement of the model takes."""
FAULTS = ("kill", "hang", "cut", "restart", "slow", "drain", "delay")


@dataclass
class Link:
    """The client's side of one instance."""

    instance: ReplayInstance
    up: bool = True
    hung: bool = False
    cut: bool = False
    connected: bool = False
    cursor: int = 0
    incarnation: str = ""
    lag_s: float = 0.0
    free_s: float = 0.0
    """When the last message arrives: messages of one stream do not overtake each other."""
    held_back: list[Callable[[], None]] = field(default_factory=list)

    @property
    def reachable(self) -> bool:
        return self.up and not self.hung and not self.cut


def _is_fallback(trial_id: str) -> bool:
    return trial_id.endswith("baseline/verified")


def _history(name: str, records: dict[str, float | None], over: bool) -> TaskHistory:
    """What a client that takes the job up reads from its store."""
    trials = {trial: us for trial, us in records.items() if trial.rpartition("/")[2].isdigit()}
    published = {trial: us for trial, us in records.items() if trial.endswith("/verified") and us is not None}
    best = min(published, key=lambda trial: (published[trial], trial), default="")
    baseline_us = records.get(f"{name}/baseline")
    valid = [us for us in (*trials.values(), baseline_us) if us is not None]
    return TaskHistory(
        trials=trials,
        by_instance={"earlier": len(trials)},
        best_us=min(valid, default=None),
        baseline_us=baseline_us,
        published_us=published.get(best),
        published_id=best,
        published_fallback=_is_fallback(best),
        concluded=over and bool(best),
    )


class World:
    """One job from start to end.

    Args:
        tasks: Its tasks.
        instances: Who measures.
        trials: Budget.
        settings: Of the leases.
        seed: Of everything random.
        faults: How many faults happen, at random times within ``span_s``.
    """

    def __init__(
        self,
        tasks: list[ReplayTask],
        instances: list[ReplayInstance],
        trials: int,
        settings: LeaseSettings,
        *,
        seed: int = 0,
        faults: int = 0,
        span_s: float = 40.0,
        network_s: tuple[float, float] = (0.001, 0.05),
        connect_s: float = 1.0,
    ) -> None:
        self.rng = random.Random(seed)
        self.settings = settings
        self.trials = trials
        self.epoch = 1
        self.away = False
        self.machine = LeaseMachine([task.plan for task in tasks], trials, settings)
        self.expected = trials
        self.links = {one.name: Link(one) for one in instances}
        self.store: dict[str, dict[str, float | None]] = {task.name: {} for task in tasks}
        self.now_s = 0.0
        self.said: list[str] = []
        self.holders: dict[tuple[str, int], set[str]] = {}
        self.granted: list[tuple[float, str, str, int]] = []
        self.events = 0
        self.counted_s: list[float] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._network_s = network_s
        self._wakes: dict[str, float] = {}
        for name in self.links:
            self.at(self.rng.uniform(0, connect_s), lambda name=name: self._connect(name))
        for _ in range(faults):
            self._plan_fault(self.rng.uniform(0.5, span_s))
        self.at(0.0, self._tick)

    # The queue

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(when_s, self.now_s), next(self._order), what))

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, what)

    def run(self, limit_s: float = 5000.0) -> None:
        """Until the job has ended, then gather what is left."""
        while self.away or self.machine.finished is None:
            assert self._queue, "nothing will ever happen again"
            self.now_s, _, what = heapq.heappop(self._queue)
            assert self.now_s < limit_s, f"the job does not end: {self.said[-5:]}"
            what()
        for link in self.links.values():  # those that are away come back, and are asked once more
            link.instance.run_until(self.now_s)
            self._gather(link)

    def feed(self, event: m.Event) -> None:
        assert not self.away
        self.events += 1
        if isinstance(event, m.TrialFinished):
            self.counted_s.append(self.now_s)
        for instruction in self.machine.handle(event):
            self._perform(instruction)

    def _to_client(self, delay_s: float, what: Callable[[], None]) -> None:
        """Let something happen at the client, unless that has died meanwhile."""
        epoch = self.epoch
        self.after(delay_s, lambda: what() if self.epoch == epoch else None)

    def _tick(self) -> None:
        if not self.away:
            self.feed(m.Tick(self.now_s))
        self.after(self.settings.heartbeat_s / 4, self._tick)

    # What the driver does

    def _perform(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.Say():
                self.said.append(f"{self.now_s:.1f} {instruction.text}")
            case m.Warm(instance, task, token):
                self._call(instance, lambda one: one.warm(task, self.store[task]), "warm", task, token)
            case m.Grant(instance, task, token, trials, conclude):
                self.holders.setdefault((task, token), set()).add(instance)
                self.granted.append((self.now_s, instance, task, token))
                self._call(
                    instance, lambda one: one.grant(self.now_s, task, token, trials, conclude), "grant", task, token
                )
            case m.Renew(instance, leases):
                self._renew(instance, leases)
            case m.Revoke(instance, task, token):
                self._call(instance, lambda one: one.revoke(self.now_s, task, token), "", task, token)
            case m.MeasureModel(instance):
                self._to_client(MODEL_S, lambda: self._model(instance))

    def _delay(self, link: Link) -> float:
        return self.rng.uniform(*self._network_s) + link.lag_s

    def _call(self, name: str, what: Callable[[ReplayInstance], None], answer: str, task: str, token: int) -> None:
        """One call: it arrives or not, its answer arrives or not, and the client gives up after a heartbeat."""
        link = self.links[name]
        open_call = [True]
        epoch = self.epoch

        def reply(event: m.Event) -> None:
            if open_call[0] and answer and self.epoch == epoch:
                open_call[0] = False
                self.feed(event)

        def refuse(reason: str, draining: bool = False) -> None:
            unanswered = reason == "no answer"
            reply(m.LeaseRefused(self.now_s, name, task, token, reason, draining, unanswered))

        def arrive() -> None:
            if link.cut or not link.up:
                return
            if link.hung:
                link.held_back.append(arrive)
                return
            link.instance.run_until(self.now_s)
            try:
                what(link.instance)
            except Refused as refused:
                kind = refused.kind
                self._to_client(self._delay(link), lambda: refuse(kind, kind == "draining"))
                return
            finally:
                self._listen(name)
            accepted = m.Warmed if answer == "warm" else m.LeaseAccepted
            self.after(self._delay(link), lambda: reply(accepted(self.now_s, name, task, token)))

        self.after(self._delay(link), arrive)
        self.after(self.settings.heartbeat_s, lambda: refuse("no answer"))

    def _renew(self, name: str, leases: tuple[tuple[str, int], ...]) -> None:
        link = self.links[name]
        epoch = self.epoch

        def arrive() -> None:
            if not link.reachable:
                return
            link.instance.run_until(self.now_s)
            lost = set(link.instance.renew(self.now_s, leases))
            for task, token in leases:
                if task in lost:
                    event_of = lambda task=task, token=token: m.LeaseLost(self.now_s, name, task, token)  # noqa: E731
                    if self.epoch == epoch:
                        self._to_client(self._delay(link), lambda make=event_of: self.feed(make()))

        self.after(self._delay(link), arrive)

    def _model(self, name: str) -> None:
        if self.links[name].reachable:
            self.feed(m.ModelMeasured(self.now_s, name, 100.0, 50.0, True))
        else:
            self.feed(m.ModelNotMeasured(self.now_s, name, "no answer"))

    # The watch stream

    def _connect(self, name: str) -> None:
        link = self.links[name]
        if not link.reachable or self.away:
            return
        one = link.instance
        one.run_until(self.now_s)
        if link.incarnation != one.incarnation:
            link.incarnation, link.cursor = one.incarnation, 0
        link.connected = True
        self.feed(m.InstanceJoined(self.now_s, name, one.incarnation, one.workers, one.batch, one.draining, one.wanted))
        self._gather(link)
        self._listen(name)
        self._pulse(name, one.incarnation)

    def _pulse(self, name: str, incarnation: str) -> None:
        link = self.links[name]
        if link.incarnation != incarnation or not link.up:
            return
        if not link.connected or link.cut:
            return
        if not link.hung:
            draining = link.instance.draining
            self._arrive(link, lambda: self.feed(m.Heard(self.now_s, name, draining)))
        self.after(self.settings.heartbeat_s / 2, lambda: self._pulse(name, incarnation))

    def _arrive(self, link: Link, what: Callable[[], None]) -> None:
        link.free_s = max(link.free_s, self.now_s + self._delay(link))
        self._to_client(link.free_s - self.now_s, what)

    def _listen(self, name: str) -> None:
        """Send on what the instance says, and wake it when it will say more."""
        link = self.links[name]
        if link.hung or not link.up:
            return
        if link.connected and not link.cut:
            for said in link.instance.said[link.cursor :]:
                link.cursor = said.sequence
                self._arrive(link, lambda said=said: self._hear(link, said))
                if self.rng.random() < 0.02:
                    self._arrive(link, lambda said=said: self._hear(link, said))
        due_s = link.instance.next_due_s()
        if due_s < self._wakes.get(name, float("inf")) or self._wakes.get(name, 0.0) <= self.now_s:
            self._wakes[name] = due_s
            if due_s != float("inf"):
                self.at(due_s, lambda: self._wake(name))

    def _wake(self, name: str) -> None:
        link = self.links[name]
        if link.up and not link.hung:
            link.instance.run_until(self.now_s)
            self._listen(name)

    def _hear(self, link: Link, said: Said) -> None:
        name = link.instance.name
        if said.trial_id and link.reachable:
            self.store[said.task].update({said.trial_id: link.instance.records[said.task][said.trial_id]})
        event: m.Event
        if said.kind == "trial":
            event = m.TrialFinished(
                self.now_s, name, said.task, said.token, said.trial_id, said.latency_us, said.failure
            )
        elif said.kind == "baseline":
            event = m.BaselineMeasured(self.now_s, name, said.task, said.token, said.latency_us, said.trial_id)
        else:
            verified = said.reason == "concluded"
            event = m.LeaseEnded(
                self.now_s,
                name,
                said.task,
                said.token,
                said.reason,
                verified,
                said.latency_us,
                said.trial_id,
                fallback=_is_fallback(said.trial_id),
            )
        self.feed(event)

    def _gather(self, link: Link) -> None:
        for task, records in link.instance.records.items():
            self.store[task].update(records)

    # The client

    def client_dies(self, away_s: float) -> None:
        """Kill the client; ``away_s`` later another takes the job up from the store and the journal."""
        if self.away or self.machine.finished is not None:
            return
        self.epoch += 1
        self.away = True
        for link in self.links.values():
            link.connected, link.incarnation = False, ""
        ledgers = self.machine.board.tasks
        over = {name for name, task in ledgers.items() if task.state in (TaskState.TUNED, TaskState.FALLBACK)}
        written = over if self.rng.random() < 0.5 else set()  # the journal lags behind
        self.after(away_s, lambda: self._take_up(written))

    def _take_up(self, over: set[str]) -> None:
        self.away = False
        for link in self.links.values():
            if link.reachable:
                link.instance.run_until(self.now_s)
                self._gather(link)
        plans = [task.plan for task in self.machine.board.tasks.values()]
        known = {name: _history(name, records, name in over) for name, records in self.store.items()}
        self.machine = LeaseMachine(plans, self.trials, self.settings, known=known, epoch=self.epoch)
        counted = sum(len(task.counted) for task in self.machine.board.tasks.values())
        self.expected = counted + self.machine.board.unassigned
        for name in self.links:
            self.after(self.rng.uniform(0, 1), lambda name=name: self._connect(name))

    # Faults

    def _plan_fault(self, when_s: float) -> None:
        name, fault = self.rng.choice(sorted(self.links)), self.rng.choice(FAULTS)
        self.at(when_s, lambda: self.fault(name, fault))

    def fault(self, name: str, fault: str, lasts_s: float | None = None) -> None:
        """Let something go wrong at an instance; it is over after ``lasts_s``."""
        link = self.links[name]
        if not link.up or link.hung or link.cut:
            return
        lasts_s = lasts_s if lasts_s is not None else self.rng.choice((0.5, 3.0, 12.0, 40.0))
        link.instance.run_until(self.now_s)
        if fault in ("kill", "restart"):
            link.up = link.connected = False
            if fault == "restart":
                lasts_s = 0.3
            if self.rng.random() < 0.5:  # its port refuses at once
                gone = "was killed"
                if not self.away:
                    self._to_client(self._delay(link), lambda: self.feed(m.InstanceGone(self.now_s, name, gone)))
        elif fault == "hang":
            link.hung = True
        elif fault == "cut":
            link.cut, link.connected = True, False
        elif fault == "slow":
            link.instance.factor = 20.0
        elif fault == "drain":
            link.instance.draining = True
        elif fault == "delay":
            link.lag_s = self.rng.choice((0.5, 3.0, 8.0))
        self.after(lasts_s, lambda: self._heal(name, fault))

    def _heal(self, name: str, fault: str) -> None:
        link = self.links[name]
        if fault in ("kill", "restart"):
            link.instance.restart()
            link.up = True
            self._wakes.pop(name, None)
        elif fault == "hang":
            link.hung = False
            link.instance.run_until(self.now_s)
            held_back, link.held_back = link.held_back, []
            for arrive in held_back:
                arrive()
            self._wakes.pop(name, None)
        elif fault == "cut":
            link.cut = False
        elif fault == "slow":
            link.instance.factor = 1.0
        elif fault == "drain":
            self.fault(name, "restart")
            return
        elif fault == "delay":
            link.lag_s = 0.0
        if fault in ("kill", "restart", "cut", "hang"):
            self.after(self.rng.uniform(0.05, self.settings.heartbeat_s), lambda: self._connect(name))
        self._listen(name)
