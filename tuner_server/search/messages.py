"""What goes in and out of a search session; shared by the pool and the process, without TVM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class KnownTrial:
    """A trial with its outcome.

    Attributes:
        trace: JSON of the trace.
        median_us: Its latency; None when the trial failed.
    """

    trace: str
    median_us: float | None


@dataclass(frozen=True)
class Lesson:
    """A trial of another operator, from a record of the past: what its decisions came to teaches a new task.

    Attributes:
        task: Digest of the other workload.
        trace: JSON of the trace.
        median_us: Its latency; None when the trial failed.
    """

    task: str
    trace: str
    median_us: float | None


@dataclass(frozen=True)
class SearchSettings:
    """How a session searches.

    Attributes:
        proposals: Mutated schedules that the cost model ranks for each batch; they are only decisions, not replayed.
        generations: How often the best of them are mutated again.
        epsilon: Share of a batch that is drawn at random, so that the model sees what it does not believe in.
        random_first: Trials to draw at random before the model is asked; with the opinion of other tasks to go by, a
            share of them.
        random_share: That share. What holds for the others may be wrong here, and trials that it chose do not show it.
        boost_rounds: Trees of the cost model.
        known_limit: Known trials that a session starts from, the fastest first.
        cost_weight: How much faster a schedule has to be predicted, in powers of two, for costing twice as much to
            build; 0: the cost of a build plays no part, also where schedules are drawn at random.
        attempts_per_candidate: Schedules to try for one that is valid and new, before a batch ends short.
        repeats_to_exhaust: Valid schedules in a row that are not new, after which a space counts as exhausted.
        batch_cpu_s: A batch ends short after this much CPU time, three times as much while it is empty.
        timeout_s: Deadline of one request; the process is killed on expiry.
    """

    proposals: int = 384
    generations: int = 3
    epsilon: float = 0.1
    random_first: int = 16
    random_share: float = 0.5
    boost_rounds: int = 60
    known_limit: int = 2000
    cost_weight: float = 0.1
    attempts_per_candidate: int = 64
    repeats_to_exhaust: int = 64
    batch_cpu_s: float = 20.0
    timeout_s: float = 120.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> SearchSettings:
        """Back from :meth:`to_json`."""
        return SearchSettings(**fields)


class SearchFailed(Exception):
    """A task's search cannot sample a single valid schedule; the text says why."""


class SearchLost(Exception):
    """The process of a session is gone; open the session again with what is known."""
