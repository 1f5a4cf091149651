"""Where the time of a traced run went: which stage others waited for, as figures and as a picture.

    tuner-server --trace run.trace.json ...      (or TUNER_TRACE=run.trace.json)
    python benchmarks/timeline.py run.trace.json [--out DIR] [--json]

Everything is taken between the end of the first trial and the end of the last one: before, processes start; after,
winners are checked. A worker is busy while it works on a request; for search and build, time for which they are stopped
so that a measurement has the cores does not count, neither as busy nor as idle. The bottleneck is the stage with the
largest busy share, and a pipeline is a good one when that is at least 90 %. A stage has as many places as ever worked
at once: a process that replaces another, or works in its turn, adds none. The picture is an SVG beside the results.
"""

from __future__ import annotations

import argparse
import html
import itertools
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "results"
COLOURS = {
    "search": "#4e79a7",
    "build": "#f28e2b",
    "measure": "#59a14f",
    "promotion": "#b07aa1",
    "commit": "#9c755f",
    "pause": "#bab0ac",
}
PAUSED_STAGES = ("search", "build")
TRIAL = ("measure", "measure")
"""Stage and name of the slices that are trials."""

Interval = tuple[float, float]


@dataclass
class Worker:
    """Slices of one worker, in microseconds since the start of the trace.

    Attributes:
        stage: Its stage.
        name: Its name.
        slices: Begin, end, what, and about it.
    """

    stage: str
    name: str
    slices: list[tuple[float, float, str, dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class StageFigures:
    """One stage between the first and the last trial.

    Attributes:
        busy: Busy share of its places on average, 0 to 1.
        workers: Busy share of each worker.
        slices: Requests that ended in that time.
        cpu_s: Processor seconds of the whole run.
    """

    busy: float
    workers: dict[str, float]
    slices: int
    cpu_s: float


@dataclass(frozen=True)
class Figures:
    """What :func:`analyse` finds.

    Attributes:
        seconds: Between the first and the last trial.
        trials: Measured in the whole run.
        stages: By name, in the order of the pipeline.
        bottleneck: The stage with the largest busy share.
        waiting: Mean length of each queue.
        partitions_busy: Share of the time for which a partition measures, promotion included; mean of all partitions.
        server_cpu_s: Processor seconds of the server process; None when it was killed.
        cpu_s_per_trial: Processor seconds of each stage for a trial, over the whole run.
        overhead_ms: Median over the trials of what a worker's time for one holds beside runs of the candidate: reading
            the request, loading, arguments, calls of the timer, the answer. None where the trace does not say.
    """

    seconds: float
    trials: int
    stages: dict[str, StageFigures]
    bottleneck: str
    waiting: dict[str, float]
    partitions_busy: float
    server_cpu_s: float | None
    cpu_s_per_trial: dict[str, float]
    overhead_ms: float | None


def read(path: Path) -> tuple[list[Worker], dict[str, list[Interval]], float | None]:
    """Workers, the lengths of queues over time, and the server's processor seconds, from a trace.

    Args:
        path: What ``tuner-server --trace`` wrote.
    """
    text = path.read_text()
    events = json.loads(text if text.endswith("]") else text + "]")  # a killed server may leave it out
    stages = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    workers: dict[int, Worker] = {}
    queues: dict[str, list[Interval]] = defaultdict(list)
    server_cpu_s = None
    for event in events:
        if event["ph"] == "X":
            worker = workers.setdefault(event["tid"], Worker(stages[event["pid"]], names[event["tid"]]))
            worker.slices.append((event["ts"], event["ts"] + event["dur"], event["name"], event["args"]))
        elif event["ph"] == "C":
            queues[event["name"]].append((event["ts"], event["args"]["waiting"]))
        elif event["name"] == "server_cpu":
            server_cpu_s = event["args"]["cpu_s"]
    return list(workers.values()), queues, server_cpu_s


def analyse(workers: list[Worker], queues: dict[str, list[Interval]], server_cpu_s: float | None) -> Figures:
    """Busy shares and processor time.

    Args:
        workers, queues, server_cpu_s: As :func:`read` gives them.

    Raises:
        ValueError: There are not two trials in the trace.
    """
    ends = sorted(
        end for worker in workers for _, end, what, _ in worker.slices if (worker.stage, what) == TRIAL
    )  # fmt: skip
    if len(ends) < 2:
        raise ValueError("the trace holds fewer than two trials")
    window = (ends[0], ends[-1])
    pauses = [(begin, end) for worker in workers if worker.stage == "pause" for begin, end, _, _ in worker.slices]
    paused = overlap(pauses, [window])
    stages: dict[str, StageFigures] = {}
    for stage in COLOURS:
        of_stage = [worker for worker in workers if worker.stage == stage]
        if stage == TRIAL[0]:  # and not who only says what target the device is
            of_stage = [worker for worker in of_stage if any(what == TRIAL[1] for _, _, what, _ in worker.slices)]
        if not of_stage:
            continue
        shares = {}
        for worker in of_stage:
            intervals = [(begin, end) for begin, end, _, _ in worker.slices]
            busy, length = overlap(intervals, [window]), window[1] - window[0]
            if stage in PAUSED_STAGES:
                clipped = [(max(b, window[0]), min(e, window[1])) for b, e in intervals if b < window[1]]
                busy -= overlap([i for i in clipped if i[0] < i[1]], pauses)
                length -= paused
            shares[worker.name] = busy / length if length > 0 else 0.0
        stages[stage] = StageFigures(
            busy=sum(shares.values()) / most_at_once([interval[:2] for one in of_stage for interval in one.slices]),
            workers=dict(sorted(shares.items())),
            slices=sum(window[0] <= end <= window[1] for worker in of_stage for _, end, _, _ in worker.slices),
            cpu_s=sum(about.get("cpu_s", 0.0) for worker in of_stage for *_, about in worker.slices),
        )
    cpu = {stage: figures.cpu_s / len(ends) for stage, figures in stages.items() if figures.cpu_s}
    if server_cpu_s is not None:
        cpu["server"] = server_cpu_s / len(ends)
    working = {stage: figures.busy for stage, figures in stages.items() if stage != "pause"}
    overheads = [
        (end - begin) / 1e3 - 1e3 * about["device_s"]
        for worker in workers
        for begin, end, what, about in worker.slices
        if (worker.stage, what) == TRIAL and "device_s" in about
    ]
    measuring = [stages[stage].workers for stage in ("measure", "promotion") if stage in stages]
    return Figures(
        seconds=(window[1] - window[0]) / 1e6,
        trials=len(ends),
        stages=stages,
        bottleneck=max(working, key=working.__getitem__),
        waiting={name: _mean(points, window) for name, points in queues.items()},
        partitions_busy=sum(map(sum, map(dict.values, measuring))) / len(set().union(*measuring)),
        server_cpu_s=server_cpu_s,
        cpu_s_per_trial=cpu,
        overhead_ms=statistics.median(overheads) if overheads else None,
    )


def most_at_once(intervals: list[Interval]) -> int:
    """The largest number of intervals that have a moment in common; where one ends and another begins, none."""
    changes = sorted(change for begin, end in intervals for change in ((begin, 1), (end, -1)))
    return max(itertools.accumulate(change for _, change in changes))


def overlap(first: list[Interval], second: list[Interval]) -> float:
    """Length of what two lists of intervals have in common; neither overlaps itself."""
    total, others = 0.0, sorted(second)
    start = 0
    for begin, end in sorted(first):
        while start < len(others) and others[start][1] <= begin:
            start += 1
        for other_begin, other_end in others[start:]:
            if other_begin >= end:
                break
            total += min(end, other_end) - max(begin, other_begin)
    return total


def _mean(points: list[Interval], window: Interval) -> float:
    """Mean over time of a step function."""
    total = 0.0
    for (begin, value), (end, _) in zip(points, [*points[1:], (window[1], 0.0)], strict=True):
        total += value * max(0.0, min(end, window[1]) - max(begin, window[0]))
    return total / (window[1] - window[0])


def show(figures: Figures) -> str:
    """The figures as text."""
    lines = [f"{figures.trials} trials, {figures.seconds:.1f} s from the first to the last"]
    for stage, row in figures.stages.items():
        if stage == "pause":
            lines.append(f"{'paused':<12}{100 * row.busy:6.1f} % of the time, search and build stand still")
            continue
        workers = "  ".join(f"{name} {100 * share:.0f}" for name, share in row.workers.items())
        lines.append(f"{stage:<12}{100 * row.busy:6.1f} % busy  {row.slices:6} requests   {workers}")
    lines += [f"{name:<28}{length:6.1f} on average" for name, length in figures.waiting.items()]
    each = "  ".join(f"{stage} {seconds:.3f}" for stage, seconds in figures.cpu_s_per_trial.items())
    lines.append(f"core-seconds per trial: {each}, together {sum(figures.cpu_s_per_trial.values()):.3f}")
    lines.append(f"partitions busy {100 * figures.partitions_busy:.1f} % of the time")
    if figures.overhead_ms is not None:
        lines.append(f"a worker's time for a trial beside runs of the candidate: {figures.overhead_ms:.2f} ms (median)")
    busy = figures.stages[figures.bottleneck].busy
    lines.append(f"bottleneck: {figures.bottleneck}, busy {100 * busy:.1f} % of the time")
    return "\n".join(lines)


def picture(workers: list[Worker], title: str, width: int = 1600) -> str:
    """All slices of all workers as an SVG: one row for each worker, time from left to right."""
    rows = sorted(workers, key=lambda worker: (list(COLOURS).index(worker.stage), len(worker.name), worker.name))
    last = max(end for worker in rows for _, end, _, _ in worker.slices)
    first = min(begin for worker in rows for begin, _, _, _ in worker.slices)
    left, row_height, top = 150, 16, 40
    scale = (width - left - 10) / (last - first)
    height = top + row_height * len(rows) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{html.escape(title)}</text>',
    ]
    for number, worker in enumerate(rows):
        y = top + number * row_height
        out.append(f'<text x="10" y="{y + 11}">{html.escape(worker.name)} ({worker.stage})</text>')
        for begin, end in _merged(worker, 0.5 / scale):
            x = left + (begin - first) * scale
            out.append(
                f'<rect x="{x:.1f}" y="{y + 1}" width="{max(0.3, (end - begin) * scale):.1f}" '
                f'height="{row_height - 3}" fill="{COLOURS[worker.stage]}"/>'
            )
    base = top + row_height * len(rows) + 14
    step = max(1, round((last - first) / 1e6 / 10))
    for second in range(0, int((last - first) / 1e6) + 1, step):
        out.append(f'<text x="{left + second * 1e6 * scale:.0f}" y="{base}">{second} s</text>')
    return "\n".join([*out, "</svg>\n"])


def _merged(worker: Worker, gap: float) -> list[Interval]:
    """Slices as intervals, those joined between which nobody could see a gap."""
    merged: list[Interval] = []
    for begin, end in sorted((begin, end) for begin, end, _, _ in worker.slices):
        if merged and begin - merged[-1][1] < gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def draw(workers: list[Worker], figures: Figures, out: Path, name: str) -> Path:
    """Write the picture.

    Args:
        workers: Whose slices.
        figures: Of the same run.
        out: The folder; made when missing.
        name: Of the run.

    Returns:
        The file, ``timeline-NAME.svg``.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"timeline-{name}.svg"
    title = f"{name}: {figures.trials} trials, bottleneck {figures.bottleneck}"
    path.write_text(picture([worker for worker in workers if worker.slices], title))
    return path


def document(figures: Figures) -> dict[str, Any]:
    """The figures as JSON, for result files."""
    return {
        "seconds": figures.seconds,
        "trials": figures.trials,
        "bottleneck": figures.bottleneck,
        "busy": {stage: row.busy for stage, row in figures.stages.items()},
        "busy_by_worker": {stage: row.workers for stage, row in figures.stages.items()},
        "partitions_busy": figures.partitions_busy,
        "waiting": figures.waiting,
        "cpu_s_per_trial": figures.cpu_s_per_trial,
        "overhead_ms": figures.overhead_ms,
    }


def main() -> None:
    """Read the command line, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder of the picture")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON document")
    arguments = parser.parse_args()
    workers, queues, server_cpu_s = read(arguments.trace)
    try:
        figures = analyse(workers, queues, server_cpu_s)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(json.dumps(document(figures), indent=1) if arguments.json else show(figures))
    path = draw(workers, figures, arguments.out, arguments.trace.name.removesuffix(".json").removesuffix(".trace"))
    if not arguments.json:
        print(f"drawn into {path}")


if __name__ == "__main__":
    main()
