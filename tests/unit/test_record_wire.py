"""Messages that a hostile or broken peer may send, and values that must come through unchanged."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.record_values import make_record, make_workload
from tuner_core.errors import InvalidRecordError, UsageError
from tuner_core.model import FailureKind, RecordKey
from tuner_core.proto.tuner.v1 import records_pb2
from tuner_core.store import wire
from tuner_core.store.compression import pack, unpack
from tuner_core.store.interface import RecordFilter

MATMUL = make_workload("matmul")


@given(st.floats(min_value=-1e9, max_value=2e11))
def test_a_time_comes_back_to_the_last_bit_that_a_timestamp_holds(seconds: float) -> None:
    stamp = wire.timestamp(seconds)
    assert wire.seconds(stamp) == pytest.approx(seconds, abs=1e-9)
    assert 0 <= stamp.nanos < 1_000_000_000
    if abs(seconds) > 1e8:  # the float itself is coarser than a nanosecond
        assert wire.seconds(stamp) == seconds


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e18])
def test_a_time_out_of_range_is_a_usage_error(seconds: float) -> None:
    with pytest.raises(UsageError, match="out of range"):
        wire.timestamp(seconds)


@pytest.mark.parametrize(
    "where",
    [
        RecordFilter(),
        RecordFilter(sm_percent=0, min_sm_percent=0, max_sm_percent=0, sm_count=0, since=0.0, nearest_sm_percent=0),
        RecordFilter(
            "conv2d",
            "x",
            "m",
            "float16",
            "d",
            1,
            2,
            3,
            4,
            "t",
            "j",
            "w",
            "g",
            "v",
            True,
            True,
            5.5,
            {"a": "b"},
            "1x?",
            9,
        ),
    ],
)
def test_a_filter_comes_back_and_unset_is_not_zero(where: RecordFilter) -> None:
    assert wire.filter_from_message(wire.filter_to_message(where)) == where


def test_records_workloads_and_keys_come_back() -> None:
    key = RecordKey("a" * 64, "b" * 64, "NVIDIA H200", 132, "0.1")
    assert wire.key_from_message(wire.key_to_message(key)) == key
    assert wire.workload_from_message(wire.workload_to_message(MATMUL)) == MATMUL
    for record in (make_record(MATMUL), make_record(MATMUL, failure=FailureKind.WORKER_LOST, ci_low_us=None)):
        assert wire.record_from_message(wire.record_to_message(record)) == record


def test_a_small_message_cannot_fill_the_memory() -> None:
    bomb = zlib.compress(b"\0" * (64 << 20), 9)
    assert len(bomb) < 100_000
    with pytest.raises(InvalidRecordError, match="larger than"):
        wire.workload_from_message(records_pb2.Workload(digest="a" * 64, body_zlib=bomb))
    message = wire.record_to_message(make_record(MATMUL))
    message.trace_zlib = bomb
    with pytest.raises(InvalidRecordError, match="larger than"):
        wire.record_from_message(message)


@pytest.mark.parametrize(
    ("blob", "says"),
    [(b"no zlib", "not valid zlib"), (pack("x" * 1_000)[:-6], "cut short"), (zlib.compress(b"\xff\xfe"), "UTF-8")],
)
def test_damaged_data_is_named(blob: bytes, says: str) -> None:
    with pytest.raises(InvalidRecordError, match=says):
        unpack(blob, limit=10_000, what="trace")


def test_a_text_of_exactly_the_limit_passes() -> None:
    assert unpack(pack("x" * 100), limit=100, what="trace") == "x" * 100
    with pytest.raises(InvalidRecordError):
        unpack(pack("x" * 101), limit=100, what="trace")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("evaluator_json", "{"),
        ("evaluator_json", '{"no_such_setting": 1}'),
        ("evaluator_json", "[1]"),
        ("partition_kind", "whole"),
        ("failure", "bad_luck"),
        ("origin", ""),
    ],
)
def test_a_malformed_field_of_a_record_is_an_invalid_record(field: str, value: str) -> None:
    message = wire.record_to_message(make_record(MATMUL))
    setattr(message, field, value)
    with pytest.raises(InvalidRecordError, match=message.trial_id[:12]):
        wire.record_from_message(message)


@pytest.mark.parametrize(
    "args_info", ["{", "[1]", '[["TENSOR", "float32"]]', '[["TENSOR", "float32", ["x"]]]', "[" * 100_000]
)
def test_malformed_arguments_of_a_workload_are_an_invalid_record(args_info: str) -> None:
    message = wire.workload_to_message(MATMUL)
    message.args_info_json = args_info
    with pytest.raises(InvalidRecordError, match="args_info"):
        wire.workload_from_message(message)
