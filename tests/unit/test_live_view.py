"""What the live view of a sharded job shows, on a recorded terminal."""

from __future__ import annotations

import io

from rich.console import Console

from tuner_client.job import InstanceReport, JobReport, TaskReport
from tuner_client.render.instances import instance_summary
from tuner_client.render.live import LiveProgress
from tuner_core.model import TaskState

REFUSED = "cannot reach a tuner-server at gpu4:50061: connection refused; check host and port"
INSTANCES = (
    InstanceReport("gpu1:50061", "gpu1-ab12", "healthy", 412, 0, 9.6, ("dense", "conv2d_1"), "2 leases, search"),
    InstanceReport("gpu2:50061", "gpu2-0001", "slow", 13, 0, 0.4, ("conv2d_7",), "1 lease, waiting for partitions"),
    InstanceReport("gpu3:50061", "gpu3-77aa", "draining", 101, 0, 3.0, ("pool",), "1 lease, promotion"),
    InstanceReport("gpu4:50061", "gpu4-1212", "dead", 80, 3, reason=REFUSED),
    InstanceReport("gpu5:50061", state="left out", reason="has a NVIDIA L4, the job tunes for NVIDIA H200"),
)


def drawn(instances: tuple[InstanceReport, ...], *, height: int = 30, phase: str = "tuning") -> list[str]:
    """Lines of the view on a terminal 100 characters wide."""
    tasks = tuple(TaskReport(f"t{i}", TaskState.RUNNING, "w", f"operator {i}", trials=i) for i in range(30))
    console = Console(file=io.StringIO(), width=100, height=height, force_terminal=True, color_system=None)
    view = LiveProgress(console)
    view.job(
        JobReport(
            "job-1", "resnet50", "running", tasks=tasks, measured=606, budget=1600, instances=instances, phase=phase
        )
    )
    view.close()
    with console.capture() as captured:
        console.print(view._view)
    return [line.rstrip() for line in captured.get().rstrip().splitlines()]


def line_of(lines: list[str], address: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(address))
    return [part for part in line.split("  ") if part]


def test_every_instance_has_a_line_with_its_state_its_trials_its_rate_and_what_it_does() -> None:
    lines = drawn(INSTANCES)
    assert "606/1,600 trials" in lines[1]
    assert [part.strip() for part in line_of(lines, "gpu1:")] == [
        *("gpu1:50061", "healthy", "412 trials", "9.6/s", "2 leases, search: dense, conv2d_1")
    ]
    assert "24/min" in "".join(line_of(lines, "gpu2:")) and "waiting for partitions: conv2d_7" in lines[3]
    assert "draining" in lines[4] and "promotion: pool" in lines[4]
    assert [part.strip() for part in line_of(lines, "gpu4:")][-1] == "connection refused; check host and port"
    assert line_of(lines, "gpu5:")[-1].strip() == "has a NVIDIA L4, the job tunes for NVIDIA H200"
    assert lines[-1] == "tuning"


def test_the_view_of_many_instances_fits_the_terminal() -> None:
    many = tuple(InstanceReport(f"host{i}:1", state="healthy" if i else "dead", trials=10) for i in range(16))
    lines = drawn(many, height=20)
    assert len(lines) <= 20
    (rest,) = (line for line in lines if line.startswith("and ") and "healthy" in line)
    assert rest.split() == ["and", "9", "more", "90", "trials", "9", "healthy"]
    assert any("operator" in line for line in lines) and lines[-1] == "tuning"


def test_the_end_says_who_measured_what_and_who_took_no_part_and_why() -> None:
    assert instance_summary(INSTANCES) == [
        "gpu1:50061 (gpu1-ab12): 412 trials",
        "gpu2:50061 (gpu2-0001): 13 trials; slow",
        "gpu3:50061 (gpu3-77aa): 101 trials; draining",
        f"gpu4:50061 (gpu4-1212): 80 trials, 3 late results kept but not counted; dead: {REFUSED}",
        "gpu5:50061: left out: has a NVIDIA L4, the job tunes for NVIDIA H200",
    ]
