"""What an instance is told of a sharded job."""

from __future__ import annotations

from tests.replay_server import replay_spec
from tuner_client.sharding.driver import spec_for


def test_instances_search_with_different_seeds_and_each_with_the_same_again() -> None:
    spec = replay_spec(1, 10)
    spec.seed = 7
    first, second = spec_for(spec, "gpu1:50061"), spec_for(spec, "gpu2:50061")
    assert first.seed != second.seed
    assert first == spec_for(spec, "gpu1:50061")
    assert spec.seed == 7 and first.tasks == spec.tasks
