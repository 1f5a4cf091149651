"""A sharded job while the network between the client and one of its servers is cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.replay_fleet import FACTS, Script, fleet
from tests.replay_server import replay_spec

OUTSIDE, INSIDE = "10.213.77.1", "10.213.77.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def namespace() -> Iterator[tuple[str, str]]:
    """A network namespace that a pair of virtual interfaces leads into: its name, and that of our end."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    name, ours, theirs = f"tuner{os.getpid()}", f"tn{os.getpid()}a"[:15], f"tn{os.getpid()}b"[:15]
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here ({error.stderr.strip()})")
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        ip("addr", "add", f"{OUTSIDE}/30", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", name, "addr", "add", f"{INSIDE}/30", "dev", theirs)
        ip("-n", name, "link", "set", theirs, "up")
        yield name, ours
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def test_a_job_outlives_a_cut_network_and_takes_the_instance_back_when_it_is_whole(
    namespace: tuple[str, str], tmp_path: Path
) -> None:
    name, ours = namespace
    with fleet(tmp_path) as servers:
        far = servers.add(("ip", "netns", "exec", name), host=INSIDE)
        servers.add(trial_s=0.15)

        def cut() -> None:
            ip("link", "set", ours, "down")
            threading.Timer(4.0, lambda: ip("link", "set", ours, "up")).start()

        script = Script((40, cut))
        report = servers.tuner(script).drive(replay_spec(6, 300), FACTS)
        assert report.status == "done" and report.measured == 300
        assert script.said(f"{far.address} has been silent")
        assert script.said(f"{far.address} is back")
        assert far.records(report.job) <= servers.gathered(report.job)
