"""One GPU beside two: the same job through ``tuner-client`` on one server with one GPU, on one server with two, and on
two servers with one GPU each.

    python benchmarks/gpu_two_devices.py [--trials 600] [--devices cuda:0 cuda:1] [--sides one two two-servers]
    python benchmarks/gpu_two_devices.py --instances [--seeds 1 2] [--cores-per-device 16]

A GPU comes with its part of the host's cores, because most of a trial's cost is its build: the server with one GPU may
use half of the cores, the one with two all of them. Every server starts with an empty store. Reported side by side:
trials per second over the whole job (as the job says) and from the first to the last trial of the search; how much of
that time each device was busy (workers that measure, sampled; and NVML's utilisation, which only says that some kernel
was resident); the model's final latency. Written after each side. ``--instances`` is one job on one instance and on
two, each side once for every seed in turns: two should do at least 1.8 times the trials per second and end at the same
latency. ``--cores-per-device`` says how many cores a GPU comes with: cores that neither side uses keep the sides alike,
since no side then has all of the host's caches and clocks for itself. Rehearsal on a CPU: ``--devices cpu:0 cpu:1
--model shufflenet --sm-percent 0``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results
from model_job import light_models, timeline_of, tune
from service import running_server

from tuner_client import Client, RecordFilter
from tuner_client.render.measuring import measuring_document
from tuner_core.errors import TunerError
from tuner_core.model import Origin

SAMPLE_S = 0.25
SIDES = ("one", "two", "two-servers")
RATIOS = ("trials_per_s", "trials_per_s_first_to_last", "model_us", "weighted_best_us")


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


def measure_side(
    side: str,
    servers: Sequence[tuple[Sequence[str], Sequence[int]]],
    model: Path,
    seed: int,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], Any]:
    """One row.

    Args:
        side: Its name.
        servers: Devices and cores of each server.
        model: What to tune.
        seed: Of the search.
        options: Of the command line.

    Returns:
        The row, and the first device that was used.
    """
    with tempfile.TemporaryDirectory() as folder:
        traces = [Path(folder) / f"{number}.trace.json" for number in range(len(servers))]
        with contextlib.ExitStack() as stack:
            addresses = [
                stack.enter_context(
                    running_server(
                        [
                            *options.server_arguments,
                            *(word for device in devices for word in ("--device", device)),
                            *("--trace", str(trace)),
                        ],
                        cores=cores,
                    )
                ).address
                for (devices, cores), trace in zip(servers, traces, strict=True)
            ]
            sampler = BusyShare(addresses)
            sampler.start()
            try:
                document = tune(
                    addresses,
                    model,
                    [
                        "--name",
                        options.job_name,
                        *(("--sm-percent", str(options.sm_percent)) if options.sm_percent else ()),
                    ],
                    trials=options.trials,
                    seed=seed,
                    limit_s=options.side_limit_s,
                )
            finally:
                sampler.stop()
            records, hosts, measuring = [], [], []
            for address in addresses:
                client = stack.enter_context(Client(address))
                hosts.append(client.host())
                measuring.append([measuring_document(device.measuring) for device in hosts[-1].devices])
                records += list(client.query(RecordFilter(model=options.job_name, include_failed=True)))
        # after the servers have ended, which makes their traces whole
        timelines = [
            timeline_of(trace, options.out, f"{options.name}-{side}-{number}")
            for number, trace in enumerate(traces, start=1)
        ]
    unique = {record.trial_id: record for record in records}.values()
    times = sorted(record.created_at for record in unique if record.origin is Origin.SEARCH and not record.verified)
    workers = [worker for host in hosts for worker in host.workers]
    row = {
        "side": side,
        "seed": seed,
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
        "measuring": measuring,
        "model_latency_us": document["model_latency_us"],
        "weighted_best_us": sum(
            task["weight"] * (task["best_latency_us"] or task["baseline_latency_us"] or 0.0)
            for task in document["tasks"]
        ),
        "timelines": timelines,
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
    timelines = "; ".join(
        ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in one["busy"].items())
        if "busy" in one
        else one["error"]
        for one in row["timelines"]
    )
    print(
        f"{row['side']:<12} {row['workers']} workers, {row['trials']} trials: {row['trials_per_s_first_to_last']:.2f} "
        f"trials/s from first to last, {row['trials_per_s']:.2f} over the whole job of {row['elapsed_s']:.0f} s; "
        f"model {latency['baseline']} -> {latency['tuned']} us ({row['status']})\n{'':12} {busy}\n"
        f"{'':12} busy by stage: {timelines}",
        flush=True,
    )


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the seeds of every other side, relative to the first side's."""
    by_side: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_side[row["side"]].append({**row, "model_us": row["model_latency_us"]["tuned"]})
    medians = {
        side: {name: statistics.median(values) for name in RATIOS if (values := [row[name] for row in of if row[name]])}
        for side, of in by_side.items()
    }
    (_, first), *others = medians.items()
    return {side: {name: own[name] / first[name] for name in own if name in first} for side, own in others}


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
    """Run the sides, write ``gpu-two-devices.json``, end with the ratio; without any side, with an error line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    parser.add_argument("--model", default="resnet50", help="a light model of the onnx package (default: resnet50)")
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--sm-percent", type=int, default=25)
    parser.add_argument("--workers", type=int, default=4, help="per device (default: 4)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--instances", action="store_true", help="only one instance beside two")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="every side once for each (default: 1)")
    parser.add_argument("--cores-per-device", type=int, help="default: half of the host's")
    parser.add_argument("--budget-s", type=float, default=330, help="no side begins later (default: 330)")
    parser.add_argument("--side-limit-s", type=float, default=240)
    parser.add_argument("--out", type=Path, default=results.DIRECTORY)
    parser.add_argument("--name", help="of the result file (default: gpu-two-devices, or gpu-two-instances)")
    options = parser.parse_args()
    if options.instances:
        options.sides = ["one", "two-servers"]
    options.name = options.name or ("gpu-two-instances" if options.instances else "gpu-two-devices")
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
        first_half, second_half = halves_of(cores)
        each = options.cores_per_device or len(cores)
        halves = (first_half[:each], second_half[:each])
    sides = {
        "one": [([first], halves[0])],
        "two": [([first, second], sorted({*halves[0], *halves[1]}))],
        "two-servers": [([first], halves[0]), ([second], halves[1])],
    }
    before, began = results.machine(), time.monotonic()
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for seed, side in itertools.product(options.seeds, options.sides):
        if time.monotonic() - began > options.budget_s:
            failures[f"{side}, seed {seed}"] = "no time left"
            continue
        try:
            row, device = measure_side(side, sides[side], model, seed, options)
        except (RuntimeError, TunerError) as error:
            failures[f"{side}, seed {seed}"] = " ".join(str(error).split())
            print(f"{side}: {error}", flush=True)
            continue
        rows.append(row)
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
            ratios=ratios(rows),
        )
        print(f"written to {os.path.relpath(written)}", flush=True)
    if not rows:
        sys.exit(f"error: no side could be measured: {'; '.join(dict.fromkeys(failures.values()))}")
    for side, by_figure in ratios(rows).items():
        print(f"{side} to {rows[0]['side']}: " + ", ".join(f"{name} {value:.2f}" for name, value in by_figure.items()))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
