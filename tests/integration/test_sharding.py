"""One job over several server processes, of which some die, hang, drain, restart or fall behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.client_process import ROOT, environment, wait_for
from tests.integration.replay_fleet import FACTS, Fleet, Script, fleet
from tests.replay_server import replay_spec
from tuner_client import Client
from tuner_client.job import InstanceReport, JobReport
from tuner_client.sharding.journal import sharded_jobs
from tuner_core.errors import ExitCode
from tuner_core.model import TaskState

TRIALS = 240


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as found:
        yield found


def instance(report: JobReport, address: str) -> InstanceReport:
    return next(one for one in report.instances if one.address == address)


def check_whole(report: JobReport, servers: Fleet, trials: int = TRIALS) -> None:
    """The job is done, its trials counted once, and every record of it is in the client's store."""
    assert report.status == "done", report.error
    assert report.measured == trials
    assert all(task.state in (TaskState.TUNED, TaskState.FALLBACK) and task.verified for task in report.tasks)
    gathered = servers.gathered(report.job)
    for task in report.tasks:
        assert task.best_trial_id in gathered
        assert sum(task.trials_by_instance.values()) == task.trials
    for server in servers.servers:
        assert server.records(report.job) <= gathered


def test_instances_share_a_job_and_the_client_has_every_record_of_it(servers: Fleet) -> None:
    servers.add(), servers.add()
    script = Script()
    report = servers.tuner(script).drive(replay_spec(6, TRIALS), FACTS)
    check_whole(report, servers)
    document = report.document()
    assert {entry["address"] for entry in document["instances"]} == {one.address for one in servers.servers}
    assert all(entry["trials"] > 0 for entry in document["instances"])
    assert sum(entry["trials"] for entry in document["instances"]) == TRIALS
    assert {task["instance"] for task in document["tasks"]} <= {one.address for one in servers.servers}
    assert report.baseline_latency_us == 200.0 and report.tuned_latency_us == 100.0
    assert any(one.tasks for shown in script.reports for one in shown.instances)  # the live view has what each does


def test_more_instances_than_operators_all_take_part(servers: Fleet) -> None:
    for _ in range(3):
        servers.add()
    report = servers.tuner(Script()).drive(replay_spec(1, 120), FACTS)  # too few for it to be stopped early
    check_whole(report, servers, 120)
    (task,) = report.tasks
    assert set(task.trials_by_instance) == {one.address for one in servers.servers}


def test_a_killed_instance_loses_its_leases_to_the_others(servers: Fleet) -> None:
    victim, _, _ = servers.add(), servers.add(), servers.add()
    script = Script((40, lambda: victim.signal(signal.SIGKILL)))
    report = servers.tuner(script).drive(replay_spec(6, TRIALS), FACTS)
    assert report.status == "done" and report.measured == TRIALS
    assert instance(report, victim.address).state == "dead"
    assert script.said(f"{victim.address} is gone")
    counted = sum(one.trials for one in report.instances)
    assert counted == TRIALS


def test_a_hung_instance_loses_its_leases_and_what_it_measured_late_is_kept_but_not_counted(servers: Fleet) -> None:
    victim, _ = servers.add(), servers.add(trial_s=0.1)

    def freeze() -> None:
        victim.signal(signal.SIGSTOP)
        threading.Timer(3.0, lambda: victim.signal(signal.SIGCONT)).start()

    script = Script((40, freeze))
    report = servers.tuner(script).drive(replay_spec(6, TRIALS), FACTS)
    check_whole(report, servers)
    assert script.said("has been silent")
    assert script.said(f"{victim.address} is back")
    assert len(servers.gathered(report.job)) >= TRIALS + instance(report, victim.address).late


def test_an_instance_that_restarts_at_its_address_takes_part_again(servers: Fleet) -> None:
    victim, _ = servers.add(), servers.add(trial_s=0.2)
    script = Script((40, victim.restart))
    report = servers.tuner(script).drive(replay_spec(6, TRIALS), FACTS)
    check_whole(report, servers)
    assert script.said(f"{victim.address} was restarted")
    back = instance(report, victim.address)
    assert back.state == "healthy"
    assert back.trials > 40


