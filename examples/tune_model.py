"""The Python API in one go: tune a model, look at what was found, let TVM itself apply the records.

    python examples/tune_model.py [MODEL.onnx] [HOST:PORT]

Without a server it starts one on the user's data directory for as long as it needs it.
"""

from __future__ import annotations

import sys

from light_model import light_models

from tuner_client import Client, RecordFilter


def main() -> None:
    """Tune with few trials, then list the best verified records."""
    model = sys.argv[1] if len(sys.argv) > 1 else light_models()["shufflenet"]
    server = sys.argv[2] if len(sys.argv) > 2 else None

    with Client(server) as client:
        report = client.tune(model, trials=128, team="examples")
        print(f"{report.model}: {report.status}, {report.measured} trials in {report.elapsed_s:.0f} s")
        if report.baseline_latency_us and report.tuned_latency_us:
            print(f"whole model {report.baseline_latency_us:.0f} -> {report.tuned_latency_us:.0f} us")
        for task in sorted(report.tasks, key=lambda task: -(task.speedup or 0)):
            if task.speedup:
                print(f"  {task.speedup:5.2f}x  {task.best_latency_us:9.1f} us  {task.description}")

        # Anybody's records, not only this job's: has someone tuned a depthwise convolution for this device already?
        for record in client.query(RecordFilter(op="depthwise_conv2d", verified_only=True), limit=5):
            print(f"{record.median_us:9.1f} us  {record.description}  ({record.model}, {record.sm_count} SMs or cores)")


if __name__ == "__main__":
    main()
