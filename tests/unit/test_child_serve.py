"""The loop of a child process: what it does when nobody asks it for anything."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tuner_server.processes import child, frames

FREED = """
import ctypes, sys
from pathlib import Path
from tuner_server.processes.heap import keep_freed_memory, release_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

def take_and_free():
    blocks = [libc.malloc(64 << 10) for _ in range(24 * 16)]  # 24 MiB
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    for block in blocks:
        libc.free(block)

if sys.argv[1] == "keep":
    keep_freed_memory()
start = resident()
take_and_free()
kept = resident() - start
release_freed_memory()
print(kept, resident() - start)
"""


def test_idle_is_said_once_after_each_request_and_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "IDLE_S", 0.05)
    ours, theirs = socket.socketpair()
    idle: list[int] = []
    heard = threading.Event()
    asked = 0

    def note() -> None:
        idle.append(asked)
        heard.set()

    loop = threading.Thread(
        target=child.serve, args=(theirs, {"twice": lambda args: {"value": 2 * args["value"]}}, note)
    )
    loop.start()
    for value in range(3):
        assert heard.wait(10)
        heard.clear()
        asked += 1
        frames.send(ours, {"id": value, "op": "twice", "args": {"value": value}})
        reply = frames.receive(ours)
        assert reply is not None and reply["result"] == {"value": 2 * value}
    assert heard.wait(10)
    ours.close()
    loop.join(10)
    assert not loop.is_alive() and idle == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
@pytest.mark.parametrize("way", ["keep", "as it is"])
def test_freed_memory_is_kept_until_it_is_released(way: str) -> None:
    command = [sys.executable, "-c", FREED, way]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert (kept >= 20) == (way == "keep")
    assert left <= 4
