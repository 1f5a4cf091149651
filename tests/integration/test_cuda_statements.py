"""What is refused for its statements has too many: the count from the decisions against the generated source."""

from __future__ import annotations

import json
import random

import pytest

from tests.integration.small_workloads import matmul
from tests.integration.test_cuda_lowering import source_of
from tests.integration.test_cuda_search import H200
from tests.unit.test_cuda_build import needs_nvrtc
from tuner_core.compiler.cuda_build import MAX_STATEMENTS
from tuner_core.compiler.tvm_setup import load_tvm

POINTS = 4


@needs_nvrtc
def test_kernels_have_the_statements_that_are_counted_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    load_tvm(intrinsics=True)
    from tvm.target import Target

    from tuner_core.compiler.lowering import lower
    from tuner_server.search.sketches import Applied, Sketches
    from tuner_server.search.statements import StatementLimits

    target, sketches, rng = Target(json.loads(H200)), Sketches(matmul(512).body, H200, seed=1), random.Random(1)
    counts = {
        space.index: limit.at_least
        for space, limits in zip(sketches.spaces, sketches._limits, strict=True)
        for limit in limits
        if isinstance(limit, StatementLimits)
    }
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(StatementLimits, "allow", lambda *_: True)
        while len(seen) < 1000:
            space = rng.choice(sketches.spaces)
            base = sketches.bases[space.index]
            assert base is not None
            drawn = space.redraw(base, rng)
            if sketches.allows(space, drawn):
                seen.append((counts[space.index](drawn), space, drawn))
    largest = sorted(seen, key=lambda one: one[0], reverse=True)
    refused = [one for one in largest if not sketches.allows(*one[1:])]
    assert refused
    assert largest[: len(refused)] == refused
    compared = 0
    for counted, space, drawn in [*refused[-POINTS:], *largest[len(refused) :][:POINTS]]:
        applied = sketches.apply(space, drawn, seed=1)
        if not isinstance(applied, Applied):
            continue
        compared += 1
        with target:
            _, devices, _ = lower(applied.module, target)
            statements = source_of(devices).count(";")
        assert counted <= statements
        assert counted <= MAX_STATEMENTS or statements > MAX_STATEMENTS
    assert compared >= POINTS
