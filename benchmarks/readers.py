"""Many readers beside a writer, as users are: processes with gRPC clients of one real ``tuner-server`` on the store.

``python readers.py ADDRESS THREADS PAUSE_S SECONDS`` is one process of readers: it takes look-up keys as JSON on its
input, reads until the time is up and prints the seconds of each look-up.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from service import running_server

from tuner_core.model import Record, RecordKey
from tuner_core.store.remote import RemoteStore
from tuner_core.transport.channel import open_channel
from tuner_core.transport.options import ConnectionOptions

READERS = 64
_PROCESSES = 4
_READ_S = 5.0
_BEST = 8
# seconds between two calls of one client; none: the next at once
PACES: dict[str, float] = {"paced": 0.25, "saturated": 0.0}
_WRITER_PAUSE_S = {"paced": 0.01, "saturated": 0.0}


def readers_beside_a_writer(url: str, keys: Sequence[RecordKey], fresh: Iterator[Record]) -> dict[str, dict[str, Any]]:
    """64 clients that look up while another one commits single records, at a pace and as fast as they can.

    Args:
        url: Of the store.
        keys: That are looked up.
        fresh: Records that are committed.

    Returns:
        For each pace the readers, their look-ups and commits per second, and the seconds of all calls.
    """
    with running_server(("--store", url, "--device", "cpu", "--lazy")) as server:
        return {name: _run(server.address, keys, fresh, name) for name in PACES}


def _run(address: str, keys: Sequence[RecordKey], fresh: Iterator[Record], pace: str) -> dict[str, Any]:
    threads = READERS // _PROCESSES
    command = [sys.executable, __file__, address, str(threads), str(PACES[pace]), str(_READ_S)]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
        for _ in range(_PROCESSES)
    ]
    given = json.dumps([asdict(key) for key in keys])
    committing: list[float] = []
    with open_channel(ConnectionOptions(address)) as channel:
        store = RemoteStore(channel)
        for reader in readers:
            assert reader.stdin is not None and reader.stdout is not None
            reader.stdin.write(given + "\n")
            reader.stdin.flush()
        for reader in readers:
            assert reader.stdout is not None
            if reader.stdout.readline() != "ready\n":
                raise RuntimeError("a process of readers did not start")
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("go\n")
            reader.stdin.flush()
        began = time.perf_counter()
        while (elapsed_s := time.perf_counter() - began) < _READ_S:
            at = time.perf_counter()
            store.commit([next(fresh)])
            committing.append(time.perf_counter() - at)
            time.sleep(_WRITER_PAUSE_S[pace])
    reading = [seconds for reader in readers for seconds in json.loads(reader.communicate()[0])]
    return {
        "readers": READERS,
        "pause_s": PACES[pace],
        "look_ups_per_s": round(len(reading) / elapsed_s, 1),
        "commits_per_s": round(len(committing) / elapsed_s, 1),
        "look_up_s": reading,
        "commit_s": committing,
    }


def main() -> None:
    """One process of readers."""
    address, threads, pause_s, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    keys = [RecordKey(**key) for key in json.loads(sys.stdin.readline())]
    spent: list[float] = []
    ready = threading.Barrier(threads + 1)
    start = threading.Event()

    def read(number: int) -> None:
        chance = random.Random(number)
        # a connection of its own, as another user's process has
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options) as channel:
            store = RemoteStore(channel)
            store.top(keys[0], _BEST)
            ready.wait()
            start.wait()
            time.sleep(chance.random() * pause_s)
            ends = time.perf_counter() + seconds
            while (at := time.perf_counter()) < ends:
                store.top(chance.choice(keys), _BEST)
                spent.append(time.perf_counter() - at)
                time.sleep(chance.random() * 2 * pause_s)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for reader in readers:
        reader.start()
    ready.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    start.set()
    for reader in readers:
        reader.join()
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
