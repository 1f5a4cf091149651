"""Latencies that were recorded once from a real job, standing in for a device."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tuner_core.leases.state import TaskPlan

RECORDED = Path(__file__).resolve().parents[1] / "data" / "replay-cpu.json.gz"
SPACE = 1 << 14
"""Candidates that a replayed task has: the recorded ones, then the same again, a little different each time."""


@dataclass(frozen=True)
class ReplayTask:
    """One task: its baseline, and recorded trials (latency in microseconds, or the kind of the failure)."""

    name: str
    description: str
    weight: int
    tunable: bool
    baseline_us: float
    trials: tuple[float | str, ...]

    def trial(self, index: int) -> float | str:
        """What measuring candidate ``index`` gives."""
        found = self.trials[index % len(self.trials)]
        if isinstance(found, str) or index < len(self.trials):
            return found
        return found * (1.0 + zlib.crc32(f"{self.name}/{index}".encode()) % 1000 / 2000)

    @property
    def plan(self) -> TaskPlan:
        """The task for the lease state machine."""
        return TaskPlan(self.name, self.weight, self.tunable, self.baseline_us)


@lru_cache
def _recorded(path: Path) -> dict[str, object]:
    with gzip.open(path, "rt") as file:
        document: dict[str, object] = json.load(file)
    assert document["format"] == "tuner-replay/1"
    return document


def replay_tasks(count: int, *, untunable: int = 0, path: Path = RECORDED) -> list[ReplayTask]:
    """So many tunable tasks, then untunable ones. Beyond the recorded ones they repeat with other sizes."""
    entries = _recorded(path)["tasks"]
    assert isinstance(entries, list)
    tunable = [entry for entry in entries if entry["tunable"] and entry["trials"]]
    found = []
    for index in range(count):
        entry = tunable[index % len(tunable)]
        scale = 1.0 + 0.37 * (index // len(tunable))
        trials = tuple(value if isinstance(value, str) else value * scale for value in entry["trials"])
        baseline_us = (entry["baseline_us"] or 100.0) * scale
        found.append(ReplayTask(f"task{index}", entry["description"], 1 + index % 5, True, baseline_us, trials))
    for index in range(untunable):
        found.append(ReplayTask(f"plain{index}", "add", 1, False, 3.0 + index, ()))
    return found