def test_an_instance_that_comes_back_as_another_device_is_left_out_and_what_it_measured_counts(servers: Fleet) -> None:
    changed, _ = servers.add(), servers.add(trial_s=0.1)

    def change() -> None:
        changed.settings["device"] = "Other CPU"
        changed.restart()

    script = Script((40, change))
    report = servers.tuner(script).drive(replay_spec(4, 120), FACTS)
    check_whole(report, servers, 120)
    left = instance(report, changed.address)
    assert (left.state, left.reason) == ("left out", "has a Other CPU, the job tunes for Replayed CPU")
    assert script.said(f"{changed.address} is left out: has a Other CPU")
    by_address = report.document()["tasks"]
    assert any(changed.address in task["trials_by_instance"] for task in by_address)


def test_a_drained_instance_finishes_what_it_measures_and_its_tasks_move(servers: Fleet) -> None:
    victim, _ = servers.add(), servers.add()

    def drain() -> None:
        with Client(victim.address) as client:
            client.drain()

    script = Script((40, drain))
    report = servers.tuner(script).drive(replay_spec(6, TRIALS), FACTS)
    check_whole(report, servers)
    assert instance(report, victim.address).state == "draining"
    assert instance(report, victim.address).trials < TRIALS / 2


def test_an_instance_ten_times_slower_than_the_others_loses_its_leases(servers: Fleet) -> None:
    servers.add(), servers.add()
    slow = servers.add(factor=60.0)
    script = Script()
    report = servers.tuner(script, heartbeat_s=0.5).drive(replay_spec(9, 600), FACTS)
    check_whole(report, servers, 600)
    assert script.said(f"{slow.address} is over 10 times slower")


def test_a_job_without_instances_waits_and_goes_on_when_one_returns(servers: Fleet) -> None:
    only = servers.add()

    def kill() -> None:
        only.signal(signal.SIGKILL)
        threading.Timer(2.0, only.restart).start()

    script = Script((40, kill))
    report = servers.tuner(script).drive(replay_spec(3, 120), FACTS)
    check_whole(report, servers, 120)
    assert sum("no instance takes leases; waiting" in note for note in script.notes) == 1


def test_a_job_that_shall_not_wait_gives_up_partly_done_and_keeps_what_was_measured(servers: Fleet) -> None:
    only = servers.add()
    script = Script((40, lambda: only.signal(signal.SIGKILL)))
    report = servers.tuner(script, wait_s=0).drive(replay_spec(3, 120), FACTS)
    assert report.status == "partly"
    assert report.exit_code is ExitCode.PARTLY
    assert 40 <= report.measured <= len(servers.gathered(report.job))

    only.restart()
    resumed = servers.tuner(Script()).resume(report.job)
    check_whole(resumed, servers, 120)


DRIVE = """
import sys
from pathlib import Path
from tests.integration.replay_fleet import FACTS
from tests.replay_server import replay_spec
from tuner_client.job import JobInterrupted
from tuner_client.sharding.tuning import ShardedTuner, ShardingOptions
from tuner_core.transport.options import ConnectionOptions
servers = tuple(ConnectionOptions(address) for address in sys.argv[2:])
try:
    ShardedTuner(ShardingOptions(servers, heartbeat_s=1.0), Path(sys.argv[1])).drive(replay_spec(6, 240), FACTS)
except JobInterrupted as interruption:
    print(interruption.report.status)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_job_goes_on_after_its_client_was_ended(servers: Fleet, number: signal.Signals) -> None:
    first, second = servers.add(), servers.add()
    client = subprocess.Popen(
        [sys.executable, "-c", DRIVE, str(servers.client_folder), first.address, second.address],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: any(job.measured > 40 for job in sharded_jobs(servers.client_folder)))
        client.send_signal(number)
        said, _ = client.communicate(timeout=20)
    finally:
        client.kill()
        client.wait()
    (stopped,) = sharded_jobs(servers.client_folder)
    assert stopped.status == "stopped"
    assert said.strip() == ("stopped" if number == signal.SIGINT else "")
    before = servers.gathered(stopped.job)

    report = servers.tuner(Script()).resume(stopped.job)
    # What was in flight when the client ended was measured after all, and counts: no more than two batches a server.
    assert TRIALS <= report.measured <= TRIALS + 2 * 2 * 16
    check_whole(report, servers, report.measured)
    assert before <= servers.gathered(report.job)
    assert len(before) > 40  # those were not measured again


def test_two_clients_do_not_drive_one_job(servers: Fleet) -> None:
    from tuner_client.sharding.journal import ShardJournal
    from tuner_core.errors import ConflictError

    held = ShardJournal(servers.client_folder, "job-00000000")
    with pytest.raises(ConflictError, match="another tuner-client runs job-00000000"):
        ShardJournal(servers.client_folder, "job-00000000")
    held.close()
