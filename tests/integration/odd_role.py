"""A role for tests of processes: it sleeps, spins, crashes and starts processes of its own on request."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

from tuner_server.processes.child import WorkError, serve


def main(sock: socket.socket, config: dict[str, Any]) -> None:
    """Serve odd operations; with ``stubborn`` in the config, stay after the peer has closed."""
    serve(
        sock,
        {
            "echo": lambda args: args,
            "facts": _facts,
            "sleep": lambda args: time.sleep(args["s"]) or {},
            "work": _work,
            "exit": lambda args: os._exit(args["code"]),
            "abort": lambda args: os.abort(),
            "refuse": _refuse,
            "break": lambda args: {}["missing"],
            "start_compiler": _start_compiler,
        },
    )
    if config.get("stubborn"):
        time.sleep(3600)


def _facts(_args: dict[str, Any]) -> dict[str, Any]:
    return {
        "parent": os.getppid(),
        "tvm": "tvm" in sys.modules,
        "env": dict(os.environ),
        "affinity": sorted(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "group": os.getpgid(0),
    }


def _work(args: dict[str, Any]) -> dict[str, Any]:
    """Use processor time: it does not pass while the process is stopped."""
    end = time.process_time() + args["cpu_s"]
    while time.process_time() < end:
        pass
    return {}


def _refuse(args: dict[str, Any]) -> dict[str, Any]:
    raise WorkError(args["kind"], args["message"])


def _start_compiler(_args: dict[str, Any]) -> dict[str, Any]:
    """Stands for a linker that hangs: a process of the child's own."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    return {"pid": process.pid}
