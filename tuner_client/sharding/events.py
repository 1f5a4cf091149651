"""What an instance says of its shard, as events of the lease state machine. Pure."""

from __future__ import annotations

from tuner_core.leases import messages as m
from tuner_core.proto.tuner.v1 import leases_pb2 as pb


def event_of(response: pb.WatchShardResponse, instance: str, now_s: float) -> m.Event | None:
    """The event, or None for one that this client does not know.

    Args:
        response: What was said.
        instance: Who said it.
        now_s: When it was heard.
    """
    match response.WhichOneof("event"):
        case "heartbeat":
            return m.Heard(now_s, instance, response.heartbeat.draining)
        case "baseline":
            base = response.baseline
            latency_us = base.latency_us if base.HasField("latency_us") else None
            return m.BaselineMeasured(now_s, instance, base.task, base.token, latency_us, base.trial_id, base.error)
        case "trial":
            trial = response.trial
            latency_us = trial.latency_us if trial.HasField("latency_us") else None
            return m.TrialFinished(now_s, instance, trial.task, trial.token, trial.trial_id, latency_us, trial.failure)
        case "ended":
            end = response.ended
            return m.LeaseEnded(
                now_s,
                instance,
                end.task,
                end.token,
                end.reason,
                end.verified,
                end.best_latency_us if end.HasField("best_latency_us") else None,
                end.best_trial_id,
                end.fallback,
                end.error,
                end.baseline_latency_us if end.HasField("baseline_latency_us") else None,
                end.holder,
                end.reused,
            )
    return None
