"""The live view of a job on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tuner_client.job import JobReport, TaskReport
from tuner_client.render import units
from tuner_client.render.instances import instance_table
from tuner_client.render.pace import Pace, fraction
from tuner_client.render.tasks import task_table, where
from tuner_core.model import TaskState

_REFRESH_PER_S = 5
_LINES_AROUND = 9  # header, bar, table head, summary, the shell's prompt
_FEWEST_ROWS = 3


class LiveProgress:
    """A view that redraws itself in place: bar, rate, time left, and the operators that matter now.

    It disappears when the job has ended; the final table takes its place.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._view = _JobView()

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A spinner while it lasts."""
        if self._live is not None:
            yield
            return
        with self._console.status(f"{text} ...", spinner="dots"):
            yield

    def note(self, text: str) -> None:
        """A line above the view."""
        self._console.print(Text(text, style="dim"))

    def job(self, report: JobReport, message: str = "") -> None:
        """Draw the newest state."""
        self._view.update(report)
        if message:
            self.note(message)
        if report.ended:
            self.close()
        elif self._live is None:
            self._live = Live(
                self._view,
                console=self._console,
                refresh_per_second=_REFRESH_PER_S,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def reconnecting(self, reason: str, waited_s: float) -> None:
        """Say so in the view."""
        if self._live is None:
            self.note(f"{reason}; trying again")
        else:
            self._view.trouble = f"{reason}; trying again for {units.duration(waited_s)}"

    def close(self) -> None:
        """Take the view off the terminal."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()


class _JobView:
    """What the live view draws, from the newest report and the clock."""

    def __init__(self) -> None:
        self.trouble = ""
        self._report: JobReport | None = None
        self._pace = Pace()
        self._spinner = Spinner("dots", style="cyan")
        self._finished: dict[str, int] = {}

    def update(self, report: JobReport) -> None:
        self.trouble = ""
        self._pace.note(report)
        self._report = report
        for task in report.tasks:
            if task.state.final:
                self._finished.setdefault(task.name, len(self._finished))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report = self._report
        if report is None:
            return
        room = console.size.height - _LINES_AROUND
        instances = min(len(report.instances), max(_FEWEST_ROWS, room - _FEWEST_ROWS))
        rows = max(_FEWEST_ROWS, room - instances)
        chosen = self._choose(report, rows)
        yield Group(
            self._header(report),
            self._bar(report),
            instance_table(report.instances, instances) if report.instances else Text(),
            task_table(chosen, best="best", fill=True),
            self._rest(report, chosen),
        )

    def _header(self, report: JobReport) -> RenderableType:
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append(report.model, style="bold")
        title.append(f" · {where(report)}", style="dim")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(self._spinner, title)
        return grid

    def _bar(self, report: JobReport) -> RenderableType:
        numbers = Text(no_wrap=True)
        numbers.append(f"{report.measured + report.reused:,}/{report.budget:,} trials", style="bold")
        if report.reused:
            numbers.append(f"  {report.reused} reused")
        if report.failed:
            numbers.append(f"  {report.failed} failed", style="red")
        if pace := self._pace.trials_per_s(report):
            numbers.append(f"  {units.rate(pace)}", style="cyan")
        left = self._pace.left_s(report)
        if left is not None:
            numbers.append(f"  {units.duration(left)} left")
        elif report.elapsed_s:
            numbers.append(f"  {units.duration(report.elapsed_s)}")
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column(justify="right")
        grid.add_row(ProgressBar(total=1.0, completed=fraction(report)), numbers)
        return grid

    def _choose(self, report: JobReport, rows: int) -> list[TaskReport]:
        """The operators at work, then the ones finished last, then the ones that come next."""

        def place(task: TaskReport) -> tuple[float, ...]:
            cost = -(task.best_latency_us or task.baseline_latency_us or 0.0) * task.weight
            if task.state is TaskState.RUNNING:
                return (0, cost)
            if task.state is TaskState.PENDING:
                return (2, cost)
            quiet = task.state in (TaskState.FALLBACK, TaskState.SKIPPED) and not task.trials
            return (3 if quiet else 1, -self._finished.get(task.name, 0))

        return sorted(report.tasks, key=place)[:rows]

    def _rest(self, report: JobReport, chosen: list[TaskReport]) -> RenderableType:
        text = Text(no_wrap=True, overflow="ellipsis")
        names = {task.name for task in chosen}
        hidden = [task for task in report.tasks if task.name not in names]
        if hidden:
            counts: dict[str, int] = {}
            for task in hidden:
                word = "waiting" if task.state is TaskState.PENDING else task.state.value
                counts[word] = counts.get(word, 0) + 1
            text.append(f"and {len(hidden)} more: ", style="dim")
            text.append(", ".join(f"{number} {word}" for word, number in counts.items()), style="dim")
            text.append("\n")
        if self.trouble:
            text.append(self.trouble, style="bold yellow")
        elif report.phase:
            text.append(report.phase, style="dim")
        return text
