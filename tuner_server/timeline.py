"""What every process of a server did and when, as a trace for Perfetto or chrome://tracing.

The file is a JSON array of trace events ("Trace Event Format", array form) that is complete after every event: each one
overwrites the closing bracket, in one write, so that what a killed server leaves can be opened too. A kill can end a
write between two pages of memory, so no event lies across them: what it then leaves lacks the closing bracket, which
that format allows, and no part of an event. Like logging, it is one for the whole process; while nothing is recorded,
a slice costs a comparison.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tuner_core.errors import UsageError

STAGES = ("search", "build", "measure", "promotion", "commit", "pause", "server")
"""In the order in which a viewer shows them: ``pause`` is when search and build stand still for a measurement."""
MAX_BYTES = 64 << 20
PAGE_BYTES = 4096
"""The smallest piece in which Linux carries out a write: only between two of them does a kill interrupt it."""

_task: ContextVar[str] = ContextVar("task", default="")
_stage: ContextVar[str] = ContextVar("stage", default="")


class _Recorder:
    def __init__(self, path: Path, max_bytes: int) -> None:
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write the trace {path}: {error.strerror}") from None
        self._start_ns = time.monotonic_ns()
        self._left = max_bytes
        self._end = 0
        self._threads: dict[tuple[str, str], int] = {}
        self._counts: Counter[str] = Counter()
        self._server_cpu_s = time.process_time()
        os.write(self._fd, b"[\n]")
        for index, stage in enumerate(STAGES):
            self.add({"ph": "M", "name": "process_name", "pid": index + 1, "args": {"name": stage}})
            self.add({"ph": "M", "name": "process_sort_index", "pid": index + 1, "args": {"sort_index": index}})
        self.add({"ph": "M", "name": "started_at", "pid": len(STAGES), "args": {"unix_s": time.time()}})

    def add(self, event: dict[str, Any]) -> None:
        """Append one event; when the file is full, a last one says so."""
        if self._left < 0:
            return
        data = json.dumps(event, separators=(",", ":")).encode()
        self._left -= len(data) + 2
        if self._left < 0:
            last = {"ph": "i", "name": "the trace is full", "ts": self.now_us(), "pid": len(STAGES), "tid": 0, "s": "g"}
            data = json.dumps(last).encode()
        data = (b",\n" if self._end else b"") + data
        room = PAGE_BYTES - (2 + self._end) % PAGE_BYTES
        if len(data) + 2 > room:
            data = b" " * room + data
        try:
            os.pwrite(self._fd, data + b"\n]", 2 + self._end)
        except OSError:  # a full disk ends the trace, not the server
            self._left = -1
        self._end += len(data)

    def now_us(self) -> float:
        return (time.monotonic_ns() - self._start_ns) / 1e3

    def place(self, stage: str, worker: str) -> dict[str, int]:
        """The ids of a worker in a stage; the first time it is also named."""
        pid = STAGES.index(stage) + 1
        thread = self._threads.get((stage, worker))
        if thread is None:
            thread = self._threads[stage, worker] = len(self._threads) + 1
            self.add({"ph": "M", "name": "thread_name", "pid": pid, "tid": thread, "args": {"name": worker}})
        return {"pid": pid, "tid": thread}

    def count(self, queue: str, change: int) -> None:
        self._counts[queue] += change
        self.add({"ph": "C", "name": queue, "ts": self.now_us(), "pid": 7, "args": {"waiting": self._counts[queue]}})

    def close(self) -> None:
        used_s = time.process_time() - self._server_cpu_s
        self.add({"ph": "M", "name": "server_cpu", "pid": len(STAGES), "args": {"cpu_s": used_s}})
        os.close(self._fd)
        self._left = -1


_recorder: _Recorder | None = None


def start(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Record from now on.

    Args:
        path: File to write, in place of what is there.
        max_bytes: Size at which recording ends.

    Raises:
        UsageError: The file cannot be written.
    """
    global _recorder
    stop()
    _recorder = _Recorder(path, max_bytes)


def stop() -> None:
    """Stop recording, if anything is recorded."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None:
        recorder.close()


@contextlib.contextmanager
def slice(stage: str, worker: str, name: str) -> Iterator[dict[str, Any]]:
    """Record the block as one slice of a worker. Slices of one worker must not overlap.

    Args:
        stage: One of :data:`STAGES`, unless :func:`as_stage` says another.
        worker: Who does it, e.g. ``build-3``.
        name: What is done.

    Yields:
        More to be said of it: what is put there until the end of the block.
    """
    about: dict[str, Any] = {}
    recorder = _recorder
    if recorder is None:
        yield about
        return
    begin = recorder.now_us()
    try:
        yield about
    except BaseException as error:
        about["error"] = type(error).__name__
        raise
    finally:
        if task := _task.get():
            about["task"] = task
        place = recorder.place(_stage.get() or stage, worker)
        duration = recorder.now_us() - begin
        recorder.add({"ph": "X", "name": name, "ts": begin, "dur": duration, **place, "args": about})


@contextlib.contextmanager
def waiting(queue: str) -> Iterator[None]:
    """Count the block as one that waits in a queue."""
    recorder = _recorder
    if recorder is None:
        yield
        return
    recorder.count(queue, 1)
    try:
        yield
    finally:
        recorder.count(queue, -1)


@contextlib.contextmanager
def of_task(task: str) -> Iterator[None]:
    """Slices in the block, and in tasks that begin there, are of an operator."""
    token = _task.set(task)
    try:
        yield
    finally:
        _task.reset(token)


@contextlib.contextmanager
def as_stage(stage: str) -> Iterator[None]:
    """Slices in the block belong to another stage than their worker's usual one."""
    token = _stage.set(stage)
    try:
        yield
    finally:
        _stage.reset(token)


class Span:
    """A slice with a beginning and an end in different places, e.g. a pause. It begins and ends at most once at a time.

    Args:
        stage, worker, name: See :func:`slice`.
    """

    def __init__(self, stage: str, worker: str, name: str) -> None:
        self._slice = (stage, worker, name)
        self._stack: contextlib.ExitStack | None = None

    def begin(self) -> None:
        """It begins, unless it has."""
        if self._stack is None:
            self._stack = contextlib.ExitStack()
            self._stack.enter_context(slice(*self._slice))

    def end(self) -> None:
        """It ends, if it has begun."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
