"""What the benchmark reads out of a trace: busy shares between the first and the last trial, pauses left out."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "benchmarks" / "timeline.py"
SPEC = importlib.util.spec_from_file_location("benchmark_timeline", SOURCE)
assert SPEC is not None and SPEC.loader is not None
benchmark: Any = importlib.util.module_from_spec(SPEC)
sys.modules["benchmark_timeline"] = benchmark
SPEC.loader.exec_module(benchmark)


def worker(stage: str, name: str, *slices: tuple[float, float], what: str = "", cpu_s: float = 0.0) -> Any:
    return benchmark.Worker(stage, name, [(begin, end, what or stage, {"cpu_s": cpu_s}) for begin, end in slices])


def test_a_stage_is_busy_for_the_mean_of_its_workers_between_the_first_and_the_last_trial() -> None:
    figures = benchmark.analyse(
        [
            worker("measure", "measure-0", (90, 100), (150, 160), (190, 200)),
            worker("build", "build-0", (0, 150), cpu_s=1.5),
            worker("build", "build-1", (50, 125), (150, 300), cpu_s=0.75),
        ],
        {"waiting to be built": [(0, 2), (150, 4)]},
        3.0,
    )
    assert figures.trials == 3
    assert figures.stages["build"].workers == {"build-0": 0.5, "build-1": 0.75}
    assert figures.stages["build"].busy == 0.625
    assert figures.stages["measure"].busy == pytest.approx(0.2)
    assert figures.bottleneck == "build"
    assert figures.waiting == {"waiting to be built": 3.0}
    assert figures.cpu_s_per_trial == {"build": 1.0, "server": 1.0}


def test_what_a_trial_costs_a_worker_beside_the_candidate_is_the_rest_of_its_slice() -> None:
    measured = benchmark.Worker(
        "measure",
        "measure-0",
        [
            (0.0, 40_000.0, "measure", {"device_s": 0.037}),
            (50_000.0, 92_000.0, "measure", {"device_s": 0.040}),
            (100_000.0, 190_000.0, "measure", {"device_s": 0.040}),  # which loaded large arguments
            (200_000.0, 900_000.0, "check", {}),
        ],
    )
    assert benchmark.analyse([measured], {}, None).overhead_ms == pytest.approx(3.0)
    untold = worker("measure", "measure-0", (0, 10), (20, 30))
    assert benchmark.analyse([untold], {}, None).overhead_ms is None


def test_a_process_that_works_in_the_place_of_another_makes_a_stage_no_less_busy() -> None:
    figures = benchmark.analyse(
        [
            worker("measure", "measure-0", (90, 100), (190, 200)),
            worker("build", "build-0", (0, 150), (170, 200)),
            worker("build", "build-1", (0, 120)),
            worker("build", "build-2", (120, 200)),  # which has replaced it
            worker("build", "reference", (150, 170)),  # while build-0 waits
        ],
        {},
        None,
    )
    assert figures.stages["build"].busy == pytest.approx(1.0)


def test_partitions_that_promote_one_at_a_time_are_busy_for_their_mean() -> None:
    figures = benchmark.analyse(
        [
            worker("measure", "measure-0", (0, 100), (199, 200)),
            worker("measure", "measure-1", (0, 100), (100, 109), (199, 200)),
            worker("promotion", "measure-0", (109, 149), what="measure"),
        ],
        {},
        None,
    )
    assert figures.partitions_busy == pytest.approx((1 + 10 + 40) / 200)


def test_a_trace_that_a_killed_server_left_without_its_last_bracket_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('[\n{"ph":"M","name":"process_name","pid":1,"args":{"name":"build"}}   ')
    assert benchmark.read(path) == ([], {}, None)


def test_while_search_and_build_are_stopped_they_are_neither_busy_nor_idle() -> None:
    figures = benchmark.analyse(
        [
            worker("measure", "measure-0", (0, 100), (100, 140), (190, 200)),
            worker("build", "build-0", (50, 165)),
            worker("pause", "search and build", (0, 140), (180, 200)),
        ],
        {},
        None,
    )
    # of the 100 to 200, 40 are left: 140 to 180, and it built until 165
    assert figures.stages["build"].busy == pytest.approx(25 / 40)


def test_partitions_are_busy_with_measuring_and_with_promotion() -> None:
    figures = benchmark.analyse(
        [
            worker("measure", "measure-0", (0, 100), (100, 150), (199, 200)),
            worker("promotion", "measure-0", (150, 175), what="measure"),
            worker("measure", "target", (0, 1), what="target"),
        ],
        {},
        None,
    )
    assert figures.partitions_busy == pytest.approx(0.76)
    assert "target" not in figures.stages["measure"].workers


def test_a_trace_without_trials_says_so() -> None:
    with pytest.raises(ValueError, match="fewer than two trials"):
        benchmark.analyse([worker("build", "build-0", (0, 1))], {}, None)


def test_the_picture_has_a_row_for_every_worker() -> None:
    drawn = benchmark.picture([worker("measure", "measure-0", (0, 5e6)), worker("build", "build-0", (0, 2e6))], "a < b")
    root = ET.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "measure-0 (measure)", "build-0 (build)"} <= set(texts)
