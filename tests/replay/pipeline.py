"""What a server works with, in virtual time: search and build processes, measurement workers, one device.

It performs what the server's own state machines ask for, with invented durations. The defaults are those of a GPU
server with 16 cores and four workers as it was traced: about 26 trials per second, bound by the builds.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.replay.source import SPACE, ReplayTask
from tuner_core.model import FailureKind
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.progress import Limits


@dataclass(frozen=True)
class Costs:
    """Processes, and seconds that things take one of them.

    Attributes:
        in_flight: Candidates that the server keeps in flight for a job; see ``Limits.for_cores``.
        build_spread: Sigma of the logarithm of a build's time; half as much of it lies between tasks.
        rank_s: What a batch takes before its first candidate; each of them ``propose_s`` more, in pieces.
        slow_share: Of the builds, so many take ``slow_s`` instead, from the first to the second.
        store_s: A look-up, a claim or a commit.
    """

    search: int = 5
    build: int = 10
    workers: int = 4
    batch: int = 8
    in_flight: int = 72
    open_s: float = 0.15
    rank_s: float = 0.25
    propose_s: float = 0.035
    piece: int = 4
    build_s: float = 0.33
    build_spread: float = 0.8
    build_most_s: float = 2.0
    slow_share: float = 0.0
    slow_s: tuple[float, float] = (1.0, 3.0)
    measure_s: float = 0.03
    baseline_s: float = 0.4
    reference_s: float = 0.7
    alone_s: float = 0.035
    check_s: float = 0.05
    store_s: float = 0.01
    model_s: float = 1.0

    @property
    def limits(self) -> Limits:
        """What a server of this kind keeps in flight."""
        return Limits.for_cores(self.batch, self.in_flight)


class Clock:
    """A queue of what happens when, in virtual seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        """Let something happen later."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._order), what))

    def next_due_s(self) -> float:
        """When the next thing happens."""
        return self._queue[0][0] if self._queue else math.inf

    def run_until(self, until_s: float) -> None:
        """Let everything happen that is due."""
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self._queue)
            what()
        self.now_s = max(self.now_s, until_s)

    def clear(self) -> None:
        """Nothing of it happens."""
        self._queue.clear()


class Places:
    """Processes that take one thing after the other, first come first served.

    Attributes:
        spans: When something was done, and for how long.
    """

    def __init__(self, clock: Clock, count: int) -> None:
        self._clock, self._free = clock, count
        self._waiting: deque[tuple[float, Callable[[], None], Callable[[], bool]]] = deque()
        self.spans: list[tuple[float, float]] = []

    def take(self, seconds: float, done: Callable[[], None], wanted: Callable[[], bool] = lambda: True) -> None:
        """Do something that takes so long; it is left out if it is not wanted any more when its turn comes."""
        self._waiting.append((seconds, done, wanted))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._free and self._waiting:
            seconds, done, wanted = self._waiting.popleft()
            if wanted():
                self._free -= 1
                self.spans.append((self._clock.now_s, seconds))
                self._clock.after(seconds, lambda done=done: self._finish(done))

    def _finish(self, done: Callable[[], None]) -> None:
        self._free += 1
        self._dispatch()
        done()

    def busy_s(self, since_s: float, until_s: float) -> float:
        """Process seconds within a time."""
        return sum(max(0.0, min(at + took, until_s) - max(at, since_s)) for at, took in self.spans)


class Device:
    """Workers that measure side by side, or one of them alone; who comes after one that waits alone waits behind it."""

    def __init__(self, clock: Clock, workers: int) -> None:
        self._clock, self._workers, self._running, self._alone = clock, workers, 0, False
        self._waiting: deque[tuple[bool, float, Callable[[], None]]] = deque()

    def take(self, seconds: float, done: Callable[[], None], *, alone: bool = False) -> None:
        """Measure for so long."""
        self._waiting.append((alone, seconds, done))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and not self._alone and self._running < self._workers:
            alone, seconds, done = self._waiting[0]
            if alone and self._running:
                return
            self._waiting.popleft()
            self._alone = alone
            self._running += 1
            self._clock.after(seconds, lambda alone=alone, done=done: self._finish(alone, done))

    def _finish(self, alone: bool, done: Callable[[], None]) -> None:
        self._running -= 1
        if alone:
            self._alone = False
            self._waiting = deque(sorted(self._waiting, key=lambda entry: entry[0]))  # the others first
        self._dispatch()
        done()


class Pipeline:
    """Performs a state machine's instructions, and emits what comes of them.

    Args:
        tasks: By index; candidates are numbers of their recorded trials.
        costs: How long things take.
        clock: Of this server.
        emit: Takes events.
        seed: Of everything random.
    """

    def __init__(
        self, tasks: Sequence[ReplayTask], costs: Costs, clock: Clock, emit: Callable[[Any], None], seed: str
    ) -> None:
        self.tasks, self.costs, self._clock, self._emit = tasks, costs, clock, emit
        self._rng = random.Random(seed)
        of_task = random.Random(0)  # the same on every server
        half = costs.build_spread / 2
        self._heavy = [of_task.lognormvariate(-half * half / 2, half) for _ in tasks]
        self.search = [Places(clock, 1) for _ in range(costs.search)]
        self.build = Places(clock, costs.build)
        self.device = Device(clock, costs.workers)
        self._slots: dict[int, int] = {}
        self._proposed: dict[int, set[int]] = {}
        self._unbuilt: set[tuple[int, str]] = set()
        self._kept: set[tuple[int, str]] = set()
        self._idle = [0] * costs.search
        self._generating: dict[int, deque[tuple[int, int]]] = {}

    def _later(self, event: Any) -> Callable[[], None]:
        return lambda: self._emit(event)

    def _stored(self, event: Any) -> None:
        self._clock.after(self.costs.store_s, self._later(event))

    def perform(self, instruction: Any) -> None:
        """Begin with an instruction."""
        costs = self.costs
        match instruction:
            case m.MeasureBaseline(index):
                self.build.take(
                    self._vary(costs.baseline_s),
                    lambda: self.device.take(costs.measure_s, lambda: self._baseline(index)),
                )
            case m.OpenSession(index, known):
                slot = self._slots[index] = min(range(costs.search), key=lambda place: self._idle[place])
                self._idle[slot] += 1
                self._proposed.setdefault(index, set()).update(int(one.trace.rpartition("/")[2]) for one in known)
                self.search[slot].take(costs.open_s, lambda: None)
            case m.CloseSession(index):
                self._idle[self._slots.pop(index)] -= 1
            case m.Generate(index, batch, count):
                self._generating.setdefault(index, deque()).append((batch, count))
                if len(self._generating[index]) == 1:
                    self._piece(index, costs.rank_s)
            case m.RunTrial(index, batch, trace):
                self._unbuilt.add((index, trace))
                self.build.take(
                    self._build_s(index), lambda: self._built(index, batch, trace), self._still(index, trace)
                )
            case m.Abandon(index, batch, traces):
                for trace in traces:
                    if (index, trace) in self._unbuilt:
                        self._unbuilt.discard((index, trace))
                        self._emit(m.TrialDropped(index, batch, trace))
            case m.Promote(index, traces):
                self._promote(index, traces)
            case m.Check(index, trace):
                event = m.Checked(index, trace, "ok", "", f"{trace}/verified")
                self._clock.after(
                    costs.reference_s, lambda: self.device.take(costs.check_s, lambda: self._stored(event))
                )
            case m.MeasureModel():
                self._clock.after(costs.model_s, self._later(m.ModelMeasured(2.0, 1.0, True)))

    def _vary(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.5, 1.5)

    def _build_s(self, index: int) -> float:
        if self.costs.slow_share and self._rng.random() < self.costs.slow_share:
            return self._rng.uniform(*self.costs.slow_s)
        sigma = self.costs.build_spread * math.sqrt(0.75)
        seconds = self.costs.build_s * self._heavy[index] * self._rng.lognormvariate(-sigma * sigma / 2, sigma)
        return min(seconds, self.costs.build_most_s)

    def _still(self, index: int, trace: str) -> Callable[[], bool]:
        return lambda: (index, trace) in self._unbuilt

    def _baseline(self, index: int) -> None:
        name = f"{self.tasks[index].name}/baseline"
        self._stored(m.BaselineMeasured(index, name, self.tasks[index].baseline_us, name))

    def _piece(self, index: int, before_s: float) -> None:
        """Have the session's process propose the next piece of its first batch."""
        _, left = self._generating[index][0]
        seconds = before_s + self.costs.propose_s * min(left, self.costs.piece)
        self.search[self._slots[index]].take(self._vary(seconds), lambda: self._pieced(index))

    def _pieced(self, index: int) -> None:
        generating = self._generating[index]
        batch, left = generating.popleft()
        count = min(left, self.costs.piece)
        if left > count:
            generating.appendleft((batch, left - count))
        if generating:
            self._piece(index, 0.0 if left > count else self.costs.rank_s)
        self._propose(index, batch, count, more=left > count)

    def _propose(self, index: int, batch: int, count: int, *, more: bool) -> None:
        proposed = self._proposed[index]
        found = []
        while len(found) < count:
            number = self._rng.randrange(SPACE)
            if number not in proposed:
                proposed.add(number)
                found.append(f"{self.tasks[index].name}/{number}")
        self._emit(m.CandidatesReady(index, batch, tuple(found), more=more))

    def _built(self, index: int, batch: int, trace: str) -> None:
        if (index, trace) not in self._unbuilt:
            return
        self._unbuilt.discard((index, trace))
        self.device.take(self._vary(self.costs.measure_s), lambda: self._measured(index, batch, trace))

    def _measured(self, index: int, batch: int, trace: str) -> None:
        found = self.tasks[index].trial(int(trace.rpartition("/")[2]))
        self._kept.add((index, trace))
        if isinstance(found, str):
            self._stored(m.TrialFailed(index, batch, trace, FailureKind(found), "", trace))
        else:
            self._stored(m.TrialMeasured(index, batch, trace, found, trace))

    def _promote(self, index: int, traces: tuple[str, ...]) -> None:
        missing = [trace for trace in traces if (index, trace) not in self._kept and not trace.endswith("/baseline")]
        left = [len(missing)]
        task = self.tasks[index]

        def alone() -> None:
            def known(trace: str) -> m.KnownTrial:
                found = task.baseline_us if trace.endswith("/baseline") else task.trial(int(trace.rpartition("/")[2]))
                return m.KnownTrial(trace, None if isinstance(found, str) else found)

            event = m.Promoted(index, tuple(known(trace) for trace in traces))
            self.device.take(self.costs.alone_s * len(traces), self._later(event), alone=True)

        def built() -> None:
            left[0] -= 1
            if not left[0]:
                alone()

        for _ in missing:  # measured elsewhere: built again
            self.build.take(self._build_s(index), built)
        if not missing:
            alone()
