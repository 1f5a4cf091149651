"""One GPU beside two: the same job through ``tuner-client`` on one server with one GPU, on one server with two, and on
two servers with one GPU each.

    python benchmarks/gpu_two_devices.py [--trials 600] [--devices cuda:0 cuda:1] [--sides one two two-servers]

A GPU comes with its part of the host's cores, because most of a trial's cost is its build: the server with one GPU may
use half of the cores, the one with two all of them. Every server starts with an empty store. Reported side by side:
trials per second over the whole job (as the job says) and from the first to the last trial of the search; how much of
that time each device was busy (workers that measure, sampled; and NVML's utilisation, which only says that some kernel
was resident); the model's final latency. Written after each side. Rehearsal on a CPU: ``--devices cpu:0 cpu:1 --model
shufflenet --sm-percent 0``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results
from service import running_server

from tuner_client import Client, RecordFilter
from tuner_core.errors import TunerError
from tuner_core.model import Origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from light_model import light_models

SAMPLE_S = 0.25


class BusyShare(threading.Thread):
    """Samples, until stopped, how many of each device's workers measure.

    Args:
        addresses: The servers.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self._addresses = addresses
        self._stopping = threading.Event()
        self.samples: list[tuple[float, dict[str, float], dict[str, float]]] = []

    def run(self) -> None:
        """Sample workers through the service, utilisation through NVML."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(address)) for address in self._addresses]
            utilisation = stack.enter_context(nvml_utilisation())
            while not self._stopping.wait(SAMPLE_S):
                busy: dict[str, list[bool]] = defaultdict(list)
                try:
                    for client in clients:
                        for worker in client.host().workers:
                            busy[worker.device_uuid].append(worker.state == "measuring")
                except TunerError:
                    continue
                shares = {uuid: sum(states) / len(states) for uuid, states in busy.items()}
                self.samples.append((time.time(), shares, utilisation(list(busy))))

    def stop(self) -> None:
        """End sampling."""
        self._stopping.set()
        self.join()

    def between(self, start: float, end: float) -> dict[str, dict[str, float]]:
        """By device: mean share of workers that measure, share of samples with any at work, NVML's mean utilisation."""
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for at, busy, used in self.samples:
            if start <= at <= end:
                for uuid, share in busy.items():
                    found[uuid]["workers_measuring"].append(share)
                    found[uuid]["any_measuring"].append(float(share > 0))
                for uuid, share in used.items():
                    found[uuid]["nvml_utilisation"].append(share)
        return {uuid: {name: statistics.fmean(values) for name, values in by.items()} for uuid, by in found.items()}


