"""Memory of an idle server with two workers, of a client during a job, and its growth over a replayed job.

``python benchmarks/memory.py [--trials 2000] [--name memory]``. All figures are proportional set sizes (PSS: shared
pages are divided among those who share them, so that a sum over processes counts them once), in MiB. The replayed job
is one small job, submitted again with ``refresh`` (nothing is reused) until the trials are done; the server's size is
taken whenever it is idle in between, and its growth is that of a line through all of these.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import results
from service import running_server
from tasks import MODEL, extract, light_model

from tuner_client import Client
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.wire import workload_to_message

SERVER_ARGUMENTS = ("--sm-percent", "50", "--workers", "2")
SETTLE_S = 3.0
WARM_TRIALS = 200
CLIENT_MODEL = "squeezenet"
LIMITS_MIB = {"idle server, two workers": 1536, "client beyond the model": 700}
GROWTH_LIMIT_PERCENT = 10


def pss_mib(pid: int) -> float:
    """PSS of one process; 0 when it has ended.

    Source: ``/proc/PID/smaps_rollup``, see proc_pid_smaps(5).
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def tree_mib(pid: int) -> tuple[float, int]:
    """PSS of a process with all its descendants, and how many they are."""
    processes = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return sum(pss_mib(process) for process in processes), len(processes)


def client_peak_mib(arguments: Sequence[str]) -> tuple[float, int]:
    """Run ``tuner-client`` and return its largest PSS while it ran, and its exit code."""
    command = [str(Path(sys.executable).with_name("tuner-client")), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, pss_mib(process.pid))
        time.sleep(0.1)
    return peak, process.returncode


def replay(client: Client, spec: tuning_pb2.JobSpec, server_pid: int, trials: int) -> list[tuple[int, float]]:
    """Submit the job again and again.

    Args:
        client: To the server.
        spec: The job.
        server_pid: Whose tree is looked at.
        trials: When to stop.

    Returns:
        (trials so far, MiB when idle after them), one for each job.
    """
    sizes: list[tuple[int, float]] = []
    measured = 0
    while measured < trials:
        spec.request_id = uuid.uuid4().hex
        submitted = client.connection.call(
            client.connection.tuning.SubmitJob, tuning_pb2.SubmitJobRequest(spec=spec), 120.0
        )
        report = client.watch(submitted.job)
        if not report.measured:
            sys.exit(f"error: job {report.job} ended as {report.status} without a trial: {report.error}")
        measured += report.measured
        time.sleep(SETTLE_S)
        sizes.append((measured, tree_mib(server_pid)[0]))
        print(f"  {measured:5d} trials  {sizes[-1][1]:7.0f} MiB", flush=True)
    return sizes


def grown(sizes: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Where a process tree's size begins and ends, in MiB, by the least-squares line through all idle moments.

    Two single moments say less: they differ by a tenth either way, by what each process has just freed.

    Args:
        sizes: Trials so far, and MiB.
    """
    if len(sizes) < 2:
        return sizes[0][1], sizes[0][1]
    slope, start = statistics.linear_regression([trials for trials, _ in sizes], [size for _, size in sizes])
    return start + slope * sizes[0][0], start + slope * sizes[-1][0]


def main() -> None:
    """Run the three measurements, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="of the replayed job (default: 2000)")
    parser.add_argument("--name", default="memory", help="of the result file (default: memory)")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the result file")
    arguments = parser.parse_args()
    machine = results.machine()
    model = light_model(CLIENT_MODEL)

    with (
        tempfile.TemporaryDirectory() as scratch,
        running_server(SERVER_ARGUMENTS, Path(scratch) / "data") as server,
        Client(server.address) as client,
    ):
        host = client.host()
        time.sleep(SETTLE_S)
        idle, processes = tree_mib(server.pid)
        print(f"idle server, two workers: {idle:.0f} MiB in {processes} processes", flush=True)

        peak, code = client_peak_mib(["tune", str(model), "--server", server.address, "--trials", "96", "--json"])
        model_mib = weights_mib(model)
        print(f"client during a {CLIENT_MODEL} job: {peak:.0f} MiB (weights {model_mib:.0f} MiB), exit code {code}")

        chosen = extract(host.target_json)
        spec = tuning_pb2.JobSpec(
            model="replayed",
            tasks=[
                tuning_pb2.TaskSpec(
                    name=task.name, workload=workload_to_message(task.workload), weight=task.weight, tunable=True
                )
                for task in chosen
            ],
            target_json=host.target_json,
            sm_percent=50,
            trials=32 * len(chosen),
            refresh=True,
            seed=1,
        )
        spec.evaluator.number, spec.evaluator.repeat, spec.evaluator.min_repeat_ms = 1, 3, 1
        print(f"replayed job ({MODEL}, {len(chosen)} operators):", flush=True)
        sizes = replay(client, spec, server.pid, arguments.trials)

    from_mib, to_mib = grown([size for size in sizes if size[0] >= WARM_TRIALS] or sizes)
    growth_percent = 100 * (to_mib / from_mib - 1)
    rows = [
        {"what": "idle server, two workers", "pss_mib": idle, "processes": processes},
        {"what": "client beyond the model", "pss_mib": peak - model_mib, "model_mib": model_mib, "exit_code": code},
        {"what": "growth over a replayed job", "percent": growth_percent, "from_mib": from_mib, "sizes": sizes},
    ]
    path = results.write(
        arguments.name,
        rows,
        device=results.cpu_model(),
        driver=None,
        machine_before=machine,
        directory=arguments.results,
        limits_mib=LIMITS_MIB,
        growth_limit_percent=GROWTH_LIMIT_PERCENT,
    )
    for row in rows[:2]:
        print(f"{row['what']}: {row['pss_mib']:.0f} MiB (limit {LIMITS_MIB[str(row['what'])]})")
    print(
        f"growth from {WARM_TRIALS} to {sizes[-1][0]} trials: {growth_percent:.1f} % (limit {GROWTH_LIMIT_PERCENT} %)"
    )
    print(f"written to {os.path.relpath(path)}")


def weights_mib(model: Path) -> float:
    """Size of a model's weights in memory: of its constants, those made by ConstantOfShape included."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(model).graph
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    total = sum(array.nbytes for array in shapes.values())
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in shapes:
            total += 4 * int(np.prod(shapes[node.input[0]]))
    return total / 2**20


if __name__ == "__main__":
    main()
