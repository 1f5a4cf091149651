"""How well one job spreads over several instances: efficiency, failover, and what the client costs.

    python benchmarks/sharding.py [--instances 1 2 4 16] [--trials 200] [--heartbeat-s 5] [--virtual]

Instances are server processes that replay recorded measurements over real gRPC (``tests/replay_server.py``): each
measures five trials per second whatever machine this runs on, so the figures are about sharding, not about a device.
The same jobs run in virtual time, too (``tests/replay/world.py``): what the design allows, without this machine.
Servers at the speed of a GPU (26 trials per second each, most of a trial its build) run in virtual time only, as the
servers' own state machines over invented processes (``tests/replay/servers.py``): with as many operators and trials as
ResNet-50 has on one server of its own, and on several. About seven minutes; ``--virtual``: only what needs no servers,
in seconds, printed and not written.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from tests.integration.replay_fleet import FACTS, Fleet, Script, fleet, records_of
from tests.replay.instance import CONCLUSION_TRIALS, ReplayInstance
from tests.replay.pipeline import Costs
from tests.replay.servers import spread as spread_at_gpu_speed
from tests.replay.source import replay_tasks
from tests.replay.world import World
from tests.replay_server import replay_spec
from tuner_client.job import JobReport
from tuner_client.sharding.tuning import default_store
from tuner_core.leases.state import LeaseSettings
from tuner_core.model import Origin
from tuner_core.proto.tuner.v1 import tuning_pb2

WORKERS = 4
TRIAL_S = 0.8
RATE = WORKERS / TRIAL_S
TASKS_EACH, UNTUNABLE_EACH = 4, 2
NETWORK_S = (0.001, 0.02)
RESNET50_TASKS = 25
SPEED_TRIALS, SPEED_TRIAL_S = 8_000, 0.02
GPU_TRIALS, GPU_SEEDS = 500, 12
GOALS = {4: 0.9, 16: 0.8}
GPU_GOAL = 0.9


def busy_share(tasks: int, untunable: int, trials: int, instances: int, elapsed_s: float) -> float:
    """Share of all workers' time in which they measured something that the job needed."""
    needed = trials + tasks + untunable + CONCLUSION_TRIALS * tasks
    return needed * TRIAL_S / (instances * WORKERS * elapsed_s)


def _whole(spec: tuning_pb2.JobSpec) -> tuning_pb2.JobSpec:
    """The same job with every trial measured: no operator is stopped early or left out."""
    spec.early_stopping, spec.negligible_percent = 0, 0.0
    return spec


def simulated(
    instances: int, tasks: int, untunable: int, trials: int, heartbeat_s: float, factors: Sequence[float] = (1.0,)
) -> dict[str, Any]:
    """One job in virtual time.

    Args:
        instances: How many.
        tasks, untunable: Of the job.
        trials: Its budget.
        heartbeat_s: Of the leases.
        factors: How many times slower than usual instances are, in turns.

    Returns:
        Seconds in all and from the first to the last trial, and trials per second against what all could measure.
    """
    replayed = replay_tasks(tasks, untunable=untunable)
    named = {task.name: task for task in replayed}
    members = [
        ReplayInstance(f"i{index:02}", named, TRIAL_S, WORKERS, factor=factors[index % len(factors)])
        for index in range(instances)
    ]
    world = World(replayed, members, trials, LeaseSettings(heartbeat_s=heartbeat_s), network_s=NETWORK_S)
    world.run()
    capacity = sum(RATE / factors[index % len(factors)] for index in range(instances))
    return {
        "elapsed_s": round(world.now_s, 2),
        "search_s": round(world.counted_s[-1] - world.counted_s[0], 2),
        "of_capacity": round(trials / world.now_s / capacity, 3),
    }


