"""A whole model through ``tuner-server`` and ``tuner-client tune``, as a user runs them, with a trace of the server."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results
import timeline
from devices import use_only
from service import running_server

from tuner_client import Client
from tuner_client.render.measuring import measuring_document
from tuner_core.proto.tuner.v1 import host_pb2

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from light_model import light_models, write_variant

SMALL_MODEL = "squeezenet"
"""For a rehearsal on a CPU."""


def common_options(parser: argparse.ArgumentParser, trials: int, name: str) -> None:
    """Options of every benchmark that tunes a whole model.

    Args:
        parser: Gets them.
        trials: Default budget of a job.
        name: Default name of the result file.
    """
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda, the first GPU that this process may see (default), cuda:INDEX or cuda:UUID; cpu: a rehearsal",
    )
    parser.add_argument(
        "--model", help=f"a light model of the package onnx (default: resnet50; on a CPU {SMALL_MODEL})"
    )
    parser.add_argument("--trials", type=int, default=trials, help="of each job (default: %(default)s)")
    parser.add_argument("--sm-percent", type=int, default=25, help="default: 25; on a CPU all cores")
    parser.add_argument("--workers", type=int, default=4, help="default: 4; on a CPU one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=400, help="of each job (default: %(default)s)")
    parser.add_argument("--server-arguments", default="", help="more for tuner-server, as one word")
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    parser.add_argument("--name", default=name, help="of the result files (default: %(default)s)")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with one device for all that is run."""
    options = parser.parse_args()
    options.device = use_only(options.device)
    return options


def server_arguments(options: argparse.Namespace) -> list[str]:
    """Those for the device and its division."""
    arguments = ["--device", options.device, *options.server_arguments.split()]
    if not options.device.startswith("cpu"):
        arguments += ["--sm-percent", str(options.sm_percent), "--workers", str(options.workers)]
    return arguments


@contextlib.contextmanager
def model_file(options: argparse.Namespace, dtype: str) -> Iterator[Path]:
    """The model to tune.

    Args:
        options: Of the command line: ``model``, ``device``.
        dtype: ``float32`` (the model as it is) or ``float16`` (a variant with random weights).
    """
    name = options.model or (SMALL_MODEL if options.device.startswith("cpu") else "resnet50")
    path = light_models()[name]
    if dtype == "float32":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        variant = Path(folder) / f"{name}_{dtype}.onnx"
        write_variant(path, dtype, variant)
        yield variant


