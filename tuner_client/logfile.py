"""Keep what libraries print (TVM and ONNX warnings, from Python and C++) out of the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

_MAX_BYTES = 5_000_000


def open_log(data_dir: Path) -> int:
    """File descriptor of ``DATA_DIR/logs/client.log``, opened for appending; a long one is set aside first.

    A log must not stop a command: where it cannot be written, this is the null device.
    """
    path = log_path(data_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > _MAX_BYTES:
                path.replace(path.with_suffix(".log.1"))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def log_path(data_dir: Path) -> Path:
    """Where the client's log is."""
    return data_dir / "logs" / "client.log"


@contextlib.contextmanager
def output_to_log(data_dir: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 of this process to the log while the context is open.

    Only for a process that is ours, such as the CLI, whose own output goes to duplicates made before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    log = open_log(data_dir)
    kept = [os.dup(1), os.dup(2)]
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, number)
            os.close(saved)


def log_traceback(data_dir: Path, error: BaseException) -> None:
    """Append the traceback of an unexpected error, with the time."""
    log = open_log(data_dir)
    try:
        lines = "".join(traceback.format_exception(error))
        os.write(log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {lines}".encode(errors="replace"))
    except OSError:
        pass
    finally:
        os.close(log)
