"""Two teams ask for one model at once, on servers of their own that share a Redis: every operator is tuned once.

One of them submits its job to its server, the other leads its own, as over several servers: each waits for the other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from tests.integration.client_process import start_client
from tests.integration.server_process import server
from tests.integration.tiny_models import write_tiny_cnn
from tests.redis_server import DURABLE
from tests.redis_server import running as running_redis
from tuner_core.model import Origin
from tuner_core.store.interface import RecordFilter
from tuner_core.store.open import open_store

TRIALS = 16


def test_two_teams_that_ask_at_once_tune_every_operator_once_and_both_get_it(tmp_path: Path) -> None:
    model = tmp_path / "tiny.onnx"
    write_tiny_cnn(model)
    with (
        running_redis(tmp_path / "redis", *DURABLE) as redis,
        server(tmp_path / "a", "--store", redis.url) as first,
        server(tmp_path / "b", "--store", redis.url) as second,
    ):
        clients = [
            start_client(
                *("tune", str(model), "--trials", str(TRIALS), "--server", running.address, "--team", team, "--json"),
                *more,
                data_dir=tmp_path,
            )
            for running, team, more in ((first, "red", ()), (second, "blue", ("--wait", "60")))
        ]
        documents = []
        for process in clients:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            documents.append(json.loads(out))
        store = open_store(redis.url)
        records = store.query(RecordFilter(include_failed=True), limit=10_000).records
        store.close()
    jobs_of_operator = defaultdict(set)
    for record in records:
        if record.origin is Origin.SEARCH and not record.verified:
            jobs_of_operator[record.workload_digest].add(record.job)
    assert jobs_of_operator
    assert all(len(jobs) == 1 for jobs in jobs_of_operator.values()), jobs_of_operator
    assert sum(document["trials"]["measured"] for document in documents) <= TRIALS + 8
    for digest in jobs_of_operator:  # one of them measured it, the other did not
        measured = [
            task["trials"] for document in documents for task in document["tasks"] if task["workload"] == digest
        ]
        assert sorted(count > 0 for count in measured) == [False, True]
    tuned = [{task["workload"]: task["best_latency_us"] for task in document["tasks"]} for document in documents]
    assert all(tuned[0][digest] == tuned[1][digest] for digest in jobs_of_operator)
