"""Whether a worker's limit of device memory holds is tried out, with the real probe over a stand-in driver."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tuner_core.errors import TunerError
from tuner_server.gpu.inventory import GpuInfo
from tuner_server.gpu.lock import LOCK_DIRECTORY
from tuner_server.gpu.probe import memory_limit_bytes
from tuner_server.gpu.target import PROBE_COMMAND, read_device_facts
from tuner_server.partitions.mps import MpsPartitions

STANDIN = Path(__file__).parents[1] / "gpu_standin"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("driver")
    library = directory / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(STANDIN / "libcuda.c")], check=True)
    return directory


def ask(driver: Path, **env: str) -> None:
    asyncio.run(read_device_facts({"LD_LIBRARY_PATH": str(driver), **env}, PROBE_COMMAND))


def test_a_limit_that_is_kept_is_accepted(driver: Path) -> None:
    ask(driver)
    ask(driver, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=4096M")


def test_a_limit_that_is_accepted_but_not_kept_is_found_out(driver: Path) -> None:
    with pytest.raises(TunerError, match="MPS does not keep the memory limit of 4096 MiB"):
        ask(driver, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=4096M", STANDIN_IGNORES_MEMORY_LIMIT="1")


@pytest.mark.parametrize(
    ("setting", "limit"),
    [("0=34000M", 34000 << 20), ("0=2G", 2 << 30), ("1=1G,0=512MB", 512 << 20), ("1=1G", 0), ("", 0), ("0=all", 0)],
)
def test_settings_read_as_mps_reads_them(setting: str, limit: int) -> None:
    assert memory_limit_bytes(setting) == limit


@pytest.mark.parametrize("kept", [True, False])
def test_workers_get_a_limit_from_mps_where_it_is_kept_and_always_one_of_their_own(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    gpu = GpuInfo(0, f"GPU-{uuid.uuid4()}", "NVIDIA H200", "sm_90", 139 << 30, "default", False, "580", "13.0")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    if not kept:
        monkeypatch.setenv("STANDIN_IGNORES_MEMORY_LIMIT", "1")
    probe = (sys.executable, str(STANDIN / "capped_probe.py"))

    async def body() -> None:
        partitions = MpsPartitions(gpu, tmp_path, control=str(STANDIN / "nvidia-cuda-mps-control"), probe=probe)
        await partitions.start()
        try:
            for part in partitions.plan(25):
                assert part.memory_bytes == int((139 << 30) * 0.9 * 0.25)
                assert ("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" in part.env) is kept
            warned = any("MPS does not limit device memory" in line for line in partitions.describe())
            assert warned is not kept
        finally:
            await partitions.stop()
            os.unlink(LOCK_DIRECTORY / f"tuner-{gpu.uuid}.lock")

    asyncio.run(body())
