"""One server instance that replays recorded measurements: what LeaseService promises, in virtual time.

The simulation drives it from an event queue, the replaying gRPC server from the clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.replay.source import SPACE, ReplayTask

CONCLUSION_TRIALS = 4
"""A promotion takes as long as so many trials."""


class Refused(Exception):
    """A lease was not taken. ``kind`` is ``draining``, ``old`` or ``unknown``."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class Said:
    """An event of WatchShard: ``kind`` is baseline, trial or ended."""

    sequence: int
    kind: str
    task: str
    token: int
    trial_id: str = ""
    latency_us: float | None = None
    failure: str = ""
    reason: str = ""
    measured: int = 0


@dataclass
class _Held:
    token: int
    trials: int
    conclude: bool
    deadline_s: float
    started: int = 0
    finished: int = 0
    in_flight: int = 0
    ending: str = ""


@dataclass(frozen=True)
class _Work:
    until_s: float
    task: str
    token: int
    kind: str
    index: int = 0


@dataclass
class ReplayInstance:
    """An instance: what it holds, what it has measured, what it says.

    Attributes:
        records: By task: trial id to latency (None: failed). Durable: they survive a restart.
        worked: Task and token of every lease under which anything was measured.
        trial_s: How long one trial takes one worker.
        factor: How many times slower it is than it should be.
    """

    name: str
    tasks: dict[str, ReplayTask]
    trial_s: float = 0.1
    workers: int = 2
    batch: int = 16
    lease_s: float = 15.0
    seed: int = 0
    factor: float = 1.0
    draining: bool = False
    wanted: int = 0
    restarts: int = 0
    records: dict[str, dict[str, float | None]] = field(default_factory=dict)
    worked: set[tuple[str, int]] = field(default_factory=set)
    said: list[Said] = field(default_factory=list)
    busy_s: float = 0.0
    _leases: dict[str, _Held] = field(default_factory=dict)
    _ended: list[tuple[str, _Held]] = field(default_factory=list)
    _newest: dict[str, int] = field(default_factory=dict)
    _work: list[_Work] = field(default_factory=list)
    _turn: int = 0
    _rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self._rng.seed(f"{self.seed}/{self.name}")

    @property
    def incarnation(self) -> str:
        return f"{self.name}/{self.restarts}"

    @property
    def in_flight(self) -> int:
        return len(self._work)

    @property
    def holds(self) -> dict[str, int]:
        """Task to token of the leases that it holds."""
        return {task: held.token for task, held in self._leases.items()}

    def restart(self) -> None:
        """Lose everything but the records."""
        self.restarts += 1
        self.draining = False
        self.said, self._leases, self._ended, self._newest, self._work = [], {}, [], {}, []

    # What LeaseService offers

    def grant(self, now_s: float, task: str, token: int, trials: int, conclude: bool) -> None:
        if token < self._newest.get(task, 0):
            raise Refused("old")
        held = self._leases.get(task)
        if held is not None and held.token == token and not held.ending:
            held.trials, held.deadline_s = max(held.trials, trials), now_s + self.lease_s
            held.conclude = held.conclude or conclude
            self._dispatch(now_s)
            return
        if token == self._newest.get(task):
            raise Refused("old")
        if self.draining:
            raise Refused("draining")
        if held is not None:
            self._end(task, held, "revoked")
        self._newest[task] = token
        self._leases[task] = _Held(token, trials, conclude, now_s + self.lease_s)
        self._dispatch(now_s)

    def renew(self, now_s: float, leases: Iterable[tuple[str, int]]) -> list[str]:
        lost = []
        for task, token in leases:
            held = self._leases.get(task)
            if held is None or held.token != token:
                lost.append(task)
            else:
                held.deadline_s = now_s + self.lease_s
        return lost

    def revoke(self, now_s: float, task: str, token: int) -> None:
        held = self._leases.get(task)
        if held is not None and held.token == token:
            self._end(task, held, "revoked")
        self._dispatch(now_s)

    def newest(self, task: str) -> int:
        """The newest token that was seen."""
        return self._newest.get(task, 0)

    def end_at_once(self, task: str, token: int, reason: str) -> None:
        """A lease that is over before it began."""
        if (held := self._leases.get(task)) is not None:
            self._end(task, held, "revoked")
        self._newest[task] = token
        self._say("ended", _Work(0.0, task, token, ""), reason=reason)

    def warm(self, task: str, records: dict[str, float | None]) -> None:
        """Take in records of others."""
        self.records.setdefault(task, {}).update(records)

    # Time

    def next_due_s(self) -> float:
        """When something will happen by itself."""
        due = [work.until_s for work in self._work] + [held.deadline_s for held in self._leases.values()]
        return min(due, default=math.inf)

    def run_until(self, now_s: float) -> None:
        """Let everything happen that is due."""
        while True:
            due = min(self._work, key=lambda work: work.until_s, default=None)
            if due is None or due.until_s > now_s:
                break
            self._work.remove(due)
            self._finish(due)
            self._dispatch(due.until_s)
        for task, held in list(self._leases.items()):
            if held.deadline_s <= now_s:
                self._end(task, held, "expired")
        self._dispatch(now_s)

    def _dispatch(self, now_s: float) -> None:
        while len(self._work) < self.workers:
            ready = [(task, held) for task, held in self._leases.items() if self._next(task, held)]
            if not ready:
                return
            self._turn += 1
            task, held = ready[self._turn % len(ready)]
            kind = self._next(task, held)
            trials = CONCLUSION_TRIALS if kind == "conclude" else 1
            self.worked.add((task, held.token))
            took_s = self.trial_s * self.factor * trials * self._rng.uniform(0.8, 1.2)
            self.busy_s += took_s
            held.in_flight += 1
            index = 0
            if kind == "trial":
                held.started += 1
                index = self._candidate(task)
            self._work.append(_Work(now_s + took_s, task, held.token, kind, index))

    def _next(self, task: str, held: _Held) -> str:
        if f"{task}/baseline" not in self.records.get(task, {}):
            return "" if held.in_flight else "baseline"
        if held.started < held.trials:
            return "trial"
        return "conclude" if held.conclude and not held.in_flight else ""

    def _candidate(self, task: str) -> int:
        known = self.records.get(task, {})
        flying = {work.index for work in self._work if work.task == task}
        while True:
            index = self._rng.randrange(SPACE)
            if f"{task}/{index}" not in known and index not in flying:
                return index

    def _finish(self, work: _Work) -> None:
        task = self.tasks[work.task]
        held = self._leases.get(work.task)
        if held is None or held.token != work.token:
            held = next((one for name, one in self._ended if (name, one.token) == (work.task, work.token)), None)
        records = self.records.setdefault(work.task, {})
        if held is not None:
            held.in_flight -= 1
        if work.kind == "baseline":
            trial_id = f"{task.name}/baseline"
            records[trial_id] = task.baseline_us
            self._say("baseline", work, trial_id=trial_id, latency_us=task.baseline_us)
        elif work.kind == "trial":
            trial_id = f"{task.name}/{work.index}"
            result = task.trial(work.index)
            latency_us = None if isinstance(result, str) else result
            records[trial_id] = latency_us
            if held is not None:
                held.finished += 1
            failure = result if isinstance(result, str) else ""
            self._say("trial", work, trial_id=trial_id, latency_us=latency_us, failure=failure)
        elif held is not None and not held.ending:
            valid = {trial: us for trial, us in records.items() if us is not None and not trial.endswith("verified")}
            best = min(valid, key=lambda trial: (valid[trial], trial))
            records[f"{best}/verified"] = valid[best]
            del self._leases[work.task]
            self._say(
                "ended",
                work,
                trial_id=f"{best}/verified",
                latency_us=valid[best],
                reason="concluded",
                measured=held.finished,
            )
            return
        if held is None:
            return
        if held.ending:
            if not held.in_flight:
                self._ended = [entry for entry in self._ended if entry[1] is not held]
                self._say("ended", work, reason=held.ending, measured=held.finished)
        elif not held.conclude and held.finished >= held.trials and not held.in_flight:
            del self._leases[work.task]
            self._say("ended", work, reason="measured", measured=held.finished)

    def _end(self, task: str, held: _Held, reason: str) -> None:
        """No more of this lease; what is being measured is finished first."""
        del self._leases[task]
        held.ending = reason
        if held.in_flight:
            self._ended.append((task, held))
        else:
            self._say("ended", _Work(0.0, task, held.token, ""), reason=reason, measured=held.finished)

    def _say(self, kind: str, work: _Work, **more: object) -> None:
        self.said.append(Said(len(self.said) + 1, kind, work.task, work.token, **more))  # type: ignore[arg-type]
