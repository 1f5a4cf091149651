"""What each instance of a sharded job does, and did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from tuner_client.job import InstanceReport
from tuner_client.render import units

_STYLES = {
    "healthy": "green",
    "suspect": "yellow",
    "slow": "yellow",
    "draining": "yellow",
    "connecting": "dim",
    "dead": "bold red",
    "left out": "bold yellow",
}
_MOST_TASKS = 3


def instance_table(instances: Sequence[InstanceReport], most: int = 1_000) -> Table:
    """One line per instance, for the live view; where there is no room for all, the last line counts the rest."""
    shown = instances if len(instances) <= most else instances[: most - 1]
    table = Table.grid(padding=(0, 2), expand=True)
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for one in shown:
        table.add_row(
            Text(one.address),
            Text(one.state, style=_STYLES.get(one.state, "")),
            units.count(one.trials, "trial"),
            units.rate(one.trials_per_s) if one.tasks else "",
            Text(_doing(one), style="dim"),
        )
    if rest := instances[len(shown) :]:
        states = ", ".join(f"{number} {state}" for state, number in Counter(one.state for one in rest).items())
        trials = units.count(sum(one.trials for one in rest), "trial")
        table.add_row(Text(f"and {len(rest)} more", style="dim"), "", trials, "", Text(states, style="dim"))
    return table


def instance_line(instances: Sequence[InstanceReport]) -> str:
    """All instances on one line, for logs."""
    parts = []
    for one in instances:
        if one.state == "left out":
            continue
        what = one.state if one.state != "healthy" else units.count(len(one.tasks), "task")
        rate = f" {units.rate(one.trials_per_s)}" if one.trials_per_s and one.tasks else ""
        parts.append(f"{one.address}: {what}, {one.trials:,} done{rate}")
    return "; ".join(parts)


def instance_summary(instances: Sequence[InstanceReport]) -> list[str]:
    """Who measured what, for the end of a job."""
    lines = []
    for one in instances:
        name = f"{one.address} ({one.name})" if one.name else one.address
        if one.state == "left out":
            lines.append(f"{name}: left out: {one.reason}")
            continue
        line = f"{name}: {units.count(one.trials, 'trial')}"
        if one.late:
            line += f", {units.count(one.late, 'late result')} kept but not counted"
        if one.state not in ("healthy", "suspect"):
            line += f"; {one.state}{f': {one.reason}' if one.reason else ''}"
        lines.append(line)
    return lines


def _doing(one: InstanceReport) -> str:
    if one.reason:  # the address is on the line already
        return one.reason.removeprefix(f"cannot reach a tuner-server at {one.address}: ")
    names = ", ".join(one.tasks[:_MOST_TASKS])
    if len(one.tasks) > _MOST_TASKS:
        names += f" and {len(one.tasks) - _MOST_TASKS} more"
    return ": ".join(part for part in (one.doing, names) if part)
