"""Looking records up, following and looking after them with the command, against a real server process."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract.record_values import make_record, make_workload
from tests.integration.client_process import client, start_client
from tests.integration.test_server_lifecycle import server
from tuner_client.api import Client
from tuner_core.errors import PermissionDeniedError
from tuner_core.model import FailureKind, Record
from tuner_core.proto.tuner.v1 import tuning_pb2, tuning_pb2_grpc
from tuner_core.store.interface import RecordFilter
from tuner_core.store.remote import RemoteStore
from tuner_core.transport.channel import call, open_channel
from tuner_core.transport.options import ConnectionOptions

CONV = make_workload("conv", op="conv2d", description="conv2d 1x64x56x56 -> 64, 3x3, fp32, NCHW + relu")
DENSE = make_workload("dense", op="dense", description="dense 1x512 -> 1000, fp32", dtype="float16")
GPU: dict[str, Any] = {"device_model": "NVIDIA H200", "target_json": '{"arch":"sm_90","kind":"cuda"}'}
RECORDS = {
    "conv at 25": make_record(CONV, 1, sm_percent=25, sm_count=32, model="resnet50", **GPU),
    "conv at 25, verified": make_record(CONV, 1, sm_percent=25, sm_count=32, model="resnet50", verified=True, **GPU),
    "conv at 50": make_record(CONV, 2, sm_percent=50, sm_count=66, model="resnet50", tags={"release": "1"}, **GPU),
    "conv on the CPU": make_record(CONV, 3, team="speech", sm_percent=100, sm_count=2),
    "dense at 100": make_record(DENSE, 4, sm_percent=100, sm_count=132, model="alexnet", **GPU),
    "dense, failed": make_record(DENSE, 5, failure=FailureKind.RUN_TIMEOUT, created_at=time.time() - 60, **GPU),
}
NAMES = {record.trial_id: name for name, record in RECORDS.items()}


@dataclass
class Running:
    """A server that holds RECORDS, and a folder to run the command in."""

    address: str
    folder: Path

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return client(*arguments, "--server", self.address, data_dir=self.folder, **env)

    def json(self, *arguments: str) -> Any:
        run = self.run(*arguments, "--json")
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    def names(self, *arguments: str) -> set[str]:
        return {NAMES[record["trial_id"]] for record in self.json("query", *arguments)["records"]}

    def commit(self, *records: Record) -> None:
        with open_channel(ConnectionOptions(self.address)) as channel:
            RemoteStore(channel).commit(records, [CONV, DENSE])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("records")
    with server(folder / "server", "--lazy") as process:
        found = Running(process.address, folder)
        found.commit(*RECORDS.values())
        yield found


GPU_CONVS = {"conv at 25", "conv at 25, verified", "conv at 50"}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--op", "conv2d", "--device", "NVIDIA H200"), GPU_CONVS),
        (("--shape", "1x64x56x56", "--device", "NVIDIA H200"), GPU_CONVS),
        (("--shape", "1x?x?x56", "--min-sm-percent", "26", "--max-sm-percent", "99"), {"conv at 50"}),
        (("--text", "1000", "--dtype", "float16"), {"dense at 100"}),
        (("--sm-percent", "25", "--verified"), {"conv at 25, verified"}),
        (("--nearest-share", "30", "--op", "conv2d"), {"conv at 25", "conv at 25, verified", "conv on the CPU"}),
        (("--nearest-share", "30", "--team", "vision", "--tag", "release=1"), {"conv at 50"}),
        (("--team", "speech"), {"conv on the CPU"}),
        (("--model", "alexnet"), {"dense at 100"}),
        (("--since", "1h", "--failed"), {"dense, failed"}),
        (("--top", "1", "--sm-percent", "25"), {"conv at 25, verified"}),
    ],
)
def test_every_filter_of_the_command_chooses(running: Running, arguments: tuple[str, ...], names: set[str]) -> None:
    assert running.names(*arguments) == names


def test_the_table_says_which_share_stands_for_the_one_that_was_asked_for(running: Running) -> None:
    shown = running.run("query", "--nearest-share", "30", "--op", "conv2d").stdout
    assert "nearest to 30 % for each operator and device: 25 % (2 records), 100 % (1 record)" in shown
    assert "conv2d 1x64x56x56 -> 64" in shown and "101 µs" in shown and "25 %" in shown
    assert "all of exactly 25 %" in running.run("query", "--nearest-share", "25", "--sm-count", "32").stdout
    assert running.json("query", "--nearest-share", "30", "--op", "dense")["nearest_sm_percent"] == 30


def test_csv_has_one_row_for_each_record_and_json_equals_the_json_flag(running: Running) -> None:
    arguments = ("query", "--op", "conv2d", "--sort", "newest", "--limit", "2")
    as_json = running.run(*arguments, "--format", "json")
    document = json.loads(as_json.stdout)
    assert document == running.json(*arguments)
    assert document["next"]
    run = running.run(*arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(run.stdout)))
    assert [row["trial_id"] for row in rows] == [record["trial_id"] for record in document["records"]]
    assert [float(row["median_us"]) for row in rows] == [record["median_us"] for record in document["records"]]
    assert json.loads(rows[1]["tags"]) == document["records"][1]["tags"]
    assert rows[0]["verified"] == "false"
    assert rows[0]["created_at"].endswith("+00:00")
    assert set(rows[0]) == set(document["records"][0]) - {"trace"}
    assert f"--cursor {document['next']}" in run.stderr
    second = running.json(*arguments, "--cursor", document["next"])
    shown = {record["trial_id"] for record in document["records"] + second["records"]}
    assert len(shown) == 4 and second["next"] is None


def test_contradicting_options_are_usage_errors(running: Running) -> None:
    for arguments in (
        ("query", "--json", "--format", "csv"),
        ("query", "--shape", "56*56"),
        ("query", "--sm-percent", "25", "--nearest-share", "30"),
        ("query", "--nearest-share", "0"),
        ("logs", "--follow", "--nearest-share", "30"),
        ("tag", "0" * 64),
        ("tag", "0" * 64, "novalue"),
    ):
        run = running.run(*arguments)
        assert run.returncode == 2, arguments
        assert run.stderr.count("error: ") == 1
    run = running.run("query", "--shape", "x", "--format", "json")
    assert json.loads(run.stdout)["exit_code"] == 2


def test_python_iterates_over_all_records_that_match(running: Running) -> None:
    with Client(running.address, data_dir=running.folder) as connected:
        found = connected.query(RecordFilter(op="conv2d"), order="newest")
        assert iter(found) is found
        newest = [NAMES[record.trial_id] for record in found]
        assert newest[:2] == ["conv on the CPU", "conv at 50"] and set(newest[2:]) == GPU_CONVS - {"conv at 50"}
        assert len(list(connected.query(limit=3))) == 3
        assert next(connected.query(with_traces=False)).trace == ""
        page = connected.page(limit=1)
        assert len(page.records) == 1 and page.next_cursor


def lines_of(process: subprocess.Popen[str], count: int) -> list[dict[str, Any]]:
    assert process.stdout is not None
    return [json.loads(process.stdout.readline()) for _ in range(count)]


def test_a_followed_log_shows_records_as_they_come_and_ends_well_on_ctrl_c(running: Running) -> None:
    process = start_client(
        *("logs", "--follow", "--lines", "2", "--op", "dense", "--json", "--server", running.address),
        data_dir=running.folder,
    )
    first = lines_of(process, 2)
    assert [NAMES[document["trial_id"]] for document in first] == ["dense at 100", "dense, failed"]
    new = [make_record(DENSE, number, created_at=1.0) for number in range(100, 103)]
    for record in new:
        running.commit(make_record(CONV, int(record.median_us or 0)), record)
    assert [document["trial_id"] for document in lines_of(process, 3)] == [record.trial_id for record in new]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("", "", 0)


def test_a_followed_log_goes_on_after_its_server_was_away_without_a_gap(tmp_path: Path) -> None:
    port_of: Callable[[str], str] = lambda address: address.rpartition(":")[2]  # noqa: E731
    with server(tmp_path / "server", "--lazy") as first:
        address = first.address
        running = Running(address, tmp_path)
        running.commit(make_record(CONV, 1))
        process = start_client("logs", "-f", "--json", "--server", address, data_dir=tmp_path)
        assert lines_of(process, 1)[0]["trial_id"] == make_record(CONV, 1).trial_id
        time.sleep(0.5)  # it asks for what comes next
    with server(tmp_path / "server", "--lazy", "--listen", f"127.0.0.1:{port_of(address)}"):
        running.commit(make_record(CONV, 2), make_record(CONV, 3))
        found = {document["trial_id"] for document in lines_of(process, 2)}
        assert found == {make_record(CONV, number).trial_id for number in (2, 3)}
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err


def test_tags_are_set_found_and_removed(running: Running) -> None:
    trial_id = RECORDS["conv at 50"].trial_id
    assert trial_id in running.run("query", "--ids", "--op", "conv2d").stdout
    shown = running.run("tag", trial_id, "reviewed=yes", "release=2")
    assert "branch" not in shown.stdout and "release=2 reviewed=yes" in shown.stdout, shown.stderr
    assert running.names("--tag", "reviewed=yes") == {"conv at 50"}
    document = running.json("tag", trial_id, "release=1", "--remove", "reviewed")
    assert document["tags"] == {"release": "1"}
    unknown = running.run("tag", "0" * 64, "a=b")
    assert unknown.returncode == 1 and "there is no record" in unknown.stderr


def test_stats_show_coverage_of_each_model_and_growth(running: Running) -> None:
    document = running.json("stats")
    resnet = [row for row in document["coverage"] if row["model"] == "resnet50"]
    assert resnet == [
        {
            "model": "resnet50",
            "device_model": "NVIDIA H200",
            "sm_percent": 25,
            "sm_count": 32,
            "operators": 1,
            "verified": 1,
        }
    ]
    assert len(document["growth"]) == 30 and document["growth"][-1]["records"] >= 1
    shown = running.run("stats").stdout
    assert "resnet50" in shown and "NVIDIA H200" in shown and "25 %" in shown
    assert document["growth"][-1]["day"] in shown


def test_a_rehearsed_retention_says_what_would_go_and_the_real_one_deletes_it(tmp_path: Path) -> None:
    old = [make_record(CONV, number, created_at=1000.0) for number in range(4)]
    with server(tmp_path / "server", "--lazy") as process:
        running = Running(process.address, tmp_path)
        running.commit(*old, make_record(CONV, 9, created_at=1000.0, team="speech"))
        rehearsed = running.run("prune", "--older-than", "30d", "--team", "vision", "--dry-run")
        assert "would delete 3 records of team vision from before" in rehearsed.stdout, rehearsed.stderr
        assert running.json("prune", "--older-than", "30d", "--dry-run") == {
            "deleted": 0,
            "would_delete": 4,
            "dry_run": True,
        }
        assert running.json("stats")["records"] == 5
        done = running.run("prune", "--older-than", "30d", TUNER_TEAM="vision")
        assert "deleted 3 records of team vision" in done.stdout
        assert running.json("stats")["by_team"] == {"vision": 1, "speech": 1}


TOKENS = {"vision": "vision-token-0123456789", "speech": "speech-token-0123456789"}


def test_teams_read_everything_and_change_only_their_own(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("".join(f"{token} {team}\n" for team, token in TOKENS.items()))
    with server(tmp_path / "server", "--lazy", "--token-file", str(tokens)) as process:
        address = process.address
        running = Running(address, tmp_path)
        record = make_record(CONV, 1, created_at=1000.0)
        with open_channel(ConnectionOptions(address, token=TOKENS["vision"])) as channel:
            RemoteStore(channel).commit([record, make_record(CONV, 2, created_at=1000.0)], [CONV])
            spec = tuning_pb2.JobSpec(model="tiny", sm_percent=100, trials=1, team="speech")
            job = call(
                tuning_pb2_grpc.TuningServiceStub(channel).SubmitJob,
                tuning_pb2.SubmitJobRequest(spec=spec),
                address=address,
                timeout_s=60,
            ).job
        speech = {"TUNER_TOKEN": TOKENS["speech"]}
        shown = running.run("jobs", **speech)
        assert "vision" in shown.stdout, shown.stderr
        assert len(json.loads(running.run("query", "--json", **speech).stdout)["records"]) == 2
        for arguments in (
            ("tag", record.trial_id, "a=b"),
            ("prune", "--older-than", "1d", "--team", "vision"),
            ("cancel", job),
            ("resume", job),
        ):
            run = running.run(*arguments, **speech)
            assert run.returncode == 1, arguments
            assert "vision" in run.stderr and run.stderr.count("\n") == 1
        assert json.loads(running.run("prune", "--older-than", "1d", "--json", **speech).stdout)["deleted"] == 0
        vision = {"TUNER_TOKEN": TOKENS["vision"]}
        assert running.run("tag", record.trial_id, "a=b", **vision).returncode == 0
        assert running.run("cancel", job, **vision).returncode == 0
        with (
            Client(ConnectionOptions(address, token=TOKENS["speech"]), data_dir=tmp_path) as connected,
            pytest.raises(PermissionDeniedError),
        ):
            connected.tag(record.trial_id, {"a": None})
