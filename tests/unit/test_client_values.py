"""What the client computes and refuses without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner_client.job import JobReport, TaskReport, job_report
from tuner_client.render import units
from tuner_client.render.pace import Pace, fraction
from tuner_client.request import TuneRequest, check_output, parse_input_shapes, parse_tags, parse_target
from tuner_core.errors import ExitCode, UsageError
from tuner_core.model import TaskState
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.transport.options import ConnectionOptions, is_loopback, read_token, split_address


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"anything")
    return path


@pytest.mark.parametrize("trials", [0, -1, 1_000_001])
def test_a_budget_out_of_range_is_refused_with_the_range(model: Path, trials: int) -> None:
    with pytest.raises(UsageError, match=rf"--trials must be between 1 and 1000000, not {trials}"):
        TuneRequest(model, trials=trials)


@pytest.mark.parametrize("share", [0, 101, -5])
def test_a_share_out_of_range_is_refused_with_the_range(model: Path, share: int) -> None:
    with pytest.raises(UsageError, match=r"--sm-percent must be between 1 and 100"):
        TuneRequest(model, sm_percent=share)


def test_the_limits_themselves_are_allowed(model: Path) -> None:
    for trials, share in ((1, 1), (1_000_000, 100)):
        request = TuneRequest(model, trials=trials, sm_percent=share)
        assert request.model_name == "model"


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model file"):
        TuneRequest(tmp_path / "missing.onnx")
    with pytest.raises(UsageError, match="is a directory"):
        TuneRequest(tmp_path)


def test_an_output_that_cannot_be_written_later_is_refused_now(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no directory"):
        check_output(tmp_path / "nowhere" / "model.so")
    with pytest.raises(UsageError, match="is a directory"):
        check_output(tmp_path)
    check_output(tmp_path / "model.so")


def test_a_name_of_several_lines_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="--name"):
        TuneRequest(model, name="two\nlines")
    with pytest.raises(UsageError, match="--team"):
        TuneRequest(model, team="x" * 201)


def test_input_shapes_are_read_by_name_even_with_an_equals_sign_in_it() -> None:
    assert parse_input_shapes(["data=1,3,224,224", "a=b=2x8"]) == {"data": (1, 3, 224, 224), "a=b": (2, 8)}


@pytest.mark.parametrize("text", ["data", "data=", "=1,2", "data=1,x", "data=0,3", "data=1,-1", "data=1.5"])
def test_a_malformed_input_shape_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"data=1,3,224,224"):
        parse_input_shapes([text])


def test_an_input_shape_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_input_shapes(["a=1", "a=2"])


def test_a_target_is_auto_or_a_json_object_with_a_kind() -> None:
    assert parse_target("auto") is None
    assert parse_target('{"num-cores": 2, "kind": "llvm"}') == '{"kind":"llvm","num-cores":2}'
    for text in ("cuda", '"llvm"', '{"arch": "sm_90"}', "{"):
        with pytest.raises(UsageError, match="--target must be auto or a JSON object"):
            parse_target(text)


def test_tags_are_key_and_value() -> None:
    assert parse_tags(["run=7", "note=a=b"]) == {"run": "7", "note": "a=b"}
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_tags(["run"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.512, "0.51 µs"),
        (8.124, "8.12 µs"),
        (99.96, "100 µs"),
        (231.4, "231 µs"),
        (999.7, "1.00 ms"),
        (1523.0, "1.52 ms"),
        (2_500_000.0, "2.50 s"),
    ],
)
def test_latencies_have_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert units.latency(value) == text


def test_durations_and_rates_read_well() -> None:
    assert [units.duration(s) for s in (0.4, 59, 187, 3723)] == ["0 s", "59 s", "3:07", "1:02:03"]
    assert [units.rate(r) for r in (6.14, 0.5, 0.0)] == ["6.1/s", "30/min", "-/s"]
    assert units.count(1, "trial") == "1 trial"
    assert units.count(1152, "trial") == "1,152 trials"


def _job(**facts: object) -> JobReport:
    return JobReport(**{"job": "j", "model": "m", "status": "running", **facts})  # type: ignore[arg-type]


def test_the_rate_follows_the_last_half_minute_and_gives_the_time_left() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    for second in range(0, 101, 10):
        now = float(second)
        # 1 trial per second at first, 4 from second 50 on
        measured = second if second <= 50 else 50 + 4 * (second - 50)
        report = _job(measured=measured, budget=450, trials_per_s=2.5)
        pace.note(report)
    assert pace.trials_per_s(report) == pytest.approx(4.0)
    assert pace.left_s(report) == pytest.approx((450 - 250) / 4)


def test_the_rate_is_the_jobs_average_until_enough_was_seen() -> None:
    pace = Pace(lambda: 0.0)
    report = _job(measured=10, budget=100, trials_per_s=2.0)
    pace.note(report)
    assert pace.trials_per_s(report) == 2.0
    assert pace.left_s(report) == pytest.approx(45.0)


def test_trials_from_the_store_count_as_spent() -> None:
    assert fraction(_job(measured=16, reused=16, budget=64)) == 0.5
    assert fraction(_job(measured=70, budget=64)) == 1.0
    assert fraction(_job()) == 0.0


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("done", ExitCode.DONE),
        ("detached", ExitCode.DONE),
        ("partly", ExitCode.PARTLY),
        ("failed", ExitCode.FAILED),
        ("cancelled", ExitCode.FAILED),
        ("stopped", ExitCode.FAILED),
    ],
)
def test_the_exit_code_follows_the_jobs_status(status: str, code: ExitCode) -> None:
    assert _job(status=status).exit_code is code


def test_the_json_document_has_every_field_of_the_contract_and_null_for_what_was_not_measured() -> None:
    status = tuning_pb2.JobStatus(job="j", model="m", status="done", target_json='{"kind":"llvm"}', sm_percent=25)
    status.tasks.add(name="t", state="tuned", workload_digest="w", description="d", weight=2, best_latency_us=3.5)
    document = job_report(status).document()
    assert {"job", "model", "status", "target", "sm_percent", "sm_count", "tasks", "elapsed_s"} <= set(document)
    assert document["target"] == {"kind": "llvm"}
    assert document["model_latency_us"] == {"baseline": None, "tuned": None}
    assert {"measured", "failed", "reused"} <= set(document["trials"])
    (task,) = document["tasks"]
    expected = {"name", "state", "workload", "description", "weight", "trials", "reused", "failed"}
    expected |= {"baseline_latency_us", "best_latency_us", "verified", "instance", "error"}
    assert expected <= set(task)
    assert task["baseline_latency_us"] is None
    assert task["best_latency_us"] == 3.5


def test_a_status_of_a_newer_server_counts_as_running() -> None:
    report = job_report(tuning_pb2.JobStatus(job="j", status="hibernating"))
    assert report.status == "running"
    assert not report.ended


def test_a_speed_up_needs_both_latencies() -> None:
    task = TaskReport("t", TaskState.TUNED, "w", "d", baseline_latency_us=300.0, best_latency_us=100.0)
    assert task.speedup == 3.0
    assert TaskReport("t", TaskState.TUNED, "w", "d", best_latency_us=100.0).speedup is None


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:0", "host:65536", "::1:80", "http://h:1"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a server address"):
        ConnectionOptions(text)


def test_addresses_are_split_ipv6_included() -> None:
    assert split_address("gpu1:50061") == ("gpu1", 50061)
    assert split_address("[::1]:50061") == ("::1", 50061)
    assert is_loopback("::1")
    assert is_loopback("127.0.0.9")
    assert is_loopback("localhost")
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("gpu1")


def test_a_token_never_crosses_the_network_in_the_clear_unasked() -> None:
    with pytest.raises(UsageError, match="unencrypted"):
        ConnectionOptions("gpu1:50061", token="secret")
    for options in (
        ConnectionOptions("gpu1:50061", token="secret", tls=True),
        ConnectionOptions("gpu1:50061", token="secret", insecure=True),
        ConnectionOptions("127.0.0.1:50061", token="secret"),
    ):
        assert "secret" not in repr(options)


def test_half_a_key_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both --tls-cert and --tls-key"):
        ConnectionOptions("gpu1:50061", tls_cert=tmp_path / "cert.pem")


def test_a_token_comes_from_its_file_before_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  from-file\n")
    assert read_token(path, {"TUNER_TOKEN": "from-env"}) == "from-file"
    assert read_token(None, {"TUNER_TOKEN": "from-env"}) == "from-env"
    path.write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        read_token(path, {})
    with pytest.raises(UsageError, match="cannot read"):
        read_token(tmp_path / "none", {})