def at_gpu_speed(instances: int, heartbeat_s: float) -> dict[str, Any]:
    """A job of many operators on instances as fast as a GPU beside a job of one such server's own, in virtual time.

    Args:
        instances: How many.
        heartbeat_s: Of the leases.

    Returns:
        Means over several seeds: how many times faster the search and the whole job were (without the measurement of
        the model), both also for each instance, and the share of time in which the build processes were busy.
    """
    trials = GPU_TRIALS * instances
    found = [
        spread_at_gpu_speed(instances, trials, Costs(), seed=seed, heartbeat_s=heartbeat_s) for seed in range(GPU_SEEDS)
    ]
    search, job = (statistics.fmean(getattr(one, name) for one in found) for name in ("search", "job"))
    return {
        "at_gpu_speed": True,
        "instances": instances,
        "trials": trials,
        "seeds": GPU_SEEDS,
        "speedup_of_search": round(search, 3),
        "speedup": round(job, 3),
        "efficiency_of_search": round(search / instances, 3),
        "efficiency": round(job / instances, 3),
        "builds_busy": round(statistics.fmean(one.busy for one in found), 3),
    }


def spread(instances: int, tasks: int, untunable: int, trials: int, heartbeat_s: float) -> dict[str, Any]:
    """One job on so many server processes.

    Args:
        instances: How many.
        tasks, untunable: Of the job.
        trials: Its budget.
        heartbeat_s: Of the leases.
    """
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as servers:
        for _ in range(instances):
            servers.add(trial_s=TRIAL_S, workers=WORKERS)
        report, cost = _driven(servers, tasks, untunable, trials, heartbeat_s)
        records = records_of(default_store(servers.client_folder), report.job)
        times_s = sorted(
            record.created_at for record in records if record.origin is Origin.SEARCH and not record.verified
        )
        return {
            "instances": instances,
            "tasks": tasks,
            "trials": trials,
            "elapsed_s": cost["elapsed_s"],
            "search_s": round(times_s[-1] - times_s[0], 2),
            "trials_per_s": round(trials / cost["elapsed_s"], 2),
            "of_capacity": round(trials / cost["elapsed_s"] / (RATE * instances), 3),
            "workers_busy": round(busy_share(tasks, untunable, trials, instances, cost["elapsed_s"]), 3),
            "late_results": sum(one.late for one in report.instances),
            **cost,
            "simulated": simulated(instances, tasks, untunable, trials, heartbeat_s),
        }


def _driven(
    servers: Fleet, tasks: int, untunable: int, trials: int, heartbeat_s: float
) -> tuple[JobReport, dict[str, Any]]:
    """Run a job; its report, and what the client and this machine had to do for it."""
    client = psutil.Process()
    processes = [psutil.Process(server.process.pid) for server in servers.servers]
    rss = client.memory_info().rss
    servers_s = sum(sum(process.cpu_times()[:2]) for process in processes)
    before_s, began = time.process_time(), time.monotonic()
    spec = _whole(replay_spec(tasks, trials, untunable=untunable))
    report = servers.tuner(Script(), heartbeat_s=heartbeat_s).drive(spec, FACTS)
    elapsed_s, cpu_s = time.monotonic() - began, time.process_time() - before_s
    servers_s = sum(sum(process.cpu_times()[:2]) for process in processes) - servers_s
    assert report.status == "done" and report.measured == trials, report.error
    return report, {
        "elapsed_s": round(elapsed_s, 2),
        "client_cpu_s_per_1000_trials": round(cpu_s / trials * 1000, 3),
        "client_mib_per_1000_trials": round((client.memory_info().rss - rss) / 2**20 / trials * 1000, 2),
        "cores_busy_with_clients_and_servers": round((cpu_s + servers_s) / elapsed_s / (os.cpu_count() or 1), 3),
    }


def client_at_speed(heartbeat_s: float) -> dict[str, Any]:
    """What the client costs when four instances measure as fast as this machine lets them.

    Args:
        heartbeat_s: Of the leases.
    """
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as servers:
        for _ in range(4):
            servers.add(trial_s=SPEED_TRIAL_S, workers=WORKERS)
        _, cost = _driven(servers, 16, 0, SPEED_TRIALS, heartbeat_s)
        rate = SPEED_TRIALS / cost["elapsed_s"]
        return {"client_at_trials_per_s": round(rate, 1), "trials": SPEED_TRIALS, **cost}


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
        report = servers.tuner(script, heartbeat_s=heartbeat_s).drive(_whole(replay_spec(12, 600)), FACTS)
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


