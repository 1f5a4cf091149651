"""A server's scratch directory: its own while it lives, cleared away by the next server after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tuner_server.scratch import Scratch

OWNER = """
import sys, time
from pathlib import Path
from tuner_server.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "artifact.so").touch()
print(scratch.path, flush=True)
time.sleep(60)
"""


def test_what_a_killed_server_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    (tmp_path / "tuner-of-something-else").mkdir()
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        beside = Scratch(tmp_path)
        assert (theirs / "artifact.so").exists() and beside.path != theirs
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    successor = Scratch(tmp_path)
    assert not theirs.exists()
    assert beside.path.exists() and successor.path.exists()
    for scratch in (beside, successor):
        scratch.remove()
        scratch.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["tuner-of-something-else"]
