"""A data directory belongs to one server at a time, and the kernel frees it when that server dies."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tuner_core.datadir import DataDirLock, default_data_dir, read_holder
from tuner_core.errors import ConflictError, TunerError

HOLD = """
import sys, time
from pathlib import Path
from tuner_core.datadir import DataDirLock
lock = DataDirLock(Path(sys.argv[1]))
lock.announce("127.0.0.1:4711")
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_server_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            with pytest.raises(ConflictError, match=rf"pid {holder.pid}, 127.0.0.1:4711"):
                DataDirLock(tmp_path)
            found = read_holder(tmp_path)
            assert found is not None and (found.pid, found.address) == (holder.pid, "127.0.0.1:4711")
        finally:
            holder.send_signal(signal.SIGKILL)
    assert read_holder(tmp_path) is None
    DataDirLock(tmp_path).release()


def test_whoever_asks_for_the_holder_does_not_pass_for_one(tmp_path: Path) -> None:
    DataDirLock(tmp_path).release()
    reader = os.open(tmp_path / "server.lock", os.O_RDWR)
    fcntl.flock(reader, fcntl.LOCK_SH)  # in the middle of read_holder
    gone = threading.Timer(0.1, os.close, [reader])
    gone.start()
    DataDirLock(tmp_path).release()
    assert gone.finished.is_set()


def test_servers_that_start_at_once_agree_on_one(tmp_path: Path) -> None:
    held: list[DataDirLock] = []
    refused: list[ConflictError] = []

    def start() -> None:
        read_holder(tmp_path)
        try:
            held.append(DataDirLock(tmp_path))
        except ConflictError as error:
            refused.append(error)

    starters = [threading.Thread(target=start) for _ in range(16)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert (len(held), len(refused)) == (1, 15)
    held[0].release()


def test_a_released_directory_has_no_holder(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    lock.announce("127.0.0.1:1")
    lock.release()
    assert read_holder(tmp_path) is None


def test_a_path_that_cannot_be_a_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TunerError, match="--data-dir"):
        DataDirLock(tmp_path / "file" / "data")


def test_the_environment_chooses_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNER_DATA_DIR", str(tmp_path))
    assert default_data_dir() == tmp_path
    monkeypatch.delenv("TUNER_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", os.fspath(tmp_path / "xdg"))
    assert default_data_dir() == tmp_path / "xdg" / "tuner"
