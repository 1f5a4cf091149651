"""Progress as plain lines: pipes, logs, CI."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TextIO

from tuner_client.job import JobReport, TaskReport
from tuner_client.render import units
from tuner_client.render.instances import instance_line
from tuner_client.render.pace import Pace
from tuner_client.render.tasks import where
from tuner_core.model import TaskState

_INTERVAL_S = 10.0
_QUIET_STATES = (TaskState.FALLBACK, TaskState.SKIPPED)


class PlainProgress:
    """One line for each step, for each operator that is finished, and every ten seconds.

    Args:
        stream: Where the lines go.
        interval_s: Seconds between two lines that only say how far the job is.
    """

    def __init__(self, stream: TextIO, interval_s: float = _INTERVAL_S) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._started = time.monotonic()
        self._told: dict[str, TaskState] = {}
        self._last_line = 0.0
        self._last_measured = 0
        self._phase = ""
        self._lost = False
        self._pace = Pace()
        self._first = True

    def _line(self, text: str) -> None:
        stamp = units.duration(time.monotonic() - self._started)
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(f"[{stamp:>5}] {text}\n")
            self._stream.flush()

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A line when it begins."""
        self._line(f"{text} ...")
        yield

    def note(self, text: str) -> None:
        """A line."""
        self._line(text)

    def job(self, report: JobReport, message: str = "") -> None:
        """Lines for what has changed and matters."""
        if self._lost:
            self._lost = False
            self._line("connected again")
        if self._first and (report.sm_count or report.ended):
            self._first = False
            budget = f", {units.count(report.budget, 'trial')}" if report.budget else ""
            self._line(f"{where(report)}: {units.count(len(report.tasks), 'operator')}{budget}")
        self._pace.note(report)
        if message:
            self._line(message)
        if report.phase and report.phase != self._phase:
            self._phase = report.phase
            if not report.ended:
                self._line(report.phase)
        for task in report.tasks:
            if task.state.final and self._told.get(task.name) is not task.state:
                self._told[task.name] = task.state
                if task.state not in _QUIET_STATES or task.trials:
                    self._line(_task_line(task))
        now = time.monotonic()
        if not report.ended and now - self._last_line >= self._interval_s and report.measured != self._last_measured:
            self._last_line = now
            self._last_measured = report.measured
            self._line(self._progress_line(report))
            if report.instances:
                self._line(instance_line(report.instances))

    def _progress_line(self, report: JobReport) -> str:
        parts = [f"{report.measured + report.reused:,}/{report.budget:,} trials"]
        if report.reused:
            parts.append(f"{report.reused} of them reused")
        if report.failed:
            parts.append(f"{report.failed} failed")
        if pace := self._pace.trials_per_s(report):
            parts.append(units.rate(pace))
        if (left := self._pace.left_s(report)) is not None:
            parts.append(f"{units.duration(left)} left")
        running = [task for task in report.tasks if task.state is TaskState.RUNNING and task.best_latency_us]
        if running:
            heaviest = max(running, key=lambda task: (task.best_latency_us or 0.0) * task.weight)
            parts.append(f"best so far {units.latency(heaviest.best_latency_us)} for {heaviest.description}")
        return ", ".join(parts)

    def reconnecting(self, reason: str, waited_s: float) -> None:
        """One line when it begins."""
        if not self._lost:
            self._lost = True
            self._line(f"{reason}; trying again")


def _task_line(task: TaskReport) -> str:
    line = f"{task.state.value}: {task.description}"
    if task.state is TaskState.FAILED:
        return f"{line}: {task.error or 'no reason given'}"
    if task.best_latency_us is not None:
        line += f": {units.latency(task.baseline_latency_us)} -> {units.latency(task.best_latency_us)}"
        if task.speedup is not None:
            line += f" ({units.speedup(task.speedup)})"
    counts = [units.count(task.trials, "trial")] if task.trials else []
    if task.reused:
        counts.append(f"{task.reused} reused")
    if task.failed:
        counts.append(f"{task.failed} failed")
    return f"{line}, {', '.join(counts)}" if counts else line