def tune(
    addresses: Sequence[str], model: Path, arguments: Sequence[str], *, trials: int, seed: int, limit_s: float
) -> dict[str, Any]:
    """The client's JSON document of one job.

    Args:
        addresses: Of the servers.
        model: What to tune.
        arguments: More for ``tuner-client tune``.
        trials: Budget.
        seed: Of the search.
        limit_s: Deadline.

    Raises:
        RuntimeError: The command failed, with its last line, or took too long.
    """
    command = [
        *(sys.executable, "-m", "tuner_client", "tune", str(model), "--json", "--refresh"),
        *(word for address in addresses for word in ("--server", address)),
        *("--trials", str(trials), "--seed", str(seed), *arguments),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {limit_s:g} s") from None
    if done.returncode not in (0, 3):
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def traced_job(
    options: argparse.Namespace, model: Path, name: str, arguments: Sequence[str] = ()
) -> tuple[dict[str, Any], host_pb2.Device]:
    """One job on a fresh server with an empty store.

    Args:
        options: Of the command line, see :func:`common_options`.
        model: What to tune.
        name: Of the timeline's picture.
        arguments: More for ``tuner-client tune``.

    Returns:
        The row of a result file, and the device.

    Raises:
        RuntimeError: The server did not start, or the job failed.
    """
    of_server = server_arguments(options)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / f"{name}.trace.json"
        with running_server([*of_server, "--trace", str(trace)]) as server:
            document = tune(
                [server.address], model, arguments, trials=options.trials, seed=options.seed, limit_s=options.limit_s
            )
            with Client(server.address) as client:
                host = client.host()
        figures = timeline_of(trace, options.out, name)
    row = {
        **{key: document[key] for key in ("model", "status", "sm_percent", "layout", "trials", "model_latency_us")},
        **{key: document[key] for key in ("outputs_match", "elapsed_s", "trials_per_s")},
        "sm_count_seen": document["sm_count"],
        "workers": len(host.workers),
        "server_arguments": of_server,
        "operators": [
            {key: task[key] for key in OPERATOR} for task in sorted(document["tasks"], key=_saved_us, reverse=True)
        ],
        "measuring": measuring_document(host.devices[0].measuring),
        "timeline": figures,
    }
    return row, host.devices[0]


OPERATOR = (
    "description", "weight", "state", "trials", "failed", "baseline_latency_us", "best_latency_us", "verified", "error",
)  # fmt: skip


def _saved_us(task: dict[str, Any]) -> float:
    baseline, best = task["baseline_latency_us"], task["best_latency_us"]
    return float(task["weight"] * (baseline - best)) if baseline and best else 0.0


def timeline_of(trace: Path, out: Path, name: str) -> dict[str, Any]:
    """Busy shares of a traced run; its picture goes into a folder as ``timeline-NAME.svg``.

    Args:
        trace: What the server wrote.
        out: The folder.
        name: Of the run.
    """
    try:
        workers, queues, server_cpu_s = timeline.read(trace)
        figures = timeline.analyse(workers, queues, server_cpu_s)
        path = timeline.draw(workers, figures, out, name)
    except (OSError, ValueError) as error:
        return {"error": str(error)}
    return {**timeline.document(figures), "picture": path.name}


def milliseconds(latency_us: float | None) -> str:
    """For a table."""
    return f"{latency_us / 1000:.3f} ms" if latency_us is not None else "not measured"


def ratio(before: float | None, after: float | None) -> str:
    """How many times faster, for a table."""
    return f"{before / after:.2f}x" if before and after else "-"


def markdown(title: str, row: dict[str, Any], device: str, operators: int = 12) -> list[str]:
    """Lines about one job.

    Args:
        title: Heading.
        row: From :func:`traced_job`.
        device: Its name.
        operators: How many of them, those that gained most.
    """
    latency, figures, pauses = row["model_latency_us"], row["timeline"], row["measuring"]["pauses"]
    states = {
        state: sum(one["state"] == state for one in row["operators"])
        for state in sorted({o["state"] for o in row["operators"]})
    }
    lines = [
        f"## {title}",
        "",
        "| | |",
        "|---|---|",
        f"| device | {device}, {row['workers']} workers at {row['sm_percent']} % ({row['sm_count_seen']} SMs) |",
        f"| whole model, untuned to tuned | {milliseconds(latency['baseline'])} to {milliseconds(latency['tuned'])} "
        f"({ratio(latency['baseline'], latency['tuned'])}), outputs agree: {row['outputs_match']} |",
        f"| layout | {row['layout']} |",
        f"| operators | {', '.join(f'{count} {state}' for state, count in states.items())} |",
        f"| trials | {row['trials']['measured']} measured, {row['trials']['failed']} failed |",
        f"| time, from start to finish | {row['elapsed_s']:.1f} s ({row['trials_per_s']:.2f} trials/s) |",
        f"| pauses for exclusive measurement | {pauses['count']}, {pauses['total_s']:.1f} s in all, "
        f"the longest {pauses['longest_s']:.2f} s |",
    ]
    if "busy" in figures:
        busy = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in figures["busy"].items())
        each = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in figures["cpu_s_per_trial"].items())
        lines += [
            f"| first to last trial | {figures['seconds']:.1f} s |",
            f"| busy between them | {busy}; bottleneck: {figures['bottleneck']} |",
            f"| core-seconds per trial | {each} |",
        ]
        if figures.get("overhead_ms") is not None:
            beside = f"{figures['overhead_ms']:.2f} ms (median)"
            lines.append(f"| a worker's time for a trial beside runs of the candidate | {beside} |")
    if "picture" in figures:
        lines += ["", f"![timeline]({figures['picture']})"]
    lines += ["", "| operator | calls | untuned, us | tuned, us | | trials |", "|---|---|---|---|---|---|"]
    for one in row["operators"][:operators]:
        before, after = one["baseline_latency_us"], one["best_latency_us"]
        shown = " | ".join(f"{value:.1f}" if value is not None else "-" for value in (before, after))
        facts = f"{one['description']} | {one['weight']} | {shown} | {ratio(before, after)} | {one['trials']}"
        lines.append(f"| {facts} |")
    return [*lines, ""]
