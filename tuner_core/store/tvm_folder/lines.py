"""The lines of a stock JSONDatabase folder, read and written without TVM.

Formats as TVM's ``src/s_tir/meta_schedule/database/{database,json_database}.cc`` write them: a workload is
``[structural hash, base64 of the length (8 bytes, little-endian) and the module's JSON]``, a record is
``[workload's line, [trace, seconds of the runs, target, arguments]]``.
"""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
import struct
from dataclasses import dataclass
from typing import Any

from tuner_core.errors import InvalidRecordError
from tuner_core.model import Record, Workload, canonical_json

WORKLOAD_FILE = "database_workload.json"
RECORD_FILE = "database_tuning_record.json"
# Written by an export beside TVM's two files: what their lines cannot say.
FACTS_FILE = "tuner.json"

# what stock TVM stores for a run that failed: 1e10 s; no kernel runs for a year
_FAILED_RUN_S = 1e7

# The schedules of one design space have the same instructions: of a line like one before, only the rest is parsed.
_INSTRUCTIONS_END = re.compile(r"\]\]\](, ?)\[\[")  # as TVM writes it, and as an export does
_INSTRUCTIONS_KEPT = 256
_INSTRUCTIONS_BYTES = 65_536
_DECODER = json.JSONDecoder()
# beginning of a line up to the end of its instructions, to the workload's line and the instructions' canonical form
_heads: dict[str, tuple[int, str]] = {}
# the workload's line, the canonical trace, and seconds and target as they stand there
_Parts = tuple[int, str, Any, Any]


@dataclass(frozen=True)
class StockRecord:
    """One line of the record file. ``trace`` is canonical JSON; ``runs_s`` is empty for a trial that failed."""

    workload: int
    trace: str
    runs_s: tuple[float, ...]
    target: dict[str, Any]

    @property
    def median_s(self) -> float:
        """Median of the runs."""
        return statistics.median(self.runs_s)


def parse_workload(line: bytes) -> str:
    """The module's JSON of a line of the workload file.

    Raises:
        InvalidRecordError: Says what is wrong with the line.
    """
    row = _json(line)
    if not (isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row)):
        raise InvalidRecordError("not a pair of a hash and a module")
    try:
        raw = base64.b64decode(row[1], validate=True)
        (length,) = struct.unpack_from("<Q", raw)
        text = raw[8:].decode()
    except (ValueError, struct.error):
        raise InvalidRecordError("the module is not base64 of UTF-8 text") from None
    if length != len(raw) - 8:
        raise InvalidRecordError(f"the module is cut short: {len(raw) - 8} of {length} bytes")
    if not isinstance(_json(text.encode()), dict):
        raise InvalidRecordError("the module is not a JSON graph")
    return text


def parse_record(line: bytes) -> StockRecord:
    """A line of the record file; its structure is checked, its trace is not replayed.

    Raises:
        InvalidRecordError: Says what is wrong with the line.
    """
    text = _text(line)
    parts = _of_known_instructions(text) or _parts(text)
    workload, trace, seconds, target = parts
    if not isinstance(target, dict) or not isinstance(target.get("kind"), str):
        raise InvalidRecordError("the record has no target")
    if not isinstance(seconds, list) or not seconds:
        raise InvalidRecordError("the record was not measured")
    if not all(isinstance(run, int | float) and not isinstance(run, bool) for run in seconds):
        raise InvalidRecordError("the seconds are not numbers")
    runs = tuple(float(run) for run in seconds)
    if not all(math.isfinite(run) and run > 0 for run in runs):
        raise InvalidRecordError("the seconds are not positive numbers")
    if max(runs) >= _FAILED_RUN_S:
        runs = ()
    return StockRecord(workload, trace, runs, target)


def record_line(record: Record, workload: Workload, number: int) -> str:
    """The line of a valid record whose workload stands in line ``number`` (from 0) of the workload file."""
    runs_us = record.latencies_us or (record.median_us or 0.0,)
    args_info = [[kind, dtype, list(shape)] for kind, dtype, shape in workload.args_info]
    runs_s = [us * 1e-6 for us in runs_us]
    body = json.dumps([json.loads(record.target_json), args_info], separators=(",", ":"))[1:-1]
    # the trace is JSON already: parsing and writing it again is most of an export's time
    return f"[{number},[{record.trace},{json.dumps(runs_s)},{body}]]"


def _parts(text: str) -> _Parts:
    row = _json(text)
    if not (isinstance(row, list) and len(row) == 2 and type(row[0]) is int and row[0] >= 0):
        raise InvalidRecordError("not a pair of a workload's number and a record")
    if not (isinstance(row[1], list) and len(row[1]) == 4):
        raise InvalidRecordError("a record has 4 parts: trace, seconds, target, arguments")
    trace, seconds, target, _ = row[1]
    if not _is_trace(trace):
        raise InvalidRecordError("the trace is not a list of instructions and decisions")
    end = _INSTRUCTIONS_END.search(text)
    head = text[: end.start(1)] if end else ""
    if head and len(head) <= _INSTRUCTIONS_BYTES and _same_json(head + "]]]", [row[0], [[trace[0]]]]):
        if len(_heads) >= _INSTRUCTIONS_KEPT:
            _heads.clear()
        _heads[head] = row[0], canonical_json(trace[0])
    return row[0], canonical_json(trace), seconds, target


def _of_known_instructions(text: str) -> _Parts | None:
    """:func:`_parts` of a line whose instructions another one had before, a tenth of the work; None for any other."""
    end = _INSTRUCTIONS_END.search(text)
    known = _heads.get(text[: end.start(1)]) if end else None
    if end is None or known is None or not text.endswith("]]"):
        return None
    workload, instructions = known
    separator = "]" + end[1]
    try:
        decisions, behind = _DECODER.raw_decode(text, end.end(1))
        rest = json.loads(f"[{text[behind + len(separator) : -2]}]")
    except (ValueError, RecursionError):
        return None
    if not text.startswith(separator, behind) or len(rest) != 3 or not _are_decisions(decisions):
        return None
    return workload, f"[{instructions},{canonical_json(decisions)}]", rest[0], rest[1]


def _same_json(text: str, value: Any) -> bool:
    try:
        return bool(json.loads(text) == value)
    except (ValueError, RecursionError):
        return False


def _are_decisions(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(decision, list) and len(decision) == 2 for decision in value)


def _is_trace(trace: Any) -> bool:
    return (
        isinstance(trace, list)
        and len(trace) == 2
        and all(isinstance(part, list) for part in trace)
        and all(isinstance(step, list) and len(step) == 4 and isinstance(step[0], str) for step in trace[0])
        and _are_decisions(trace[1])
    )


def _text(line: bytes) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise InvalidRecordError(f"not JSON ({error.reason} at byte {error.start})") from None


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"not JSON ({' '.join(str(error).split())})") from None
