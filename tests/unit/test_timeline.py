"""The trace of a server: JSON that viewers open, whatever happened to the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner_core.errors import UsageError
from tuner_server import timeline


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    yield
    timeline.stop()


def events(path: Path, of_killed: bool = False) -> list[dict[str, Any]]:
    text = path.read_text()
    if of_killed and not text.endswith("]"):
        text += "]"  # optional in the format
    loaded = json.loads(text)
    assert isinstance(loaded, list)
    return loaded


def named(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Slices by stage and worker."""
    loaded = events(path)
    stages = {event["pid"]: event["args"]["name"] for event in loaded if event["name"] == "process_name"}
    workers = {event["tid"]: event["args"]["name"] for event in loaded if event["name"] == "thread_name"}
    slices: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in loaded:
        if event["ph"] == "X":
            slices.setdefault((stages[event["pid"]], workers[event["tid"]]), []).append(event)
    return slices


def test_slices_say_which_worker_of_which_stage_did_what_for_which_operator(tmp_path: Path) -> None:
    timeline.start(tmp_path / "trace.json")
    with timeline.of_task("dense"), timeline.slice("build", "build-0", "build") as about:
        about["cpu_s"] = 0.5
    with timeline.slice("build", "build-0", "build"):
        pass
    with timeline.as_stage("promotion"), timeline.slice("measure", "measure-0", "measure"):
        pass
    slices = named(tmp_path / "trace.json")
    first, second = slices["build", "build-0"]
    assert first["args"] == {"cpu_s": 0.5, "task": "dense"}
    assert second["args"] == {}
    assert first["ts"] + first["dur"] <= second["ts"]
    assert ("promotion", "measure-0") in slices


def test_a_slice_that_fails_is_recorded_with_its_error(tmp_path: Path) -> None:
    timeline.start(tmp_path / "trace.json")
    with pytest.raises(ValueError, match="no"), timeline.slice("build", "build-0", "build"):
        raise ValueError("no")
    ((slice_,),) = named(tmp_path / "trace.json").values()
    assert slice_["args"] == {"error": "ValueError"}


def test_queues_are_counters(tmp_path: Path) -> None:
    timeline.start(tmp_path / "trace.json")
    with timeline.waiting("to be built"), timeline.waiting("to be built"):
        pass
    counts = [event["args"]["waiting"] for event in events(tmp_path / "trace.json") if event["ph"] == "C"]
    assert counts == [1, 2, 1, 0]


def test_nothing_is_recorded_unless_it_was_started(tmp_path: Path) -> None:
    with timeline.slice("build", "build-0", "build"), timeline.waiting("to be built"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_file_stays_within_its_bound_and_says_that_it_is_full(tmp_path: Path) -> None:
    timeline.start(tmp_path / "trace.json", max_bytes=4000)
    for _ in range(200):
        with timeline.slice("build", "build-0", "build"):
            pass
    assert (tmp_path / "trace.json").stat().st_size < 4500
    assert events(tmp_path / "trace.json")[-1]["name"] == "the trace is full"


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the trace"):
        timeline.start(tmp_path / "missing" / "trace.json")


KILLED = """
import sys
from pathlib import Path
from tuner_server import timeline
timeline.start(Path(sys.argv[1]))
print("on", flush=True)
while True:
    with timeline.slice("build", "build-0", "build"):
        pass
"""


def test_what_a_killed_server_leaves_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
            while path.stat().st_size < 20_000:
                pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(events(path, of_killed=True)) > 100


def test_what_is_there_after_any_part_of_the_writes_holds_whole_events(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline.start(path)
    for index in range(300):
        with timeline.slice("build", "build-0", "build" * (index % 7)):
            pass
    text = path.read_text()
    pages = range(timeline.PAGE_BYTES, len(text), timeline.PAGE_BYTES)
    assert len(pages) > 5
    counts = [len(json.loads(text[:end] + "]")) for end in pages]
    assert counts == sorted(counts) and counts[0] > 10
    assert len(events(path)) > 300
