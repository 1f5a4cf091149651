"""What a session saves: GPU schedules that are not applied in vain, candidates that are not built twice."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.integration.small_workloads import LLVM, matmul
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_server.search.messages import KnownTrial, SearchSettings

CUDA = (
    '{"kind":"cuda","arch":"sm_90","max_threads_per_block":1024,'
    '"max_shared_memory_per_block":49152,"thread_warp_size":32}'
)


@pytest.fixture(scope="module", autouse=True)
def tvm() -> None:
    load_tvm(intrinsics=True)


def test_few_gpu_schedules_are_applied_in_vain() -> None:
    from tuner_server.search.session import SearchSession

    session = SearchSession(matmul(512).body, CUDA, SearchSettings(), seed=1)
    traces = session.generate(24) + session.generate(24)
    assert len(traces) == 48
    # without arithmetic it is 40 rejections for each valid sample
    assert session.rejections.get("VerifyGPUCode", 0) <= len(traces) // 10


@pytest.mark.parametrize("target_json", [LLVM, CUDA], ids=["cpu", "cuda"])
def test_siblings_are_twins_when_their_limits_of_unrolling_change_nothing(target_json: str) -> None:
    import json
    import random

    import tvm_ffi
    from tvm.target import Target

    from tuner_core.compiler.lowering import lower
    from tuner_server.search.sketches import Applied, Sketches
    from tuner_server.search.twins import Twins

    target = Target(json.loads(target_json))
    sketches = Sketches(matmul(32).body, target_json, seed=1)
    twins, rng = Twins(target), random.Random(2)
    space = next(space for space in sketches.spaces if space.fixed_extents)
    base = sketches.bases[space.index]
    assert base is not None
    (unroll,) = [index for index, knob in enumerate(space.knobs) if knob.kind == "unroll"]
    found: Counter[bool] = Counter()
    for _ in range(3):
        point = space.redraw(base, rng)
        while not sketches.allows(space, point):
            point = space.redraw(base, rng)
        codes = set()
        for option in space.knobs[unroll].options:
            sibling = (*point[:unroll], option, *point[unroll + 1 :])
            applied = sketches.apply(space, sibling, 1)
            assert isinstance(applied, Applied)
            with target:
                host, devices, _ = lower(applied.module, target)
            code = tuple(tvm_ffi.structural_hash(part) for part in (host, *devices.values()))
            is_twin = twins.has(space, sibling, applied.module)
            assert is_twin == (code in codes)
            assert not codes or twins.has(space, sibling) == is_twin  # also without having been applied
            found[is_twin] += 1
            codes.add(code)
            if not is_twin:
                twins.add(space, sibling)
    assert found[True] and found[False]


def test_a_session_returns_no_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    import tvm_ffi
    from tvm.target import Target

    from tuner_core.compiler.lowering import lower
    from tuner_core.compiler.trace import apply_trace
    from tuner_core.compiler.workload import module_from_body
    from tuner_server.search.session import SearchSession
    from tuner_server.search.twins import Twins

    workload, target = matmul(32), Target(json.loads(CUDA))

    def codes() -> list[int]:
        session = SearchSession(workload.body, CUDA, SearchSettings(epsilon=0.0), seed=1)
        found = []
        for _ in range(3):
            traces = session.generate(16)
            session.report([KnownTrial(trace, 100.0 + len(trace) % 7) for trace in traces])
            for trace in traces:
                with target:
                    _, devices, _ = lower(apply_trace(module_from_body(workload.body), trace).mod, target)
                found += [tvm_ffi.structural_hash(device) for device in devices.values()]
        return found

    with_them = codes()
    assert len(set(with_them)) == len(with_them) == 48
    monkeypatch.setattr(Twins, "has", lambda *_arguments, **_more: False)
    without = codes()
    assert len(set(without)) < len(without)  # this search would come upon some


@pytest.mark.parametrize("target", [LLVM, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("source", ["its process", "records"])
def test_a_task_starts_where_its_siblings_have_been(target: str, source: str) -> None:
    import json

    from tuner_server.search.experience import Experience
    from tuner_server.search.messages import Lesson
    from tuner_server.search.session import SearchSession

    def cost(trace: str) -> float:  # the innermost factor of the columns, as vector code has it
        return 100.0 / json.loads(trace)[1][1][1][-1]

    experience = Experience()
    first = SearchSession(matmul(64).body, target, SearchSettings(), 1, experience=experience)
    trials = []
    for _ in range(3):
        batch = [KnownTrial(trace, cost(trace)) for trace in first.generate(16)]
        first.report(batch)
        trials += batch
    if source == "records":
        experience = Experience()
        past = [Lesson(f"past {number % 8}", trial.trace, trial.median_us) for number, trial in enumerate(trials)]
        assert experience.learn(past) == len(trials)
    settings = SearchSettings(random_share=0.1)
    alone = SearchSession(matmul(128).body, target, settings, 1).generate(16)
    taught = SearchSession(matmul(128).body, target, settings, 1, experience=experience).generate(16)
    assert sum(map(cost, taught)) < 0.6 * sum(map(cost, alone))


def test_a_task_begins_with_random_schedules_beside_those_that_its_siblings_suggest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tuner_server.search.experience import Experience
    from tuner_server.search.session import SearchSession

    experience = Experience()
    sibling = SearchSession(matmul(64).body, LLVM, SearchSettings(), 1, experience=experience)
    for _ in range(2):
        sibling.report([KnownTrial(trace, 100.0 + len(trace) % 7) for trace in sibling.generate(16)])
    session = SearchSession(matmul(128).body, LLVM, SearchSettings(epsilon=0.0), 1, experience=experience)
    drawn = []
    random_point = SearchSession._random_point
    monkeypatch.setattr(SearchSession, "_random_point", lambda self: drawn.append(1) or random_point(self))
    first = session.generate(16)
    assert 4 <= len(drawn) <= 12
    session.report([KnownTrial(trace, 100.0 + len(trace) % 7) for trace in first])
    drawn.clear()
    session.generate(16)
    assert not drawn


def test_schedules_that_were_good_at_another_share_are_proposed_first() -> None:
    from tuner_server.search.session import SearchSession

    half = LLVM.replace('"num-cores":2', '"num-cores":1')
    assert half != LLVM
    elsewhere = SearchSession(matmul().body, half, SearchSettings(), seed=1)
    good = elsewhere.generate(6)
    session = SearchSession(matmul().body, LLVM, SearchSettings(), seed=9, seeds=[*good, good[0], "not a trace"])
    located = [elsewhere._locate(trace) for trace in good]
    proposed = session.generate(16)
    again = [session._locate(trace) for trace in proposed[:6]]
    assert [point for _, point in filter(None, again)] == [point for _, point in filter(None, located)]
    assert len(set(proposed)) == 16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arithmetic_refuses_what_tvm_refuses_and_nothing_else(dtype: str) -> None:
    import random

    from tests.integration.compiler_operators import conv, heaviest
    from tests.integration.test_cuda_search import H200
    from tuner_server.search.sketches import Applied, Sketches

    layout = {"data_layout": "NHWC", "kernel_layout": "OHWI"} if dtype == "float16" else {}
    shapes = ((1, 28, 28, 64), (64, 3, 3, 64)) if layout else ((1, 64, 28, 28), (64, 64, 3, 3))
    task = heaviest(lambda op, x, w: conv(op, x, w, padding=(1, 1), **layout), *shapes, dtype=dtype, target=H200)
    sketches = Sketches(task.workload.body, H200, seed=1)
    rng = random.Random(1)
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for space, base in zip(sketches.spaces, sketches.bases, strict=True):
        assert base is not None
        for allowed in (True, False):
            for _ in range(6):
                point = space.redraw(base, rng)
                while sketches.allows(space, point) is not allowed:
                    point = space.redraw(base, rng)
                outcomes[allowed, isinstance(sketches.apply(space, point, 1), Applied)] += 1
    of_memory = outcomes[False, False] + outcomes[False, True]
    assert of_memory == 6 * len(sketches.spaces)
    assert outcomes[False, True] <= outcomes[False, False] // 8  # too many registers: TVM would take them
    assert outcomes[True, True] >= 5 * outcomes[True, False], outcomes


def test_a_batch_in_pieces_is_the_batch_in_one() -> None:
    from tuner_server.search.session import SearchSession

    whole, pieces = (SearchSession(matmul(32).body, LLVM, SearchSettings(), seed=3) for _ in range(2))
    first = whole.generate(16)
    assert pieces.generate(10, following=6) + pieces.generate(6, continued=True) == first
    for session in (whole, pieces):
        session.report([KnownTrial(trace, 10.0 + n) for n, trace in enumerate(first)])
    ranked = whole.generate(12)
    got = pieces.generate(4, following=8) + pieces.generate(4, 4, continued=True) + pieces.generate(4, continued=True)
    assert got == ranked, "ranked once, when the first are asked for"
