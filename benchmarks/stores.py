"""Record stores at 10^4, 10^5 and 10^6 records: commits, look-ups, first pages, size, 64 clients beside a writer.

``python benchmarks/stores.py [--sizes 10000,100000,1000000] [--stores sqlite,redis] [--name stores]``. A real
redis-server (append-only file, fsync every second while loading, always while commits are measured) runs on a free port
with its data in a temporary directory. The store grows from size to size, so the last row of each is the whole curve's
end. Records are those of jobs: 20 operators of a model, 64 trials each, on several devices and shares. Look-ups and
pages are timed in one process. The 64 clients are four processes that call a real ``tuner-server`` on the store, each
client some four times a second, and then as fast as they can, when the cores are the limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import redis
import results
from readers import readers_beside_a_writer

from tuner_core.model import (
    EvaluatorSettings,
    FailureKind,
    PartitionKind,
    Record,
    RecordKey,
    Workload,
    canonical_json,
    sha256_hex,
    target_digest,
    trial_id,
)
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import open_store

SIZES = (10_000, 100_000, 1_000_000)
GOALS_MS = {"look-up p99": 5.0, "first page p99": 50.0}
_OPERATORS = 400
_TRIALS = 64
_TASKS = 20
_BATCH = 2_560
_LOOKUPS = 1_000
_QUERIES = 100
_COMMITS = 200
_DEVICES = (("NVIDIA H200", "sm_90", 132), ("NVIDIA A100-SXM4-80GB", "sm_80", 108), ("AMD EPYC 9B14", "znver4", 16))
_OPS = ("conv2d", "depthwise_conv2d", "dense", "max_pool2d", "softmax")


def workload(number: int) -> Workload:
    """Operator ``number`` of all; its body is as large as a fused convolution's."""
    chance = random.Random(number)
    op = _OPS[number % len(_OPS)]
    body = canonical_json({"operator": number, "text": [chance.randrange(1000) for _ in range(1500)]})
    size = 7 * (1 + number % 32)
    return Workload(
        digest=sha256_hex(body),
        body=body,
        structural_hash=str(chance.getrandbits(64)),
        op=op,
        description=f"{op} 1x{size}x{size}x64 -> {32 + number}, 3x3, fp32, NHWC",
        args_info=(("TENSOR", "float16" if number % 7 == 0 else "float32", (1, size, size, 64)),),
    )


