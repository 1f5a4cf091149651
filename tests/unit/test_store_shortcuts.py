"""What the store does once for many traces gives what doing it for each gives."""

from __future__ import annotations

import json
import zlib

import pytest

from tests.contract.record_values import make_record, make_workload
from tuner_core.errors import InvalidRecordError
from tuner_core.model import canonical_json, trace_digest, trial_id
from tuner_core.store import compression
from tuner_core.store.tvm_folder.lines import StockRecord, parse_record
from tuner_core.store.validation import check_record

STEPS = [["GetBlock", [], ["C", "main"], ["b0"]], ["SamplePerfectTile", ["l1"], [4, 64], ["v2", "v3"]]]
HEAD = canonical_json([STEPS, [[1, [2, 2]]]])
TARGET = '{"kind":"llvm","num-cores":2}'


class TestTraceDigest:
    @pytest.mark.parametrize(
        "trace",
        [
            canonical_json([STEPS, [[1, [4, 1]]]]),
            canonical_json([STEPS, [[1, [4.5, "é"]]]]),
            canonical_json([STEPS, [[1, [4, 1]]], 3]),
            canonical_json([[*STEPS, ["Split", ["l1"], [[1, [[2]]], [[3]]], [[[4]]]]], [[1, [4, 1]]]]),
            canonical_json([STEPS, [[1, [{"b": 1, "a": 2}]]]]),
            canonical_json([STEPS, [[1, [4, 1]]]])[:-1] + " ]",
            canonical_json([STEPS, [[1, [4, 1]]]]).replace("[4,1]", "[4, 1]"),
            canonical_json([STEPS, [[1, [4, 1]]]]).replace("[4,1]", "[4,1.50]"),
            canonical_json([STEPS, [[1, ["ab"]]]]).replace('"ab"', '"\\u0061b"'),
            canonical_json([STEPS, [[1, [{"a": 1}]]]]).replace('{"a":1}', '{"b":1,"a":2}'),
            json.dumps([STEPS, [[1, [4, 1]]]]),
        ],
    )
    def test_is_that_of_the_canonical_text_however_the_trace_is_written(self, trace: str) -> None:
        for text in (HEAD, trace, trace):  # the instructions of the first are known to the others
            record = make_record(make_workload(), trace=text)
            assert record.trial_id == trial_id(record.key, text, record.job, False)
            assert check_record(record) == trace_digest(text)

    @pytest.mark.parametrize("end", ["]", "", "]]]", "],[2]", ']]{"a":'])
    def test_what_is_no_json_is_refused_behind_known_instructions_too(self, end: str) -> None:
        check_record(make_record(make_workload(), trace=HEAD))
        good = make_record(make_workload(), trace=HEAD)
        object.__setattr__(good, "trace", HEAD[:-2] + end)
        with pytest.raises(InvalidRecordError):
            check_record(good)


class TestPackedTraces:
    def test_what_was_unpacked_is_packed_as_it_was(self) -> None:
        text = "schedule " * 200
        blob = zlib.compress(text.encode(), 9)
        assert compression.unpack(blob, limit=10_000, what="trace") == text
        assert compression.pack(text) is blob

    @pytest.mark.parametrize("spoil", [lambda raw: zlib.compress(raw, 0), lambda raw: zlib.compress(raw, 6) + b"more"])
    def test_but_not_what_a_sender_packed_badly(self, spoil: object) -> None:
        text = f"another schedule {spoil} " * 100
        assert callable(spoil)
        blob = spoil(text.encode())
        assert compression.unpack(blob, limit=100_000, what="trace") == text
        assert compression.pack(text) == zlib.compress(text.encode(), 6)


class TestStockLines:
    def line(
        self, decisions: object, number: int = 3, runs: object = (1e-5, 2e-5), more: str = "", compact: bool = False
    ) -> bytes:
        row = [number, [[STEPS, decisions], runs, json.loads(TARGET), [["TENSOR", "float32", [1]]]]]
        return (json.dumps(row, separators=(",", ":") if compact else None) + more + "\n").encode()

    def test_lines_with_the_same_instructions_are_read_as_any_line_is(self) -> None:
        for number, decisions in (
            (3, [[1, [2, 2]]]),
            (3, [[1, [4, 1]]]),
            (4, [[1, [4, 1.5]]]),
            (3, [[1, ["é]]], [["]]]),
        ):
            for compact in (False, False, True, True):
                found = parse_record(self.line(decisions, number, compact=compact))
                assert found == StockRecord(
                    number, canonical_json([STEPS, decisions]), (1e-5, 2e-5), json.loads(TARGET)
                )

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ({"decisions": [[1, 2, 3]]}, "instructions and decisions"),
            ({"decisions": [[1, [2, 2]]], "runs": [0.0]}, "positive"),
            ({"decisions": [[1, [2, 2]]], "runs": []}, "not measured"),
            ({"decisions": [[1, [2, 2]]], "more": "]"}, "not JSON"),
        ],
    )
    def test_a_damaged_line_behind_known_instructions_says_what_is_wrong(
        self, line: dict[str, object], says: str
    ) -> None:
        parse_record(self.line([[1, [2, 2]]]))
        with pytest.raises(InvalidRecordError, match=says):
            parse_record(self.line(**line))  # type: ignore[arg-type]

    @pytest.mark.parametrize("compact", [False, True])
    def test_a_line_cut_anywhere_is_no_record(self, compact: bool) -> None:
        whole = self.line([[1, [2, 2]]], compact=compact).rstrip()
        parse_record(whole)
        for end in range(1, len(whole)):
            with pytest.raises(InvalidRecordError):
                parse_record(whole[:end])
