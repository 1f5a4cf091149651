"""Several servers of one host: each keeps to its part of the cores, and says when another works on the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner_core.errors import UsageError
from tuner_server.cores import CoreClaim, own_part


def physical(core: int) -> tuple[int, int]:
    """Four physical cores of two processors each: 0 and 4, 1 and 5, ..."""
    return 0, core % 4


USABLE = (0, 4, 1, 5, 2, 6, 3, 7)


def test_parts_are_disjoint_whole_physical_cores_and_cover_all() -> None:
    first, second = own_part("1/2", USABLE, physical), own_part("2/2", USABLE, physical)
    assert sorted(first + second) == sorted(USABLE)
    assert not {physical(core) for core in first} & {physical(core) for core in second}
    assert own_part("0-1,6", USABLE, physical) == (0, 1, 6)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [("0/2", "wants a part"), ("3/2", "wants a part"), ("x", "wants a part"), ("3-1", "wants a part"),
     ("1/9", "only 8 cores"), ("7-8", "may not use 8")],
)  # fmt: skip
def test_what_does_not_exist_is_refused_in_one_line(wanted: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        own_part(wanted, USABLE, physical)


def test_a_server_and_what_it_starts_keep_to_its_part() -> None:
    ours = sorted(os.sched_getaffinity(0))
    code = (
        "import os, subprocess, sys; from tuner_server.cores import keep_to; keep_to(sys.argv[1]);"
        "print(subprocess.check_output([sys.executable, '-c', 'import os; print(sorted(os.sched_getaffinity(0)))']))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(ours[-1])], capture_output=True, text=True, check=True)
    assert f"[{ours[-1]}]" in said.stdout


def test_servers_on_the_same_cores_know_of_each_other_while_they_live(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    first = CoreClaim((0, 1), "127.0.0.1:1", folder)
    apart = CoreClaim((2, 3), "127.0.0.1:2", folder)
    assert not first.sharing and not apart.sharing
    assert CoreClaim((1, 2), "127.0.0.1:3", folder).sharing == ["127.0.0.1:1", "127.0.0.1:2"]
    (folder / "killed").write_text('{"cores": [0, 1], "name": "dead"}')  # nobody holds its lock
    first.release()
    late = CoreClaim((0, 1), "127.0.0.1:4", folder)
    assert "127.0.0.1:1" not in late.sharing and "dead" not in late.sharing
