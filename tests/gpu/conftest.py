"""Tests that need an NVIDIA GPU: skipped with the reason where there is none."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner_server.gpu.inventory import GpuInfo, find_gpus
from tuner_server.gpu.mps import CONTROL, find_control
from tuner_server.gpu.mps_processes import find_mps_processes

HERE = Path(__file__).parent


def _missing() -> str:
    inventory = find_gpus()
    if not inventory.gpus:
        return inventory.reason
    return "" if find_control() else "nvidia-cuda-mps-control is not installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the marker ``gpu``."""
    ours = [item for item in items if HERE in item.path.parents]
    reason = _missing() if ours else ""
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"no GPU to test on: {reason}"))


@pytest.fixture(scope="session")
def gpu() -> GpuInfo:
    """The first GPU that this process may see."""
    return find_gpus().gpus[0]


@pytest.fixture(scope="session")
def four_quarters(gpu: GpuInfo) -> tuple[str, ...]:
    """Options of a ``tuner-server`` that has the first GPU to itself, in four parts."""
    return ("--device", f"cuda:{gpu.uuid}", "--sm-percent", "25", "--workers", "4")


@pytest.fixture(scope="session")
def short_dir() -> Iterator[Path]:
    """A directory for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="tuner-gpu-"))
    yield directory
    for pipes in directory.rglob("pipe"):  # of a server that a failed test has killed
        for process in find_mps_processes(pipes, CONTROL):
            process.signal(signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def artifacts(short_dir: Path, gpu: GpuInfo) -> Path:
    """The kernels of ``kernels.py``, built for the first GPU."""
    from tests.gpu import kernels

    directory = short_dir / "artifacts"
    directory.mkdir()
    target = json.dumps({**json.loads(kernels.H200_TARGET), "arch": gpu.arch})
    for name in kernels.BODIES:
        kernels.build(name, directory, target)
    return directory
