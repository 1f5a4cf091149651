"""Tables of a job's operators, and the summary below them."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuner_client.job import DETACHED, JobReport, TaskReport
from tuner_client.render import units
from tuner_client.render.instances import instance_summary
from tuner_core.errors import ExitCode
from tuner_core.model import TaskState

_STYLES = {
    TaskState.PENDING: "dim",
    TaskState.RUNNING: "cyan",
    TaskState.TUNED: "green",
    TaskState.REUSED: "green",
    TaskState.FALLBACK: "dim",
    TaskState.FAILED: "bold red",
    TaskState.SKIPPED: "dim",
}
_TICKED = (TaskState.TUNED, TaskState.REUSED)
_JOB_STYLES = {"done": "bold green", "partly": "bold yellow", "failed": "bold red", "cancelled": "bold yellow"}


def state_text(task: TaskReport) -> Text:
    """A task's state in its colour; a verified result is ticked."""
    word = "waiting" if task.state is TaskState.PENDING else task.state.value
    if task.verified and task.state in _TICKED:
        word += " ✓"
    return Text(word, style=_STYLES[task.state])


def speedup_text(value: float | None) -> Text:
    """A speed-up, green where it is one."""
    style = "green" if value is not None and value > 1.02 else "yellow" if value is not None and value < 0.98 else ""
    return Text(units.speedup(value), style=style)


def task_table(tasks: list[TaskReport], *, best: str = "after", fill: bool = False) -> Table:
    """One row per operator.

    Args:
        tasks: The operators, in this order.
        best: Heading of the column of the best latency.
        fill: Use the full width and one line for each operator; else long descriptions wrap.
    """
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=fill, show_edge=False, header_style="bold"
    )
    table.add_column("operator", no_wrap=fill, overflow="ellipsis" if fill else "fold", ratio=1 if fill else None)
    for heading in ("calls", "before", best, "speed-up", "trials", "failed"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7 if heading in ("before", best) else 5)
    table.add_column("state", no_wrap=True, min_width=8)
    for task in tasks:
        table.add_row(
            Text(task.description, style="dim" if task.state in (TaskState.PENDING, TaskState.SKIPPED) else ""),
            str(task.weight),
            units.latency(task.baseline_latency_us),
            units.latency(task.best_latency_us),
            speedup_text(task.speedup),
            _trials(task),
            Text(str(task.failed), style="red" if task.failed else "dim"),
            state_text(task),
        )
    return table


def _trials(task: TaskReport) -> str:
    trials = f"{task.trials}+{task.reused}" if task.reused else str(task.trials)
    return f"{trials}, stopped" if task.stopped_early else trials


def final_view(report: JobReport) -> RenderableType:
    """The table that ends a job, the whole model in its last row, and the summary."""
    shown = [task for task in report.tasks if _worth_a_row(task)]
    shown.sort(key=lambda task: -(task.baseline_latency_us or task.best_latency_us or 0.0) * task.weight)
    folded = len(report.tasks) - len(shown)
    parts: list[RenderableType] = []
    if shown or report.baseline_latency_us:
        table = task_table(shown)
        if folded:
            table.add_row(Text(f"{units.count(folded, 'other operator')}, fallback schedule", style="dim"))
        if report.baseline_latency_us or report.tuned_latency_us:
            table.add_section()
            table.add_row(
                Text("whole model", style="bold"),
                "",
                Text(units.latency(report.baseline_latency_us), style="bold"),
                Text(units.latency(report.tuned_latency_us), style="bold"),
                speedup_text(report.speedup),
                str(report.measured),
                Text(str(report.failed), style="red" if report.failed else "dim"),
                _match_text(report),
            )
        parts += [table, Text()]
        if any(task.verified and task.state in _TICKED for task in shown):
            parts.append(Text("✓ measured again alone on the device, output checked", style="dim"))
    parts += [Text(line) for line in failure_lines(report)]
    parts += [Text(line) for line in instance_summary(report.instances)]
    parts.append(summary(report))
    return Group(*parts)


def _worth_a_row(task: TaskReport) -> bool:
    return bool(
        task.trials
        or task.reused
        or task.baseline_latency_us
        or task.best_latency_us
        or task.state in (TaskState.FAILED, TaskState.TUNED, TaskState.REUSED)
    )


def _match_text(report: JobReport) -> Text:
    if report.outputs_match is None:
        return Text("")
    return Text("same output", style="green") if report.outputs_match else Text("OUTPUTS DIFFER", style="bold red")


def failure_lines(report: JobReport) -> list[str]:
    """Failed operators by name and reason, and failed trials by kind."""
    lines = [
        f"failed: {task.description}: {task.error or 'no reason given'}"
        for task in report.tasks
        if task.state is TaskState.FAILED
    ]
    kinds: dict[str, int] = {}
    for task in report.tasks:
        for kind, number in task.failures.items():
            kinds[kind] = kinds.get(kind, 0) + number
    if kinds:
        by_kind = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items(), key=lambda item: -item[1]))
        lines.append(f"failed trials: {by_kind}")
    return lines


def summary(report: JobReport) -> Text:
    """The last lines: how it ended, operators by state, trials, time, the built file."""
    text = Text()
    text.append(f"{report.model or report.job}: ", style="bold")
    text.append(report.status, style=_JOB_STYLES.get(report.status, "bold"))
    if report.error and report.exit_code is not ExitCode.FAILED:
        text.append(f"\nnote: {report.error}")
    states = [f"{report.count(state)} {state.value}" for state in TaskState if state.final and report.count(state)]
    operators = units.count(len(report.tasks), "operator")
    if report.status == DETACHED:
        text.append(f"\n{operators}")
    elif not report.tasks:
        text.append("\nnothing to tune in this model")
    else:
        text.append(f"\n{operators}: {', '.join(states) or 'none finished'}")
    if report.status != DETACHED:
        trials = f"{units.count(report.measured, 'trial')} measured"
        if report.failed:
            trials += f" ({report.failed} failed)"
        if report.reused:
            trials += f", {report.reused} reused from the store"
        if stopped := sum(task.stopped_early for task in report.tasks):
            trials += f"; {units.count(stopped, 'operator')} stopped early"
            if (unspent := report.budget - report.measured - report.reused) > 0:
                trials += f", {unspent} of the budget not needed"
        text.append(f"\n{trials}, in {units.duration(report.elapsed_s)}")
        if report.measured and report.trials_per_s:
            text.append(f" ({units.rate(report.trials_per_s)})")
    text.append(f"\n{where(report)}", style="dim")
    if report.output:
        coverage = report.coverage or {}
        text.append(f"\nbuilt {report.output}", style="bold")
        text.append(f" ({coverage.get('tuned', 0)} of {coverage.get('operators', 0)} operators tuned)")
    return text


def where(report: JobReport) -> str:
    """Job, device and share on one line."""
    cores = "cores" if report.target.get("kind") == "llvm" else "SMs"
    share = f"{report.sm_percent} %" if report.sm_percent else ""
    if share and report.sm_count:
        share += f" ({report.sm_count} {cores[:-1] if report.sm_count == 1 else cores})"
    device = report.device_model + (f" x {len(report.devices)}" if len(report.devices) > 1 else "")
    return " · ".join(part for part in (report.job, device, share) if part)
