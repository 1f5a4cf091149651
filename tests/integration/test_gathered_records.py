"""What a client gathers of an operator before it begins: real stores, a real record service."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.contract.conftest import serving
from tests.contract.record_values import make_record, make_workload
from tuner_client.sharding.gathering import Gatherer
from tuner_client.sharding.link import InstanceLink
from tuner_core.model import FailureKind, Record
from tuner_core.store.interface import RecordStore
from tuner_core.store.open import open_store
from tuner_core.transport.options import ConnectionOptions

CONV = make_workload("conv", "conv2d")
PUBLISHED = make_record(CONV, 3, median_us=900.0, verified=True)
FAILED = make_record(CONV, 999, failure=FailureKind.RUN_ERROR)


def fetched(
    directory: Path, records: Sequence[Record], most: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[RecordStore, Counter[str]]:
    """The client's store afterwards, and what the instance's was asked."""
    theirs, own = open_store(f"sqlite:///{directory / 'theirs.db'}"), open_store(f"sqlite:///{directory / 'own.db'}")
    theirs.commit(records, [CONV])
    own.commit([], [CONV])
    asked: Counter[str] = Counter()
    for name in ("top", "query"):
        call = getattr(theirs, name)

        def counted(*arguments: object, _call: object = call, _name: str = name, **more: object) -> object:
            asked[_name] += 1
            return _call(*arguments, **more)  # type: ignore[operator]

        monkeypatch.setattr(theirs, name, counted)

    async def fetch(address: str) -> None:
        link = InstanceLink(ConnectionOptions(address))
        link.facts = SimpleNamespace(store="sqlite://")  # type: ignore[assignment]
        await Gatherer(own, "sqlite://", "job").fetch(link, PUBLISHED.key, most)
        await link.connection.close()

    with serving(theirs) as address:
        asyncio.run(fetch(address))
    theirs.close()
    return own, asked


def test_one_query_brings_all_that_is_known_of_an_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [make_record(CONV, number) for number in range(30)]
    own, asked = fetched(tmp_path, [*trials, PUBLISHED, FAILED], 8, monkeypatch)
    assert own.stats()["records"] == 32 == 2 * 8 + 16 and own.get(PUBLISHED.trial_id) and own.get(FAILED.trial_id)
    assert asked == {"query": 1}


def test_the_published_record_comes_though_many_trials_seem_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [make_record(CONV, number) for number in range(200)]
    own, asked = fetched(tmp_path, [*trials, PUBLISHED], 8, monkeypatch)
    assert own.top(PUBLISHED.key, 1, verified_only=True) == [PUBLISHED]
    assert own.stats()["records"] == 2 * 8 + 16 + 1
    assert asked == {"query": 1, "top": 1}
