"""All GPU benchmarks, or those named, one after the other within a budget; none stops the others.

    python benchmarks/gpu_all.py --minutes 25 [--only resnet50-float32 partitions ...] [--out DIR] [--list]
    python benchmarks/gpu_all.py --rehearse --minutes 20                 # on a CPU, small

Each run has its own time limit and its own log, ``DIR/NAME.log``; results and pictures go to DIR, too (default:
``benchmarks/results``). A run gets what is left of the budget, if that is less than its limit; with less than a minute
left it is not begun. What needs two GPUs is left out where there is one. Exit code 1 when anything failed. SIGTERM and
Ctrl-C end the present run with its whole process group.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import results

HERE = Path(__file__).resolve().parent
GRACE_S = 30.0


@dataclass(frozen=True)
class Run:
    """One benchmark.

    Attributes:
        name: On the command line, and of its log.
        arguments: Of Python, the output folder aside.
        limit_s: Of its time.
        rehearsal: Arguments in place of those for a CPU; None: there is nothing to rehearse.
        gpus: It needs so many.
        out: Option that takes the output folder; empty: none.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    rehearsal: tuple[str, ...] | None
    gpus: int = 1
    out: str = "--out"


RUNS = (
    Run("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rP", "tests/gpu"), 500, None, out=""),
    Run("resnet50-float32", ("gpu_resnet50.py", "--name", "resnet50-h200-25"), 300,
        ("gpu_resnet50.py", "--device", "cpu", "--trials", "24")),
    Run("quiet-host", ("gpu_quiet_host.py",), 120,
        ("gpu_quiet_host.py", "--rehearse", "--rounds", "2", "--kernels", "8")),
    Run("bench", ("bench_gpu.py", "--name", "gpu-h200"), 420, None, out="--results"),
    Run("faults", ("gpu_faults.py",), 240, ("gpu_faults.py", "--stand-in", "--repeats", "1")),
    Run("partitions", ("gpu_partitions.py", "--name", "gpu-fidelity", "--budget-s", "280"), 400,
        ("gpu_partitions.py", "--rehearse", "--candidates", "6")),
    Run("resnet50-float16", ("gpu_resnet50.py", "--dtype", "float16", "--trials", "800", "--limit-s", "175", "--name",
         "resnet50-fp16-h200-25"), 200,
        ("gpu_resnet50.py", "--device", "cpu", "--dtype", "float16", "--trials", "8")),
    Run("layouts", ("gpu_layouts.py", "--name", "gpu-fp16-layouts", "--trials", "300", "--limit-s", "85"), 200,
        ("gpu_layouts.py", "--device", "cpu", "--trials", "8", "--limit-s", "200")),
    Run("build-variants", ("build_variants.py",), 240, ("build_variants.py", "--no-gpu", "--candidates", "2")),
    Run("two-devices", ("gpu_two_devices.py", "--trials", "1000"), 480, None, gpus=2),
    Run("two-instances", ("gpu_two_devices.py", "--instances", "--trials", "1000"), 480,
        ("gpu_two_devices.py", "--instances", "--devices", "cpu:0", "cpu:1", "--model", "squeezenet", "--sm-percent",
         "0", "--trials", "24"), gpus=2),
)  # fmt: skip


def gpu_count() -> int:
    """GPUs of this host."""
    from tuner_server.gpu.inventory import find_gpus

    return len(find_gpus().gpus)


def perform(run: Run, arguments: tuple[str, ...], out: Path, limit_s: float) -> tuple[str, float]:
    """One run, in a process group of its own.

    Args:
        run: The benchmark.
        arguments: Of Python.
        out: Folder of its log and results.
        limit_s: When it is ended.

    Returns:
        What came of it, and the seconds that it took.
    """
    script = [str(HERE / part) if part.endswith(".py") else part for part in arguments]
    command = [sys.executable, *script, *((run.out, str(out)) if run.out else ())]
    began = time.monotonic()
    with (out / f"{run.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=HERE.parent, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
            outcome = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after its {limit_s:.0f} s"
        finally:
            end(process)
    return outcome, time.monotonic() - began


def end(process: subprocess.Popen[bytes]) -> None:
    """Have a process group end: first in order, then at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(path: Path) -> str:
    """Of a log."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def main() -> int:
    """Run what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [run.name for run in RUNS]
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="*", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args()
    if options.list:
        for run in RUNS:
            print(f"{run.name:18} at most {run.limit_s:4.0f} s, {run.gpus} GPU: {' '.join(run.arguments)}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the present run is ended, too
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    gpus = gpu_count()
    chosen = sorted((run for run in RUNS if run.name in (options.only or names)),
                    key=lambda run: (options.only or names).index(run.name))  # fmt: skip
    outcomes: list[tuple[str, str, float, str]] = []
    for run in chosen:
        arguments = run.rehearsal if options.rehearse else run.arguments
        if arguments is None:
            outcomes.append((run.name, "nothing to rehearse", 0.0, ""))
        elif not options.rehearse and gpus < run.gpus:
            outcomes.append((run.name, f"needs {run.gpus} GPU(s), there are {gpus}", 0.0, ""))
        elif (left := until - time.monotonic()) < min(run.limit_s, 60.0):
            outcomes.append((run.name, "no time left", 0.0, ""))
        else:
            print(f"{run.name} ...", flush=True)
            outcome, seconds = perform(run, arguments, out, min(run.limit_s, left))
            outcomes.append((run.name, outcome, seconds, last_line(out / f"{run.name}.log")))
        name, outcome, seconds, last = outcomes[-1]
        print(f"{name:18} {seconds:5.0f} s  {outcome}  {last}", flush=True)
    print(f"\nresults and logs in {out}")
    return int(any(seconds and outcome != "done" for _, outcome, seconds, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
