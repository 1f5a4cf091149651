"""Stands in for a CUDA process under MPS: attaches like one, and sees what its percentage grants.

As a program: `mps_client.py probe` prints the facts that `tuner_server.gpu.probe` prints of a 132-SM device;
`mps_client.py work` says "attached", goes busy, and exits with code 3 when it is taken off the device; `mps_client.py
stuck`
is so busy elsewhere that it does not notice; `mps_client.py idle` leaves in order when its standard input ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

TOTAL_SMS = 132


def attach() -> tuple[socket.socket, int]:
    """Become a client of the daemon in CUDA_MPS_PIPE_DIRECTORY; returns the connection and the SMs seen."""
    pipe = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.path.join(pipe, "control"))
        sock.sendall(b'{"command": "connect"}\n')
        sock.makefile().readline()
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(pipe, "server"))
    say(server, {"op": "attach", "pid": os.getpid()})
    percent = float(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100"))
    if os.environ.get("STANDIN_IGNORES_CAPS"):
        percent = 100
    return server, TOTAL_SMS if percent >= 100 else max(1, int(TOTAL_SMS * percent / 200)) * 2


def say(server: socket.socket, message: dict[str, object]) -> bool:
    """Tell the server something; False when it has dropped this client."""
    try:
        server.sendall(json.dumps(message).encode() + b"\n")
        return bool(server.recv(4096))
    except OSError:
        return False


def main() -> int:
    if sys.argv[1] == "probe":
        if not os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("GPU-"):
            print(json.dumps({"error": "cuDeviceGet: CUDA_ERROR_NO_DEVICE (100)"}))
            return 1
        sms = attach()[1] if "CUDA_MPS_PIPE_DIRECTORY" in os.environ else TOTAL_SMS
        facts = {
            "name": "NVIDIA H200",
            "capability_major": 9,
            "capability_minor": 0,
            "sm_count": sms,
            "memory_bytes": 139 << 30,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "registers_per_block": 65536,
            "l2_cache_bytes": 60 << 20,
            "warp_size": 32,
        }
        print(json.dumps(facts))
        return 0
    server, _ = attach()
    if sys.argv[1] != "idle":
        say(server, {"op": "busy"})
    print("attached", flush=True)
    if sys.argv[1] == "idle":
        sys.stdin.read()
        return 0
    if sys.argv[1] == "stuck":
        time.sleep(3600)
    server.recv(1)  # returns when the server drops this client
    return 3


if __name__ == "__main__":
    sys.exit(main())
