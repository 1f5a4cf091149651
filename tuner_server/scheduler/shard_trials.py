"""How the trials of a shard's leases are searched and counted. Pure steps of its state machine."""

from __future__ import annotations

from tuner_server.scheduler import messages as m
from tuner_server.scheduler import searching
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.progress import Batch
from tuner_server.scheduler.shard_tasks import Lease, ShardTask


def take_known(shard: ShardTask, known: m.Known, out: list[sm.Instruction]) -> None:
    """The store was looked up; a search that stands learns what is new in it."""
    shard.looking, shard.looked_up = False, True
    task = shard.progress
    if known.baseline is not None and task.baseline_us is None:
        searching.take_baseline(task, known.baseline)
        shard.baseline_trial_id = known.baseline_trial_id
    if known.best_verified is not None:
        task.published, task.published_is_fallback = known.best_verified, known.best_is_fallback
        task.best_trial_id = task.best_trial_id or known.best_trial_id
    seen = shard.own | {trial.trace for trial in task.known}
    new = tuple(trial for trial in known.trials if trial.trace not in seen)
    task.results |= {trial.trace: trial.median_us for trial in new if trial.median_us is not None}
    for trial in known.trials:
        if trial.median_us is None:  # failed, or found to be wrong elsewhere
            task.results.pop(trial.trace, None)
            task.kept.discard(trial.trace)
    task.best_us = min(task.results.values(), default=task.best_us)
    if not new:
        return
    shard.conclusion = None
    task.known += new
    task.reused = len(task.known)
    foreign = {trial.trace for trial in new}
    shard.spare = [trace for trace in shard.spare if trace not in foreign]
    if task.session_open:
        out.append(m.Report(task.index, new))


def ask(shard: ShardTask, lease: Lease, batch_id: int, count: int, out: list[sm.Instruction]) -> None:
    """Begin a batch of a lease: with candidates that nobody measured, if there are any, else with new ones."""
    if not shard.spare:
        lease.asked += count
        searching.ask(shard.progress, batch_id, count, out, lease.token)
        return
    taken, shard.spare = tuple(shard.spare[:count]), shard.spare[count:]
    lease.asked += len(taken)
    shard.progress.batches[batch_id] = Batch(len(taken), lease.token)
    shard.progress.new_trials += len(taken)
    searching.take_candidates(shard.progress, batch_id, taken, out)


def take_candidates(shard: ShardTask, event: m.CandidatesReady, out: list[sm.Instruction]) -> None:
    """Have candidates measured, or keep them for the next lease when theirs is ending."""
    task = shard.progress
    batch = task.batches.get(event.batch)
    if batch is not None and not batch.generated:
        lease = shard.find(batch.lease)
        if lease is not None and not lease.ending:
            lease.asked -= searching.take_candidates(task, event.batch, event.traces, out, more=event.more)
            return
        task.exhausted = task.exhausted or not (batch.come or event.traces)
        searching.complete(task, event.batch, out)
    shard.spare.extend(event.traces)


def cannot_sample(shard: ShardTask, event: m.CannotSample, out: list[sm.Instruction]) -> None:
    """The space holds nothing more."""
    lease = shard.find(shard.progress.batches[event.batch].lease)
    returned = searching.cannot_sample(shard.progress, event, out)
    if lease is not None:
        lease.asked -= returned
        lease.error = shard.progress.error


def session_lost(shard: ShardTask, event: m.SessionLost, out: list[sm.Instruction]) -> bool:
    """The search's process ended. Returns: whether it did so too often, so that another instance had better try."""
    task = shard.progress
    batch = task.batches.get(event.batch) if event.batch is not None else None
    lease = shard.find(batch.lease) if batch is not None else None
    returned = searching.session_lost(task, event, out)
    if lease is not None:
        lease.asked -= returned
    if task.session_losses < searching.MAX_SESSION_LOSSES:
        return False
    task.exhausted, task.session_losses = False, 0
    return True


def take_trial(shard: ShardTask, event: m.TrialMeasured | m.TrialFailed, top_k: int, out: list[sm.Instruction]) -> None:
    """A trial was measured or failed: it counts for its lease, and the client is to know."""
    task = shard.progress
    median_us, failure = None, ""
    if isinstance(event, m.TrialMeasured):
        median_us = event.median_us
    else:
        task.failures[event.kind] += 1
        failure = str(event.kind)
    token = task.batches[event.batch].lease
    lease = shard.find(token)
    if lease is not None:
        lease.measured += 1
    shard.own.add(event.trace)
    shard.conclusion = None
    searching.take_trial(task, event.batch, m.KnownTrial(event.trace, median_us), top_k, out)
    out.append(sm.TellTrial(event.task, token, event.trial_id, median_us, failure))


def take_back(shard: ShardTask, event: m.TrialDropped, out: list[sm.Instruction]) -> None:
    """A trial was abandoned: its candidate is the next lease's."""
    task = shard.progress
    batch = task.batches[event.batch]
    batch.waiting.discard(event.trace)
    task.new_trials -= 1
    shard.spare.append(event.trace)
    lease = shard.find(batch.lease)
    if lease is not None:
        lease.asked -= 1
    searching.report_if_complete(task, event.batch, out)