def job_records(job: int, workloads: list[Workload]) -> list[Record]:
    """What one job leaves: 64 trials of each of 20 operators, a tenth failed, the winner verified."""
    chance = random.Random(job)
    device, arch, units = _DEVICES[job % 3]
    percent = (25, 50, 100)[job // 3 % 3]
    target = canonical_json({"kind": "cuda" if arch.startswith("sm") else "llvm", "arch": arch})
    found = []
    for task in range(_TASKS):
        chosen = workloads[(job * 7 + task) % len(workloads)]
        base = Record(
            trial_id="",
            workload_digest=chosen.digest,
            trace="",
            target_json=target,
            target_digest=target_digest(target),
            device_model=device,
            device_arch=arch,
            sm_percent=percent,
            sm_count=max(1, units * percent // 100),
            partition_kind=PartitionKind.MPS,
            neighbours=3,
            evaluator=EvaluatorSettings(),
            cuda_version="13.0",
            driver_version="580.65",
            job=f"job-{job}",
            team=("vision", "speech", "ranking")[job % 5 % 3],
            model=("resnet50", "bert", "shufflenet", "vit")[job % 4],
            instance=f"gpu-{job % 8}",
            tags={"branch": "main" if job % 10 else "dev"},
            op=chosen.op,
            description=chosen.description,
        )
        scale = 10.0 * (1 + (job * 7 + task) % 100)
        trials = []
        for number in range(_TRIALS):
            decisions = [[at, [chance.randrange(1, 64) for _ in range(4)]] for at in range(12)]
            steps = [["SamplePerfectTile", [f"l{at}"], [4, 64], [f"v{at}"]] for at in range(12)]
            trace = json.dumps([steps, decisions])
            median = scale * chance.lognormvariate(0.5, 0.5)
            failure = FailureKind.BUILD_ERROR if number % 10 == 9 else None
            one = dataclasses.replace(
                base,
                trace=trace,
                created_at=1_790_000_000.0 + job * 60 + number,
                failure=failure,
                failure_message="ptxas: too much shared data" if failure else "",
                latencies_us=() if failure else (median * 0.99, median, median * 1.02),
                median_us=None if failure else median,
                ci_low_us=None if failure else median * 0.99,
                ci_high_us=None if failure else median * 1.02,
            )
            trials.append(dataclasses.replace(one, trial_id=trial_id(one.key, trace, one.job, False)))
        best = min((t for t in trials if t.valid), key=lambda t: t.median_us or 0.0)
        verified = dataclasses.replace(best, verified=True, neighbours=0)
        trials[-1] = dataclasses.replace(verified, trial_id=trial_id(best.key, best.trace, best.job, True))
        found += trials
    return found


class Sqlite:
    """A store file in a directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "records.sqlite"
        self.url = f"sqlite://{self.path}"

    def bytes_used(self) -> int:
        """Size on the disk, write-ahead log included."""
        return sum(file.stat().st_size for file in self.path.parent.glob(self.path.name + "*"))

    def durable(self, *, always: bool) -> None:
        """Always is."""

    def stop(self) -> None:
        """Nothing runs."""


class Redis:
    """A redis-server of its own."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._client = redis.Redis(port=port)
        self.url = f"redis://127.0.0.1:{port}?timeout_s=60"
        while True:
            try:
                self._client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.05)

    def bytes_used(self) -> int:
        """Memory of the data set."""
        return int(self._client.info("memory")["used_memory"])

    def durable(self, *, always: bool) -> None:
        """Sync every commit, or every second."""
        self._client.config_set("appendfsync", "always" if always else "everysec")

    def stop(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1e3 * ordered[len(ordered) // 2], 3),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 3),
    }


def timed(calls: Iterator[Callable[[], Any]]) -> dict[str, float]:
    """Percentiles of calls one after the other."""
    found = []
    for call in calls:
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return percentiles(found)


def filters(job: int) -> dict[str, tuple[RecordFilter, dict[str, Any]]]:
    """Queries whose first page is measured, by name."""
    return {
        "all": (RecordFilter(), {}),
        "newest": (RecordFilter(), {"order": "newest"}),
        "operator": (RecordFilter(op="softmax"), {}),
        "text": (RecordFilter(text="1x112x112x64"), {}),
        "dtype": (RecordFilter(dtype="float16"), {}),
        "model and device": (RecordFilter(model="bert", device_model="NVIDIA H200"), {}),
        "team, verified": (RecordFilter(team="speech", verified_only=True), {}),
        "share range": (RecordFilter(min_sm_percent=20, max_sm_percent=50), {}),
        "since": (RecordFilter(since=1_790_000_000.0 + 60 * job * 0.99), {}),
        "tag": (RecordFilter(tags={"branch": "dev"}), {}),
        "job, newest": (RecordFilter(job=f"job-{job // 2}"), {"order": "newest"}),
        "best of each key": (RecordFilter(op="dense"), {"top_per_key": 1}),
        "shape": (RecordFilter(shape="1x?x?x64", op="dense"), {}),
        "nearest share": (RecordFilter(nearest_sm_percent=30), {}),
    }


def some_keys(workloads: list[Workload], jobs: int) -> tuple[list[RecordKey], list[str]]:
    """Look-up keys and trial ids of some 40 of the jobs."""
    keys: dict[RecordKey, None] = {}
    trials: list[str] = []
    for job in range(0, jobs, max(1, jobs // 40)):
        for record in job_records(job, workloads):
            keys[record.key] = None
            trials.append(record.trial_id)
    return list(keys), trials


def measure(store: RecordStore, url: str, workloads: list[Workload], jobs: int, commits_from: int) -> dict[str, Any]:
    """Everything of one size but loading."""
    chance = random.Random(1)
    keys, trials = some_keys(workloads, jobs)
    row: dict[str, Any] = {}
    began = time.perf_counter()
    store.query(RecordFilter(), limit=1)  # the process' first query reads the catalogue, the next ones what changed
    row["first_query_s"] = round(time.perf_counter() - began, 3)
    row["look_up"] = timed(partial(store.top, chance.choice(keys), 8) for _ in range(_LOOKUPS))
    row["get"] = timed(partial(store.get, chance.choice(trials)) for _ in range(_LOOKUPS))
    row["first_page"] = {}
    for name, (where, options) in filters(jobs - 1).items():
        row["first_page"][name] = timed(partial(store.query, where, limit=100, **options) for _ in range(_QUERIES))
    fresh = (record for job in itertools.count(commits_from) for record in job_records(job, workloads))
    batch = list(itertools.islice(fresh, _COMMITS))
    began = time.perf_counter()
    row["commit"] = timed(partial(store.commit, [record]) for record in batch)
    row["commits_per_s"] = round(_COMMITS / (time.perf_counter() - began), 1)
    row["readers_beside_a_writer"] = {}
    for pace, found in readers_beside_a_writer(url, keys, fresh).items():
        found |= {"look_up": percentiles(found.pop("look_up_s")), "commit": percentiles(found.pop("commit_s"))}
        row["readers_beside_a_writer"][pace] = found
    return row


def run(kind: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Rows of one store at all sizes."""
    workloads = [workload(number) for number in range(_OPERATORS)]
    directory = Path(tempfile.mkdtemp(prefix="tuner-stores-"))
    place = Sqlite(directory) if kind == "sqlite" else Redis(directory)
    rows = []
    try:
        store = open_store(place.url)
        store.commit([], workloads)
        empty = place.bytes_used()
        stored = job = 0
        for extra, size in enumerate(sizes):
            place.durable(always=False)
            began, before = time.perf_counter(), stored
            generating_s = 0.0
            while stored < size:
                at = time.perf_counter()
                records = [r for number in range(job, job + 2) for r in job_records(number, workloads)][: size - stored]
                generating_s += time.perf_counter() - at
                stored += store.commit(records).stored
                job += 2
            loading_s = time.perf_counter() - began - generating_s
            place.durable(always=True)
            used = place.bytes_used() - empty
            row = {"store": kind, "records": size, "bulk_records_per_s": round((size - before) / loading_s, 1)}
            row["bytes_per_record"] = round(used / size, 1)
            row |= measure(store, place.url, workloads, job, 10_000_000 + 1_000 * extra)
            rows.append(row)
            print(table_row(row), flush=True)
        store.close()
    finally:
        place.stop()
        shutil.rmtree(directory, ignore_errors=True)
    return rows


HEADER = (
    "| store | records | bulk/s | B/record | commits/s | look-up p50 / p99 ms | worst first page p50 / p99 ms | "
    "64 clients, 4/s each: p50 / p99 ms | as fast as they can: look-ups/s, p50 / p99 ms |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def table_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    name, worst = max(row["first_page"].items(), key=lambda item: item[1]["p99_ms"])
    look_up, clients = row["look_up"], row["readers_beside_a_writer"]
    paced, saturated = clients["paced"]["look_up"], clients["saturated"]["look_up"]
    return (
        f"| {row['store']} | {row['records']:,} | {row['bulk_records_per_s']:.0f} | {row['bytes_per_record']:.0f} | "
        f"{row['commits_per_s']:.0f} | {look_up['p50_ms']:.2f} / {look_up['p99_ms']:.2f} | "
        f"{worst['p50_ms']:.1f} / {worst['p99_ms']:.1f} ({name}) | "
        f"{paced['p50_ms']:.1f} / {paced['p99_ms']:.1f} | "
        f"{clients['saturated']['look_ups_per_s']:.0f}, {saturated['p50_ms']:.1f} / {saturated['p99_ms']:.1f} |"
    )


def main() -> None:
    """Run, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="record counts, ascending")
    parser.add_argument("--stores", default="sqlite,redis")
    parser.add_argument("--name", default="stores", help="of the result file (default: stores)")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the result file")
    arguments = parser.parse_args()
    machine = results.machine()
    print(HEADER)
    rows = []
    for kind in arguments.stores.split(","):
        rows += run(kind, [int(size) for size in arguments.sizes.split(",")])
    path = results.write(
        arguments.name,
        rows,
        device=results.cpu_model(),
        driver=None,
        machine_before=machine,
        directory=arguments.results,
        goals_ms=GOALS_MS,
    )
    path.with_suffix(".md").write_text("\n".join([HEADER, *map(table_row, rows)]) + "\n")
    print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
