"""What the GPU benchmarks make of their figures, and how the whole list is run; no GPU is needed for that."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.process_state import gone, wait_until

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import build_variants
import devices
import gpu_all
from gpu_layouts import convolution, pairs
from gpu_quiet_host import compared, standing_back
from gpu_two_devices import ratios
from model_job import markdown

from tuner_server.gpu.inventory import GpuInfo, Inventory


@pytest.mark.parametrize(
    ("description", "computes"),
    [
        ("conv2d 1x28x28x64 -> 128, 3x3, fp16, NHWC + relu", "conv2d 1x28x28x64 -> 128, 3x3, fp16 + relu"),
        ("conv2d 1x64x28x30 -> 128, 3x3, fp16, NCHW + relu", "conv2d 1x28x30x64 -> 128, 3x3, fp16 + relu"),
        ("depthwise_conv2d 1x8x4x4 -> 8, 3x3, fp16, NCHW", "depthwise_conv2d 1x4x4x8 -> 8, 3x3, fp16"),
        ("dense 1x64 -> 16, fp16", None),
    ],
)
def test_a_convolution_is_recognised_in_either_layout(description: str, computes: str | None) -> None:
    assert convolution(description) == computes


def operator(description: str, baseline_us: float, best_us: float, weight: int = 1) -> dict[str, Any]:
    return {
        "description": description,
        "weight": weight,
        "baseline_latency_us": baseline_us,
        "best_latency_us": best_us,
        "state": "tuned",
        "trials": 8,
    }


def test_convolutions_of_both_layouts_are_paired_the_most_expensive_first() -> None:
    nhwc = [
        operator("conv2d 1x4x4x8 -> 8, 1x1, fp16, NHWC", 10, 5),
        operator("conv2d 1x8x8x4 -> 8, 3x3, fp16, NHWC", 30, 9),
    ]
    nchw = [
        operator("conv2d 1x8x4x4 -> 8, 1x1, fp16, NCHW", 20, 8),
        operator("conv2d 1x4x8x8 -> 8, 3x3, fp16, NCHW", 60, 18),
    ]
    nchw.append(operator("conv2d 1x4x8x8 -> 99, 3x3, fp16, NCHW", 60, 18))
    both = pairs({"NHWC": {"operators": nhwc}, "NCHW": {"operators": nchw}})
    assert [(one["NHWC"]["best_latency_us"], one["NCHW"]["best_latency_us"]) for one in both] == [(9, 18), (5, 8)]


def test_sides_are_compared_by_the_medians_of_their_seeds() -> None:
    def row(side: str, rate: float, model_us: float | None) -> dict[str, Any]:
        of_side = {"side": side, "trials_per_s": rate, "trials_per_s_first_to_last": 2 * rate, "weighted_best_us": 7.0}
        return {**of_side, "model_latency_us": {"baseline": 9.0, "tuned": model_us}}

    rows = [row("one", 10, 100), row("two", 18, 90), row("one", 12, 200), row("two", 26, None), row("one", 11, 300)]
    assert ratios(rows) == {
        "two": {"trials_per_s": 2, "trials_per_s_first_to_last": 2, "model_us": 0.45, "weighted_best_us": 1}
    }


def test_when_neither_one_nor_two_devices_could_be_measured_that_is_said_in_one_line(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_two_devices.py"
    command = [sys.executable, str(script), "--budget-s", "-1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (1, "", [])
    assert done.stderr == "error: no side could be measured: no time left\n"


def test_a_busy_host_is_compared_with_a_quiet_one() -> None:
    quiet = [[10.0, 10.0, 10.0, 10.0], [20.0, 20.0, 20.0, 20.0]]
    busy = [[33.0, 33.0, 33.0, 33.0], [30.0, 30.0, 30.0, 30.0]]
    found = compared(quiet, busy)
    assert (found["tau"], found["regret"], found["spread"]) == (-1, 1, 0)
    assert math.isclose(found["ratio_worst"], 3.3) and math.isclose(found["ratio_median"], 2.4)


def test_every_way_to_build_is_at_every_place_equally_often() -> None:
    orders = [build_variants.rotated(turn) for turn in range(len(build_variants.VARIANTS))]
    for place in zip(*orders, strict=True):
        assert sorted(place) == sorted(build_variants.VARIANTS)


def test_build_processes_in_the_idle_class_are_told_from_others() -> None:
    with subprocess.Popen(["sleep", "60"]) as normal, subprocess.Popen(["sleep", "60"]) as idle:
        try:
            os.sched_setscheduler(idle.pid, os.SCHED_IDLE, os.sched_param(0))
            assert standing_back() == [idle.pid]
        finally:
            normal.kill()
            idle.kill()


@pytest.mark.parametrize(("asked", "uuid"), [("cuda", "GPU-1b"), ("cuda:0", "GPU-0a"), ("cuda:GPU-0", "GPU-0a")])
def test_a_benchmark_uses_one_gpu_the_first_visible_one_if_none_is_named(
    asked: str, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = (
        GpuInfo(1, "GPU-1b", "a GPU", "sm_90", 1 << 30, "default", False, "580", "13.0"),
        GpuInfo(0, "GPU-0a", "a GPU", "sm_90", 1 << 30, "default", False, "580", "13.0"),
    )  # as CUDA_VISIBLE_DEVICES=1,0 shows them
    monkeypatch.setattr(devices, "find_gpus", lambda: Inventory(gpus))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert devices.use_only(asked) == f"cuda:{uuid}"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == uuid
    assert devices.use_only("cpu:0") == "cpu:0"
    with pytest.raises(SystemExit, match="error: cuda:2 names no GPU of this host"):
        devices.use_only("cuda:2")


def test_a_row_without_a_model_latency_or_a_timeline_can_be_shown() -> None:
    row = {
        "model_latency_us": {"baseline": 2000.0, "tuned": None},
        "timeline": {"error": "fewer than two trials"},
        "measuring": {"pauses": {"count": 1, "total_s": 0.5, "longest_s": 0.5}},
        "operators": [operator("dense", 10.0, 5.0)],
        "trials": {"measured": 8, "failed": 0},
        **{"workers": 4, "sm_percent": 25, "sm_count_seen": 32, "outputs_match": None, "layout": "NHWC"},
        **{"elapsed_s": 1.0, "trials_per_s": 8.0},
    }
    text = "\n".join(markdown("a model", row, "a GPU"))
    assert "2.000 ms to not measured (-)" in text and "| dense | 1 | 10.0 | 5.0 | 2.00x | 8 |" in text


def test_a_run_is_ended_at_its_limit_with_all_of_its_processes_and_the_next_one_begins(tmp_path: Path) -> None:
    forks = "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(60)"
    outcome, _ = gpu_all.perform(gpu_all.Run("stuck", (), 1, None, out=""), ("-c", forks), tmp_path, 2.0)
    assert outcome == "ended after its 2 s"
    pids = [int(line) for line in (tmp_path / "stuck.log").read_text().split()]
    assert len(pids) == 2 and wait_until(lambda: all(gone(pid) for pid in pids))
    failing = gpu_all.Run("failing", (), 9, None, out="")
    assert gpu_all.perform(failing, ("-c", "print('why'); raise SystemExit(3)"), tmp_path, 9.0)[0] == "exit code 3"
    assert gpu_all.last_line(tmp_path / "failing.log") == "why"


def test_every_script_of_the_list_exists() -> None:
    for run in gpu_all.RUNS:
        for arguments in (run.arguments, run.rehearsal or ()):
            for script in arguments:
                assert not script.endswith(".py") or (gpu_all.HERE / script).exists(), script