@contextlib.contextmanager
def nvml_utilisation() -> Iterator[Any]:
    """A function from UUIDs to GPU utilisation, 0 to 1; knows nothing where there is no NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver
        yield lambda _uuids: {}
        return

    def read(uuids: list[str]) -> dict[str, float]:
        found = {}
        for uuid in uuids:
            if uuid.startswith("GPU-"):
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                found[uuid] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return found

    try:
        yield read
    finally:
        pynvml.nvmlShutdown()


def tune(addresses: Sequence[str], model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The client's document of one job.

    Raises:
        RuntimeError: The command failed, with its last line.
    """
    command = [
        sys.executable,
        "-m",
        "tuner_client",
        "tune",
        str(model),
        "--json",
        "--refresh",
        "--name",
        options.job_name,
    ]
    command += [word for address in addresses for word in ("--server", address)]
    command += ["--trials", str(options.trials), "--seed", "1"]
    if options.sm_percent:
        command += ["--sm-percent", str(options.sm_percent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.side_limit_s)
    if done.returncode not in (0, 3):
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def measure_side(
    side: str, servers: Sequence[tuple[Sequence[str], Sequence[int]]], model: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], Any]:
    """One row.

    Args:
        side: Its name.
        servers: Devices and cores of each server.
        model: What to tune.
        options: Of the command line.

    Returns:
        The row, and the first device that was used.
    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                running_server(
                    [*options.server_arguments, *(word for device in devices for word in ("--device", device))],
                    cores=cores,
                )
            )
            for devices, cores in servers
        ]
        addresses = [server.address for server in running]
        sampler = BusyShare(addresses)
        sampler.start()
        try:
            document = tune(addresses, model, options)
        finally:
            sampler.stop()
        records, hosts = [], []
        for address in addresses:
            client = stack.enter_context(Client(address))
            hosts.append(client.host())
            records += list(client.query(RecordFilter(model=options.job_name, include_failed=True)))
    unique = {record.trial_id: record for record in records}.values()
    times = sorted(record.created_at for record in unique if record.origin is Origin.SEARCH and not record.verified)
    workers = [worker for host in hosts for worker in host.workers]
    row = {
        "side": side,
        "servers": len(servers),
        "devices": [device.uuid for host in hosts for device in host.devices],
        "cores": sum(len(cores) for _, cores in servers),
        "workers": len(workers),
        "sm_percent": document["sm_percent"],
        "sm_count_seen": document["sm_count"],
        "trials": len(times),
        "trials_per_s": document["trials_per_s"],
        "trials_per_s_first_to_last": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0,
        "elapsed_s": document["elapsed_s"],
        "busy": sampler.between(times[0], times[-1]) if times else {},
        "status": document["status"],
        "model_latency_us": document["model_latency_us"],
        "weighted_best_us": sum(
            task["weight"] * (task["best_latency_us"] or task["baseline_latency_us"] or 0.0)
            for task in document["tasks"]
        ),
    }
    return row, hosts[0].devices[0]


def show(row: dict[str, Any]) -> None:
    """One row for people."""
    busy = ", ".join(
        f"{uuid[:12]}: {100 * by['workers_measuring']:.0f} % of its workers measuring, "
        f"any of them {100 * by['any_measuring']:.0f} % of the time"
        + (f", NVML {100 * by['nvml_utilisation']:.0f} %" if "nvml_utilisation" in by else "")
        for uuid, by in row["busy"].items()
    )
    latency = row["model_latency_us"]
    print(
        f"{row['side']:<12} {row['workers']} workers, {row['trials']} trials: {row['trials_per_s_first_to_last']:.2f} "
        f"trials/s from first to last, {row['trials_per_s']:.2f} over the whole job of {row['elapsed_s']:.0f} s; "
        f"model {latency['baseline']} -> {latency['tuned']} us ({row['status']})\n{'':12} {busy}",
        flush=True,
    )


def halves_of(cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two halves that share no physical core, where the host says which processors are hyper-threads of one."""
    siblings: dict[str, list[int]] = defaultdict(list)
    for core in cores:
        listed = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings[listed.read_text().strip() if listed.exists() else str(core)].append(core)
    physical = list(siblings.values())
    middle = len(physical) // 2
    first, second = physical[:middle], physical[middle:]
    return sorted(core for group in first for core in group), sorted(core for group in second for core in group)


def main() -> None:
    """Run the sides, write ``gpu-two-devices.json``, end with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--model", default="resnet50", help="a light model of the onnx package (default: resnet50)")
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--sm-percent", type=int, default=25)
    parser.add_argument("--workers", type=int, default=4, help="per device (default: 4)")
    parser.add_argument("--sides", nargs="*", default=["one", "two", "two-servers"])
    parser.add_argument("--budget-s", type=float, default=330, help="no side begins later (default: 330)")
    parser.add_argument("--side-limit-s", type=float, default=240)
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    parser.add_argument("--name", default="gpu-two-devices", help="of the result file (default: %(default)s)")
    options = parser.parse_args()
    options.job_name = f"{options.model}-two-devices"
    options.server_arguments = []
    if options.sm_percent:
        options.server_arguments = ["--sm-percent", str(options.sm_percent), "--workers", str(options.workers)]
    model = light_models()[options.model]
    first, second = options.devices
    cores = sorted(os.sched_getaffinity(0))
    if first.startswith("cpu"):  # a device of its own cores: the server needs all of them
        halves = (cores, cores)
    else:
        halves = halves_of(cores)
    sides = {
        "one": [([first], halves[0])],
        "two": [([first, second], cores)],
        "two-servers": [([first], halves[0]), ([second], halves[1])],
    }
    before, began = results.machine(), time.monotonic()
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for side in options.sides:
        if time.monotonic() - began > options.budget_s:
            failures[side] = "no time left"
            continue
        try:
            row, device = measure_side(side, sides[side], model, options)
        except (RuntimeError, TunerError, subprocess.TimeoutExpired) as error:
            failures[side] = str(error)
            print(f"{side}: {error}", flush=True)
            continue
        rows.append(row)
        for key in ("trials_per_s", "trials_per_s_first_to_last"):
            row[f"ratio_{key}"] = row[key] / rows[0][key] if rows[0][key] else None
        show(row)
        written = results.write(
            options.name,
            rows,
            device=device.model,
            driver=device.driver_version or None,
            machine_before=before,
            directory=options.out,
            model=options.model,
            not_measured=failures,
        )
        print(f"written to {os.path.relpath(written)}", flush=True)
    for row in rows[1:]:
        print(
            f"{row['side']} to {rows[0]['side']}: {row['ratio_trials_per_s_first_to_last']:.2f} times the trials/s "
            f"from first to last, {row['ratio_trials_per_s']:.2f} over the whole job"
        )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
