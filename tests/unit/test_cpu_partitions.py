"""How cores are divided, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner_core.errors import UsageError
from tuner_core.model import PartitionKind
from tuner_server.partitions import host
from tuner_server.partitions.cpu import CpuPartitions, parse_cores
from tuner_server.partitions.cpu_target import hidden_features
from tuner_server.partitions.host import usable_cores
from tuner_server.processes.spawner import Spawner


def provider(cores: int, tmp_path: Path) -> CpuPartitions:
    return CpuPartitions(Spawner(tmp_path), range(cores))


def test_half_of_two_cores_is_one_core_for_each_of_two_workers(tmp_path: Path) -> None:
    partitions = provider(2, tmp_path).plan(50)
    assert [partition.affinity for partition in partitions] == [(0,), (1,)]
    for partition in partitions:
        assert partition.kind is PartitionKind.CPU
        assert partition.expected_sm_count == 1
        assert partition.env["TVM_NUM_THREADS"] == "1"
        assert partition.env["TVM_BIND_THREADS"] == "0"


@pytest.mark.parametrize(
    ("cores", "sm_percent", "workers", "each"),
    [(2, 100, 1, 2), (16, 25, 4, 4), (16, 30, 3, 4), (3, 50, 2, 1), (2, 10, 2, 1), (1, 50, 1, 1), (64, 100, 1, 64)],
)
def test_as_many_workers_as_fit_unless_told(
    cores: int, sm_percent: int, workers: int, each: int, tmp_path: Path
) -> None:
    device = provider(cores, tmp_path)
    partitions = device.plan(sm_percent)
    assert [partition.expected_sm_count for partition in partitions] == [each] * workers
    taken = [core for partition in partitions for core in partition.affinity]
    assert len(set(taken)) == len(taken) == each * workers
    assert device.plan(sm_percent, 1)[0].expected_sm_count == each


def test_cores_that_no_worker_has_are_for_search_and_build(tmp_path: Path) -> None:
    device = provider(4, tmp_path)
    assert device.spare_cores(device.plan(25, 2)) == [2, 3]
    assert device.spare_cores(device.plan(50)) == []


@pytest.mark.parametrize(
    ("sm_percent", "workers", "message"),
    [
        (0, None, "from 1 to 100, not 0"),
        (101, None, "from 1 to 100, not 101"),
        (50, 0, "at least 1, not 0"),
        (40, 3, r"40 \+ 40 \+ 40 sum to 120 %.*--oversubscribe"),
        (25, 3, r"25 \+ 25 \+ 25 need 3 whole cores, cpu has 2"),
    ],
)
def test_what_the_processor_does_not_have_is_refused(
    sm_percent: int, workers: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        provider(2, tmp_path).plan(sm_percent, workers)


def test_shares_may_differ_from_worker_to_worker(tmp_path: Path) -> None:
    device = provider(8, tmp_path)
    partitions = device.plan_shares([50, 25, 25])
    assert [partition.affinity for partition in partitions] == [(0, 1, 2, 3), (4, 5), (6, 7)]
    assert [partition.expected_sm_count for partition in partitions] == [4, 2, 2]
    assert [partition.env["TVM_NUM_THREADS"] for partition in partitions] == ["4", "2", "2"]
    assert device.spare_cores(device.plan_shares([50, 25])) == [6, 7]


def test_a_share_of_less_than_a_core_is_granted_a_whole_one(tmp_path: Path) -> None:
    partitions = provider(2, tmp_path).plan_shares([50, 25])
    assert [(part.sm_percent, part.expected_sm_count, part.affinity) for part in partitions] == [
        (50, 1, (0,)),
        (25, 1, (1,)),
    ]
    with pytest.raises(UsageError, match=r"50 \+ 25 \+ 25 need 3 whole cores, cpu has 2; .*--oversubscribe"):
        provider(2, tmp_path).plan_shares([50, 25, 25])


def test_oversubscribed_workers_share_cores_and_a_warning_says_what_it_costs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = CpuPartitions(Spawner(tmp_path), range(4), oversubscribe=True)
    partitions = device.plan_shares([50, 50, 50])
    assert [partition.affinity for partition in partitions] == [(0, 1), (2, 3), (0, 1)]
    assert "shares sum to 150 %: workers disturb each other" in caplog.text


@pytest.mark.parametrize(
    ("device", "cores"), [("cpu", None), ("cpu:0", (0,)), ("cpu:0-3", (0, 1, 2, 3)), ("cpu:4,0-1", (0, 1, 4))]
)
def test_cores_are_named_like_those_of_taskset(device: str, cores: tuple[int, ...] | None) -> None:
    assert parse_cores(device) == cores
    for wrong in ("cpu:", "cpu:x", "cpu:3-1"):
        with pytest.raises(UsageError, match="wants cores as in cpu:0-3"):
            parse_cores(wrong)


def test_only_the_cores_left_to_this_process_are_divided() -> None:
    core = max(os.sched_getaffinity(0))
    code = f"""
import os
os.sched_setaffinity(0, [{core}])
from tuner_server.partitions.host import usable_cores
print(usable_cores())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"({core},)"


def test_the_quota_of_a_control_group_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_control_groups", lambda _controller: [tmp_path])
    everything = len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert len(usable_cores()) == everything
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert len(usable_cores()) == 1
    (tmp_path / "cpu.max").write_text("20000 100000\n")
    assert len(usable_cores()) == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert len(usable_cores()) == 1


def test_instruction_sets_that_a_hypervisor_hides_are_taken_from_the_target() -> None:
    named = ["avx2", "avx512bf16", "avx512vl", "fma", "sse4.2", "bmi2"]
    assert hidden_features(named, frozenset({"avx2", "avx512_bf16", "avx512vl", "fma"})) == []
    assert hidden_features(named, frozenset({"avx2", "fma"})) == ["avx512bf16", "avx512vl"]
    assert hidden_features(named, frozenset()) == []


def test_the_device_is_named_as_the_kernel_names_it(tmp_path: Path) -> None:
    device = provider(2, tmp_path).device
    assert device.kind == "cpu" and device.sm_count == 2
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {" ".join(line.partition(":")[2].split()) for line in lines if line.startswith("model name")}
    assert device.model in names or not names
