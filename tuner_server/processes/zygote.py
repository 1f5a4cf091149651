"""The prefork process: imports TVM once, then forks the search, build and measurement processes on request.

Importing TVM with its schedule intrinsics takes seconds and about 300 MB; a fork takes milliseconds and shares those
pages. The zygote never touches CUDA, gRPC or a thread pool, so its forks start clean. It exits with its parent, and its
forks exit with it.

Run as ``python -m tuner_server.processes.zygote FD PARENT_PID ROLES``; FD is a connected stream socket, ROLES a JSON
object of role to module.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from tuner_server.processes import frames
from tuner_server.processes.child import die_with_parent

ROLES = {
    "search": "tuner_server.search.process",
    "build": "tuner_server.build.process",
    "measure": "tuner_server.measure.worker",
}


def _receive_with_fd(control: socket.socket) -> tuple[dict[str, Any] | None, int | None]:
    """One frame; a spawn request carries the child's socket as ancillary data on its first byte."""
    fds = array.array("i")
    first, ancillary, _flags, _address = control.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: fds.itemsize])
    if not first:
        return None, None
    return frames.receive(control), (fds[0] if fds else None)


def _become(spawn: dict[str, Any], module: str, child_fd: int, zygote_pid: int) -> NoReturn:
    """In the fork: take on the limits asked for, run the role, exit. Never returns to the zygote's loop."""
    status = 1
    try:
        os.setpgid(0, 0)  # so that a kill reaches a compiler that it started
        die_with_parent(zygote_pid)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ.update(spawn["env"])
        if spawn["affinity"]:
            os.sched_setaffinity(0, spawn["affinity"])
        if spawn["nice"]:
            os.nice(spawn["nice"])
        if spawn["stand_back"]:
            _stand_back()
        if spawn["address_space_bytes"]:
            resource.setrlimit(resource.RLIMIT_AS, (spawn["address_space_bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        log = os.open(spawn["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        role = importlib.import_module(module)
        with socket.socket(fileno=child_fd) as sock:
            role.main(sock, spawn["config"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stand_back() -> None:
    """Run only while nobody else wants the processor: whoever does gets it at once (sched(7), SCHED_IDLE)."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # a sandbox that forbids it
        os.nice(19)


def _reap(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        frames.send(control, {"exited": pid, "code": os.waitstatus_to_exitcode(status)})


def main() -> None:
    """Import, announce readiness, then fork on request until the control socket closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    roles = json.loads(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then stops its children in order
    from tuner_core.compiler.tvm_setup import load_tvm, without_torch

    with without_torch():  # CUDA that was initialised here would fail in every fork; no role needs torch
        version = load_tvm(intrinsics=True)
        for module in roles.values():
            importlib.import_module(module)
    gc.collect()
    gc.freeze()

    wake_read, wake_write = socket.socketpair()
    wake_read.setblocking(False)
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    frames.send(control, {"ready": version})
    zygote_pid = os.getpid()
    while True:
        readable, _, _ = select.select([control, wake_read], [], [])
        if wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                wake_read.recv(4096)
            _reap(control)
        if control not in readable:
            continue
        spawn, child_fd = _receive_with_fd(control)
        if spawn is None or child_fd is None:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            wake_read.close()
            wake_write.close()
            _become(spawn, roles[spawn["role"]], child_fd, zygote_pid)
        os.close(child_fd)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        frames.send(control, {"spawned": spawn["token"], "pid": pid})


if __name__ == "__main__":
    main()
