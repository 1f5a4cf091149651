"""What measuring has cost, as counted by a server and shown by the client."""

from __future__ import annotations

from tuner_client.render.measuring import measuring_document, measuring_line
from tuner_core.proto.tuner.v1 import host_pb2
from tuner_server.measure.metrics import FleetMetrics
from tuner_server.services.host import measuring_message


def test_every_count_reaches_the_client() -> None:
    metrics = FleetMetrics(pause_bound_s=20.0)
    assert measuring_line(measuring_message(metrics.facts())) == "", "nothing has happened yet"
    for seconds in (0.5, 1.5, 0.25):
        metrics.paused(seconds)
    metrics.fault("run_error")
    metrics.fault("run_error")
    metrics.fault("run_timeout")
    for _ in range(5):
        metrics.restarted()
    metrics.recovered(0.7)
    metrics.voided(3)
    sent = host_pb2.Measuring.FromString(measuring_message(metrics.facts()).SerializeToString())
    assert measuring_document(sent) == {
        "pauses": {"count": 3, "last_s": 0.25, "longest_s": 1.5, "total_s": 2.25},
        "pause_bound_s": 20.0,
        "recoveries": {"count": 1, "last_s": 0.7, "longest_s": 0.7, "total_s": 0.7},
        "worker_restarts": 5,
        "voided_measurements": 3,
        "faults": {"run_error": 2, "run_timeout": 1},
    }
    assert measuring_line(sent) == (
        "3 pauses for exclusive measurement, 2.25 s in all (last 0.25 s, longest 1.50 s of 20 s allowed); "
        "faults: run_error 2, run_timeout 1; 5 workers restarted, all back within 0.70 s; 3 measurements made again"
    )
