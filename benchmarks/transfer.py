"""Seconds to import and export a stock TVM database, with the command, against a real server on SQLite.

``python benchmarks/transfer.py [--records 100000] [--name transfer]``. The database has the workloads of a real model
as stock ``JSONDatabase`` writes them, and records whose traces are MetaSchedule's own for these workloads with other
decisions: of real size and structure, each different. Times are those of whole ``tuner-client`` runs, start included.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
from service import running_server
from tasks import light_model

from tuner_client.model.load import load_model
from tuner_client.model.prepare import ExtractedTask, parse_target, prepare
from tuner_core.compiler.trace import trace_to_json
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import module_from_body
from tuner_core.store.tvm_folder.lines import RECORD_FILE, WORKLOAD_FILE

MODEL = "squeezenet"
TARGET = '{"kind":"llvm","num-cores":2}'
LIMIT_S = 60.0


def own_trace(task: ExtractedTask) -> list[Any]:
    """A trace of MetaSchedule's own space for an operator, as stock TVM stores it."""
    from tvm.s_tir import meta_schedule as ms

    context = ms.TuneContext(
        module_from_body(task.workload.body),
        target=parse_target(TARGET),
        space_generator="post-order-apply",
        search_strategy="evolutionary",
        task_name=task.name,
        rand_state=1,
        num_threads=1,
    )
    trace: list[Any] = json.loads(trace_to_json(context.generate_design_space()[0]))
    return trace


def varied(trace: list[Any], rng: random.Random) -> list[Any]:
    """The same instructions with other decisions."""

    def other(value: Any) -> Any:
        if isinstance(value, list):
            return [other(part) for part in value]
        return rng.choice((1, 2, 4, 7, 8, 16, 28, 32, 56, 64)) if isinstance(value, int) else value

    return [trace[0], [[instruction, other(decision)] for instruction, decision in trace[1]]]


def write_database(folder: Path, count: int) -> tuple[int, int]:
    """Write a stock database.

    Returns:
        Its workloads, and the bytes of its record file.
    """
    load_tvm(intrinsics=True)
    from tvm.s_tir import meta_schedule as ms

    tasks = [task for task in prepare(load_model(light_model(MODEL), {}).module, TARGET).tasks if task.tunable]
    database = ms.database.JSONDatabase(work_dir=str(folder))
    for task in tasks:
        database.commit_workload(module_from_body(task.workload.body))
    traces = [own_trace(task) for task in tasks]
    written_target = json.loads(str(parse_target(TARGET)))
    rng = random.Random(7)
    known: set[str] = set()
    with (folder / RECORD_FILE).open("w") as file:
        while len(known) < count:
            number = rng.randrange(len(tasks))
            trace = varied(traces[number], rng)
            text = json.dumps(trace[1]) + str(number)
            if text in known:
                continue
            known.add(text)
            runs_s = [rng.uniform(1e-5, 1e-2)] * 3
            args_info = [[kind, dtype, list(shape)] for kind, dtype, shape in tasks[number].workload.args_info]
            file.write(json.dumps([number, [trace, runs_s, written_target, args_info]]) + "\n")
    assert len((folder / WORKLOAD_FILE).read_text().splitlines()) == len(tasks)
    return len(tasks), (folder / RECORD_FILE).stat().st_size


def timed(step: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``tuner-client`` and return a row."""
    command = [str(Path(sys.executable).with_name("tuner-client")), *arguments, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True)
    elapsed_s = time.monotonic() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise RuntimeError(f"{step} failed: {run.stderr[-2000:]}")
    document = json.loads(run.stdout)
    row = {
        "step": step,
        "records": document["records"],
        "seconds": round(elapsed_s, 2),
        "client_cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "records_per_s": round(document["records"] / elapsed_s),
        "within_limit": elapsed_s < LIMIT_S,
    }
    print(f"{step}: {row['records']:,} records in {row['seconds']} s ({row['records_per_s']:,}/s)", flush=True)
    return row


def main() -> None:
    """Measure and write the result file; exit 1 when a step took a minute or more."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--name", default="transfer", help="of the result file")
    parser.add_argument("--directory", type=Path, default=results.DIRECTORY, help="of the result file")
    options = parser.parse_args()
    before = results.machine()
    with tempfile.TemporaryDirectory() as temporary, running_server(("--lazy",)) as server:
        folder = Path(temporary)
        (folder / "stock").mkdir()
        workloads, size = write_database(folder / "stock", options.records)
        print(f"a stock database of {options.records:,} records, {size / 1e6:.0f} MB", flush=True)
        address = ("--server", server.address)
        subprocess.run(  # the server starts its workers before the clock does
            [str(Path(sys.executable).with_name("tuner-client")), "servers", *address], check=True, capture_output=True
        )
        rows = [
            timed("import", ("import", str(folder / "stock"), *address)),
            timed("export", ("export", str(folder / "out"), *address)),
            timed("import of the export, all known", ("import", str(folder / "out"), *address)),
        ]
        exported = sum(1 for _ in (folder / "out" / RECORD_FILE).open("rb"))
        if exported != options.records:
            raise RuntimeError(f"{exported} records came out of {options.records}")
    path = results.write(
        options.name,
        rows,
        device=results.cpu_model(),
        driver=None,
        machine_before=before,
        directory=options.directory,
        workloads=workloads,
        record_file_bytes=size,
        limit_s=LIMIT_S,
    )
    print(f"written: {path}")
    sys.exit(0 if all(row["within_limit"] for row in rows) else 1)


if __name__ == "__main__":
    main()
