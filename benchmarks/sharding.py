"""How well one job spreads over several instances: efficiency, failover, and what the client costs.

    python benchmarks/sharding.py [--instances 1 2 4 16] [--trials 240] [--heartbeat-s 5]

Instances are server processes that replay recorded measurements over real gRPC (``tests/replay_server.py``): each
measures five trials per second whatever machine this runs on, so the figures are about sharding, not about a device.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from tests.integration.replay_fleet import FACTS, Script, fleet
from tests.replay_server import replay_spec

WORKERS = 4
TRIAL_S = 0.8
RATE = WORKERS / TRIAL_S
TASKS_PER_INSTANCE = 4


def efficiency(instances: int, trials_each: int, heartbeat_s: float) -> dict[str, Any]:
    """One job on so many instances: trials per second against what they could measure without a pause.

    Args:
        instances: How many.
        trials_each: Budget per instance.
        heartbeat_s: Of the leases.
    """
    trials = trials_each * instances
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as servers:
        for _ in range(instances):
            servers.add(trial_s=TRIAL_S, workers=WORKERS)
        script = Script()
        before_s, began = time.process_time(), time.monotonic()
        spec = replay_spec(max(8, TASKS_PER_INSTANCE * instances), trials, untunable=8)
        report = servers.tuner(script, heartbeat_s=heartbeat_s).drive(spec, FACTS)
        elapsed_s, cpu_s = time.monotonic() - began, time.process_time() - before_s
        assert report.status == "done" and report.measured == trials, report.error
        return {
            "instances": instances,
            "trials": trials,
            "elapsed_s": round(elapsed_s, 2),
            "trials_per_s": round(trials / elapsed_s, 2),
            "client_cpu_s_per_1000_trials": round(cpu_s / trials * 1000, 3),
            "client_peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "late_results": sum(one.late for one in report.instances),
        }


def failover(number: signal.Signals, heartbeat_s: float) -> dict[str, Any]:
    """How long until the leases of an instance that dies or hangs run elsewhere.

    Args:
        number: What the instance is sent: SIGKILL or SIGSTOP.
        heartbeat_s: Of the leases.
    """
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as servers:
        victim = servers.add(trial_s=TRIAL_S, workers=WORKERS)
        for _ in range(3):
            servers.add(trial_s=TRIAL_S, workers=WORKERS)
        happened: dict[str, Any] = {}

        def hit() -> None:
            (one,) = (entry for entry in script.reports[-1].instances if entry.address == victim.address)
            happened.update(at=time.time(), tasks=one.tasks)
            victim.signal(number)

        script = Script((200, hit))
        report = servers.tuner(script, heartbeat_s=heartbeat_s).drive(replay_spec(12, 600), FACTS)
        assert report.status == "done" and report.measured == 600, report.error
        granted: dict[str, float] = {}
        for server in servers.servers:
            if server is not victim:
                for at, task in server.grants():
                    if at > happened["at"] and at < granted.get(task, float("inf")):
                        granted[task] = at
        took_s = [granted[task] - happened["at"] for task in happened["tasks"] if task in granted]
        return {
            "signal": number.name,
            "heartbeat_s": heartbeat_s,
            "leases_held": len(happened["tasks"]),
            "leases_moved": len(took_s),
            "first_s": round(min(took_s), 3),
            "last_s": round(max(took_s), 3),
            "last_heartbeats": round(max(took_s) / heartbeat_s, 2),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, write ``results/sharding.json``, say whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--trials", type=int, default=240, help="per instance")
    parser.add_argument("--heartbeat-s", type=float, default=5.0)
    parser.add_argument("--directory", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(arguments)
    before = results.machine()
    rows: list[dict[str, Any]] = []
    for count in options.instances:
        row = efficiency(count, options.trials, options.heartbeat_s)
        base = rows[0] if rows else row
        row["efficiency"] = round(
            row["trials_per_s"] / row["instances"] / (base["trials_per_s"] / base["instances"]), 3
        )
        row["of_capacity"] = round(row["trials_per_s"] / (RATE * count), 3)
        rows.append(row)
        print(row, flush=True)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        rows.append(failover(number, options.heartbeat_s))
        print(rows[-1], flush=True)
    path = results.write(
        "sharding",
        rows,
        device="replayed (tests/data/replay-cpu.json.gz)",
        driver=None,
        machine_before=before,
        directory=options.directory,
        trials_per_s_of_one_instance=RATE,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
