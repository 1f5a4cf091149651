"""A local server on the user's data directory, for as long as a command needs one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from tuner_core.datadir import lock_is_held, read_holder
from tuner_core.errors import TunerError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
_HOLDER_STARTING_S = 5.0


class EmbeddedServer:
    """A ``tuner-server`` process that belongs to this one: it ends when this process does, however that ends.

    The kernel ties it to the thread that makes it (prctl(2), PR_SET_PDEATHSIG), so that
    must not end before it is stopped.

    Args:
        data_dir: Its data directory.
        arguments: More of its command-line arguments.

    Raises:
        TunerError: It did not start; the text is the server's own.

    Attributes:
        address: ``127.0.0.1:PORT``.
        pid: Its process id.
    """

    def __init__(self, data_dir: Path, arguments: Sequence[str] = ()) -> None:
        if importlib.util.find_spec("tuner_server") is None:
            raise TunerError("no tuner-server is installed here; name a server with --server HOST:PORT")
        self._log = data_dir / "logs" / "embedded-server.log"
        ready, writer = os.pipe()
        try:
            with _open_log(self._log, data_dir) as log_file:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "tuner_server", "--lazy", "--listen", "127.0.0.1:0"),
                        *("--data-dir", str(data_dir), "--ready-fd", str(writer)),
                        *("--exit-with-parent", str(os.getpid()), *arguments),
                    ],
                    env=_server_environment(os.environ),
                    pass_fds=[writer],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,  # Ctrl-C is ours to answer; the server is asked with SIGTERM
                )
        except BaseException:
            os.close(ready)
            raise
        finally:
            os.close(writer)
        try:
            self.address = self._await_ready(ready)
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(ready)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code, None while it runs, negative for a signal."""
        return self._process.poll()

    def ends_within(self, timeout_s: float) -> bool:
        """Whether it has ended, or ends in that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self._process.poll() is not None

    def _await_ready(self, ready: int) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(ready, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TunerError(
                        f"the local server was not ready after {START_TIMEOUT_S:g} s; its log is {self._log}"
                    )
                chunk = os.read(ready, 4096)
                if not chunk:
                    break
                line += chunk
        try:
            said = json.loads(line)
        except ValueError:
            raise TunerError(self._death_text("before it was ready")) from None
        if "error" in said:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            raise TunerError(str(said["error"]))
        return str(said["address"])

    def _death_text(self, when: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        code = self._process.poll()
        how = "ended" if code is None else f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with {code}"
        said = _last_line(self._log)
        return f"the local server {how} {when}{f': {said}' if said else ''}; its log is {self._log}"

    def describe_death(self) -> str:
        """One line on how the process ended."""
        return self._death_text("unexpectedly")

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, on which the server stores what it measured and ends; SIGKILL after ``timeout_s``."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        except BaseException:  # a second Ctrl-C
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL. What was measured is already stored."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def _server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a local server inherits: not the client's TLS and token variables, which mean something else to a server."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(("TUNER_TLS_", "TUNER_TOKEN")) and name != "TUNER_LISTEN"
    }


def _open_log(path: Path, data_dir: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path.open("ab")
    except OSError as error:
        raise TunerError(
            f"cannot write the data directory {data_dir} ({error.strerror}); choose another with --data-dir"
        ) from None


def _last_line(path: Path) -> str:
    """The last line of a log, shortened; empty when there is none."""
    try:
        lines = path.read_bytes()[-4096:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def connect_or_start(data_dir: Path, arguments: Sequence[str] = ()) -> tuple[str, EmbeddedServer | None]:
    """The server that holds the data directory, or one of our own.

    Args:
        data_dir: The data directory.
        arguments: For a server that is started.

    Returns:
        Its address, and the process when it is ours.

    Raises:
        TunerError: There is none and none could be started.
    """
    if holder := read_holder(data_dir):
        return holder.address, None
    try:
        server = EmbeddedServer(data_dir, arguments)
    except TunerError:
        # Someone else's server may have taken the directory meanwhile: it announces itself when it is up.
        deadline = time.monotonic() + _HOLDER_STARTING_S
        while lock_is_held(data_dir / "server.lock") and time.monotonic() < deadline:
            if holder := read_holder(data_dir):
                return holder.address, None
            time.sleep(0.1)
        raise
    return server.address, server