def _in_virtual_time(trials: int, heartbeat_s: float) -> list[dict[str, Any]]:
    """Rows that need no servers; ``trials`` for each instance."""
    rows: list[dict[str, Any]] = []
    for instances, tasks, factors in (
        (4, RESNET50_TASKS, (1.0,)),
        (16, RESNET50_TASKS, (1.0,)),
        (16, 8, (1.0,)),
        (16, RESNET50_TASKS, (1.0, 1.0, 1.0, 4.0)),
    ):
        found = simulated(instances, tasks, 8, trials * instances, heartbeat_s, factors)
        rows.append({"simulated_only": found, "instances": instances, "tasks": tasks, "factors": factors})
        slow = f", every fourth {factors[-1]:g} times slower" if len(factors) > 1 else ""
        print(
            f"simulated: {tasks} operators on {instances}{slow}: {found['of_capacity']:.2f} of what all could measure"
        )
    for count in (2, 4):
        row = at_gpu_speed(count, heartbeat_s)
        rows.append(row)
        met = "met" if row["efficiency"] >= GPU_GOAL else "NOT met"
        print(
            f"simulated: {count} at the speed of a GPU: search {row['speedup_of_search']:.2f}, "
            f"job {row['speedup']:.2f} times as fast as on one, builds busy {row['builds_busy']:.2f}   "
            f"goal {GPU_GOAL * count:.1f}: {met}"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, write ``results/sharding.json``, say whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--trials", type=int, default=200, help="per instance")
    parser.add_argument("--heartbeat-s", type=float, default=5.0)
    parser.add_argument("--virtual", action="store_true", help="only what runs in virtual time")
    parser.add_argument("--directory", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(arguments)
    heartbeat_s = options.heartbeat_s
    before = results.machine()
    rows: list[dict[str, Any]] = []
    if options.virtual:
        _in_virtual_time(options.trials, heartbeat_s)
        return

    print("as much work for each instance: 4 tuned operators, 2 others, trials")
    print(
        f"{'':10}{'seconds':>9}{'search':>8}{'busy':>7}{'efficiency':>12}{'of search':>11}{'simulated':>11}{'cores':>7}"
    )
    for count in options.instances:
        row = spread(count, TASKS_EACH * count, UNTUNABLE_EACH * count, options.trials * count, heartbeat_s)
        base = rows[0] if rows else row
        row["efficiency"] = round(base["elapsed_s"] / row["elapsed_s"], 3)
        row["efficiency_of_search"] = round(base["search_s"] / row["search_s"], 3)
        row["simulated"]["efficiency"] = round(base["simulated"]["elapsed_s"] / row["simulated"]["elapsed_s"], 3)
        rows.append(row)
        goal = GOALS.get(count)
        print(
            f"{count:3} servers{row['elapsed_s']:9.1f}{row['search_s']:8.1f}{row['workers_busy']:7.2f}"
            f"{row['efficiency']:12.2f}{row['efficiency_of_search']:11.2f}{row['simulated']['efficiency']:11.2f}"
            f"{row['cores_busy_with_clients_and_servers']:7.2f}"
            + (f"   goal {goal}: {'met' if row['efficiency'] >= goal else 'NOT met'}" if goal else ""),
            flush=True,
        )
    few = spread(16, 8, 8, options.trials * 16, heartbeat_s)
    rows.append({"fewer_tasks_than_instances": True, **few})
    print(f"8 operators on 16 servers: {few['elapsed_s']:.1f} s, {few['of_capacity']:.2f} of what all could measure")
    rows += _in_virtual_time(options.trials, heartbeat_s)
    rows.append(client_at_speed(heartbeat_s))
    print(
        f"client at {rows[-1]['client_at_trials_per_s']:.0f} trials/s: "
        f"{rows[-1]['client_cpu_s_per_1000_trials']:.2f} core-seconds and "
        f"{rows[-1]['client_mib_per_1000_trials']:.1f} MiB for each 1,000"
    )
    for number in (signal.SIGKILL, signal.SIGSTOP):
        rows.append(failover(number, heartbeat_s))
        print(
            f"{number.name}: {rows[-1]['leases_moved']} leases run elsewhere after {rows[-1]['first_s']:.2f} to "
            f"{rows[-1]['last_s']:.2f} s, {rows[-1]['last_heartbeats']:.2f} heartbeats (goal: under 2)",
            flush=True,
        )
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
