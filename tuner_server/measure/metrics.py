"""What measuring has cost so far: pauses for exclusive measurement, lost workers, void measurements, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spans:
    """Durations of one kind, in seconds."""

    count: int = 0
    last_s: float = 0.0
    longest_s: float = 0.0
    total_s: float = 0.0

    def plus(self, seconds: float) -> Spans:
        """With one more."""
        return Spans(self.count + 1, seconds, max(self.longest_s, seconds), self.total_s + seconds)


@dataclass(frozen=True)
class FleetFacts:
    """The counts at one moment.

    Attributes:
        pauses: Times for which somebody measured alone while other workers stood idle, from the first request that was
            held back. Promotion, whole models and suspects of a fault do that.
        pause_bound_s: No pause for promotion is longer, unless a worker is lost in it.
        recoveries: From the loss of the first worker until all of them take requests again.
        worker_restarts: Workers started in place of lost ones.
        voided: Measurements that were thrown away because a neighbour's fault may have spoilt them.
        faults: Losses of workers by kind: a :class:`tuner_core.model.FailureKind`, or ``device_lost`` when the device
            lost all of them at once.
    """

    pauses: Spans = Spans()
    pause_bound_s: float = 0.0
    recoveries: Spans = Spans()
    worker_restarts: int = 0
    voided: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)


class FleetMetrics:
    """Counts what happens to the workers of one device. Not reset when the device is partitioned anew.

    Args:
        pause_bound_s: See :class:`FleetFacts`.
    """

    def __init__(self, pause_bound_s: float = 0.0) -> None:
        self._pause_bound_s = pause_bound_s
        self._pauses = Spans()
        self._recoveries = Spans()
        self._restarts = 0
        self._voided = 0
        self._faults: Counter[str] = Counter()

    def paused(self, seconds: float) -> None:
        """Exclusive measurement has kept the others idle for so long."""
        self._pauses = self._pauses.plus(seconds)

    def recovered(self, seconds: float) -> None:
        """All workers are there again."""
        self._recoveries = self._recoveries.plus(seconds)

    def restarted(self) -> None:
        """A worker was started in place of a lost one."""
        self._restarts += 1

    def voided(self, measurements: int) -> None:
        """Measurements were thrown away."""
        self._voided += measurements

    def fault(self, kind: str) -> None:
        """A worker (or all of a device) was lost."""
        self._faults[str(kind)] += 1

    def facts(self) -> FleetFacts:
        """The counts as they are now."""
        return FleetFacts(
            self._pauses, self._pause_bound_s, self._recoveries, self._restarts, self._voided, dict(self._faults)
        )
