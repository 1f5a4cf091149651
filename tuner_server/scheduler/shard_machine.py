"""The scheduler of a shard as a pure state machine: a job whose trial budget comes from outside, as leases.

Nothing is searched until a lease grants trials of a task. With a task's first lease the store is looked up, so that the
search starts from what other instances have measured, and the baseline is measured. A lease gets exactly as many new
trials as it allows, as many in flight as two batches hold while some remain; then it ends, and its search waits for the
next one. A lease that is revoked, expires or meets a draining instance asks for nothing more, finishes what is built or
measured, and ends. Candidates that nobody measured are the first ones of the task's next lease.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tuner_core.errors import ConflictError
from tuner_core.model import JobState, TaskState
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import promotion, searching, shard_trials
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.progress import Limits, TaskPlan, TaskProgress
from tuner_server.scheduler.shard_tasks import Lease, ShardTask


class ShardMachine:
    """State of one shard.

    Args:
        tasks: The job's tasks.
        lease_s: How long a lease lasts without renewal.
        tokens: Newest token seen of each task before a restart, by its index.
    """

    def __init__(self, tasks: Sequence[TaskPlan], lease_s: float, tokens: Mapping[int, int] | None = None) -> None:
        self.tasks = [TaskProgress(index, plan) for index, plan in enumerate(tasks)]
        self.lease_s = lease_s
        self.limits = Limits()
        self.draining = False
        self.finished: m.Finish | None = None
        self.model: m.ModelMeasured | None = None
        self.shards = [ShardTask(task, token=(tokens or {}).get(task.index, 0)) for task in self.tasks]
        self._now_s = 0.0
        self._lane_open = False
        self._batch_ids = itertools.count()
        self._served = itertools.count(1)

    # Facts

    @property
    def phase(self) -> str:
        """What the shard is doing, for people."""
        leases = sum(len(shard.leases) for shard in self.shards)
        if not leases:
            return "no lease here now"
        count = "1 lease" if leases == 1 else f"{leases} leases"
        if not self._lane_open:
            return f"{count}, waiting for partitions"
        if any(task.promoting for task in self.tasks):
            return f"{count}, promotion"
        return f"{count}, search" if self.in_flight else count

    @property
    def in_flight(self) -> int:
        """Trials that are being searched, built or measured."""
        return sum(task.outstanding for task in self.tasks)

    @property
    def busy(self) -> bool:
        """Whether the shard needs partitions."""
        return any(shard.working for shard in self.shards)

    def finish(self, state: JobState) -> None:
        """The shard is closed or cancelled; its leases have ended."""
        self.finished = m.Finish(state)

    # Leases

    def check(self, index: int, token: int, trials: int) -> bool:
        """Whether a grant would start a new lease (rather than extend one).

        Raises:
            UsageError, ConflictError: It would be refused.
        """
        if self.draining:
            raise ConflictError("this instance is draining and takes no leases; use another")
        self.shards[index].check(token, trials)
        return token > self.shards[index].token

    def grant(
        self,
        index: int,
        token: int,
        trials: int,
        conclude: bool,
        now_s: float,
        *,
        claim: bool = False,
        take_over: bool = False,
    ) -> list[sm.Instruction]:
        """Start a lease or extend it.

        Args:
            index: The task.
            token: Fencing token.
            trials: New trials that the lease allows in all.
            conclude: Whether to promote the task's best at the end.
            now_s: On a clock that does not go back.
            claim: Whether the task must be claimed for the job first.
            take_over: Whether what another job has published ends the lease.

        Raises:
            UsageError, ConflictError: See :meth:`check`.
        """
        new = self.check(index, token, trials)
        out: list[sm.Instruction] = []
        self._now_s = max(self._now_s, now_s)
        shard = self.shards[index]
        if new:
            if shard.lease is not None:
                self._wind_down(shard, shard.lease, "revoked", out)
            if token != shard.token + 1:  # leased elsewhere in between: its records may have come here since
                shard.looked_up = False
            shard.token = token
            shard.lease = Lease(token, trials, conclude, 0.0, claim=claim, take_over=take_over)
            shard.progress.session_losses = 0
            shard.progress.error = ""
            if shard.progress.baseline_us is None:
                shard.baseline_error = ""
        assert shard.lease is not None
        shard.lease.trials = max(shard.lease.trials, trials)
        shard.lease.conclude |= conclude
        shard.lease.claim |= claim
        shard.lease.deadline_s = self._now_s + self.lease_s
        self._advance(out)
        return out

    def renew(self, leases: Sequence[tuple[int, int]], now_s: float) -> list[int]:
        """Move deadlines.

        Args:
            leases: Task and token of each.
            now_s: On a clock that does not go back.

        Returns:
            Tasks whose lease is unknown or has been over for ``lease_s``; before that, its end is on the way.
        """
        self._now_s = max(self._now_s, now_s)
        lost = []
        for index, token in leases:
            shard = self.shards[index]
            lease = shard.find(token)
            if lease is not None:
                lease.deadline_s = self._now_s + self.lease_s
            elif self._now_s - shard.ended_at_s.get(token, float("-inf")) > self.lease_s:
                lost.append(index)
        return lost

    # Events

    def handle(self, event: sm.Event) -> list[sm.Instruction]:
        """Take in one event; what is to be done now comes out."""
        out: list[sm.Instruction] = []
        match event:
            case sm.LaneOpened():
                self._lane_open, self.limits = True, event.limits
            case sm.LaneClosed():
                self._lane_open = False
                for shard in self.shards:
                    shard.claimed = False
            case sm.ClaimAnswered():
                self._claim_answered(self.shards[event.task], event, out)
            case sm.ClaimLost():
                self.shards[event.task].claimed = False
            case sm.KnownFound():
                shard_trials.take_known(self.shards[event.task], event.known, out)
            case sm.LeaseRevoked():
                shard = self.shards[event.task]
                if shard.lease is not None and shard.lease.token == event.token:
                    self._wind_down(shard, shard.lease, "revoked", out)
            case sm.AllRevoked():
                self._end_all(event.reason, out)
            case sm.Stopped():
                self._stop(event, out)
            case sm.Tick():
                self._now_s = max(self._now_s, event.now_s)
                for shard in self.shards:
                    if shard.lease is not None and self._now_s > shard.lease.deadline_s:
                        self._wind_down(shard, shard.lease, "expired", out)
            case m.BaselineMeasured():
                shard = self.shards[event.task]
                shard.baseline_asked = False
                shard.baseline_trial_id = event.trial_id
                searching.take_baseline(shard.progress, m.KnownTrial(event.trace, event.median_us))
            case m.BaselineFailed():
                shard = self.shards[event.task]
                shard.baseline_asked = False
                shard.baseline_error = f"the fallback schedule failed: {event.message}"
            case m.CandidatesReady():
                shard_trials.take_candidates(self.shards[event.task], event, out)
            case m.CannotSample():
                shard_trials.cannot_sample(self.shards[event.task], event, out)
            case m.SessionLost():
                self._session_lost(self.shards[event.task], event, out)
            case m.TrialMeasured() | m.TrialFailed():
                shard_trials.take_trial(self.shards[event.task], event, self.limits.top_k, out)
            case m.TrialDropped():
                shard_trials.take_back(self.shards[event.task], event, out)
            case m.Promoted():
                promotion.take_promoted(self.tasks[event.task], event, out)
            case m.Checked():
                promotion.take_checked(self.tasks[event.task], event, out)
        self._advance(out)
        return out

    # Claims

    def _claim_answered(self, shard: ShardTask, event: sm.ClaimAnswered, out: list[sm.Instruction]) -> None:
        shard.claiming = False
        lease = shard.lease
        if lease is None or not lease.claim:  # it ended meanwhile
            return
        if event.holder:
            lease.holder = event.holder
            self._wind_down(shard, lease, "held", out)
            return
        shard.claimed = True
        shard.looked_up = shard.looked_up and not event.fresh

    # Search

    def _session_lost(self, shard: ShardTask, event: m.SessionLost, out: list[sm.Instruction]) -> None:
        if shard_trials.session_lost(shard, event, out) and shard.lease is not None:
            shard.lease.error = shard.progress.error
            self._wind_down(shard, shard.lease, "failed", out)

    def _fill(self, out: list[sm.Instruction]) -> None:
        """Ask for batches: of the leases with trials left, those with fewest in flight first, then who waits longest.

        As much is in flight as for a job of this server's own with as many tasks as are searched here, by candidates as
        there: up to twice as much of a task where the stages have little to do.
        """
        searched = sum(shard.lease is not None and shard.lease.trials > 0 for shard in self.shards)
        limits = self.limits.for_tasks(searched)
        everything = limits.batch * limits.batches_at_once
        while (in_flight := self.in_flight) < everything:
            each = limits.batch * limits.batches_per_task * (2 if limits.little(in_flight) else 1)
            ready = []
            for index, shard in enumerate(self.shards):
                if not shard.wants_trials:
                    continue
                # leases come one after the other: the first of them does not make this a job of one task
                batch = limits.batch if shard.progress.measured else self.limits.batch
                outstanding = shard.progress.outstanding
                # what is left of a lease waits for the room of a whole batch: it may be extended until then
                if outstanding + batch <= each and in_flight + batch <= everything:
                    ready.append((outstanding, shard.served, index, batch))
            if not ready:
                return
            _, _, index, batch = min(ready)
            shard = self.shards[index]
            assert shard.lease is not None
            shard.served = next(self._served)
            shard.progress.state = TaskState.RUNNING
            count = min(batch, shard.lease.remaining)
            shard_trials.ask(shard, shard.lease, next(self._batch_ids), count, out)

    # Ends

    def _wind_down(self, shard: ShardTask, lease: Lease, reason: str, out: list[sm.Instruction]) -> None:
        """Let a lease end as soon as what is built or being measured is done; a promotion goes on to its end."""
        if shard.lease is lease:
            shard.lease = None
        shard.claimed = False  # the task goes elsewhere: whoever gets it claims it in the job's name
        lease.ending = reason
        shard.winding_down[lease.token] = lease
        for number, batch in shard.progress.batches.items():
            if batch.lease == lease.token and batch.waiting:
                out.append(m.Abandon(shard.progress.index, number, tuple(sorted(batch.waiting))))

    def _end_all(self, reason: str, out: list[sm.Instruction]) -> None:
        self.draining = self.draining or reason == "draining"
        for shard in self.shards:
            if shard.lease is not None and not shard.lease.promoting:
                self._wind_down(shard, shard.lease, reason, out)

    def _stop(self, event: sm.Stopped, out: list[sm.Instruction]) -> None:
        for shard in self.shards:
            task = shard.progress
            task.batches.clear()
            task.promoted.clear()
            task.kept.clear()
            task.promoting = task.session_open = shard.looking = shard.baseline_asked = False
            shard.claimed = shard.claiming = False
            shard.spare.clear()
            for lease in shard.leases:
                lease.promoting = False
                self._end(shard, lease, lease.ending or event.reason, event.error, out)

    def _advance(self, out: list[sm.Instruction]) -> None:
        for shard in self.shards:
            for lease in list(shard.winding_down.values()):
                self._settle_ending(shard, lease, out)
        if not self._lane_open:
            return
        for shard in self.shards:
            if shard.lease is not None:
                self._prepare(shard, shard.lease, out)
        self._fill(out)
        for shard in self.shards:
            if shard.lease is not None:
                self._settle(shard, shard.lease, out)

    def _prepare(self, shard: ShardTask, lease: Lease, out: list[sm.Instruction]) -> None:
        index = shard.progress.index
        if lease.claim and not shard.claimed:
            if not shard.claiming:
                shard.claiming = True
                out.append(sm.TakeClaim(index))
        elif not shard.looked_up:
            if not shard.looking:
                shard.looking = True
                out.append(sm.LookUp(index))
        elif not shard.baseline_settled:
            if not shard.baseline_asked:
                shard.baseline_asked = True
                out.append(m.MeasureBaseline(index))
        elif not lease.told_baseline:
            lease.told_baseline = True
            us, error = shard.progress.baseline_us, shard.baseline_error
            out.append(sm.TellBaseline(index, lease.token, us, shard.baseline_trial_id, error))

    def _settle(self, shard: ShardTask, lease: Lease, out: list[sm.Instruction]) -> None:
        task = shard.progress
        exhausted = lease.remaining > 0 and task.exhausted and not shard.spare
        if lease.promoting:
            if not task.promoting:
                self._concluded(shard, lease, out)
            return
        if not shard.ready or not lease.told_baseline or task.batches:
            return
        if shard.taken_over:
            self._published(shard, lease, out)
            return
        if lease.remaining and not exhausted:
            return
        if not lease.conclude:
            self._end(shard, lease, "exhausted" if exhausted else "measured", lease.error, out)
        elif task.promoting:  # for a lease before this one
            return
        elif shard.conclusion is not None:
            self._concluded(shard, lease, out)
        else:
            searching.close_session(task, out)
            shard.spare.clear()
            task.verified = False
            lease.promoting = True
            promotion.begin(task, self.limits.top_k, out)
            if not task.promoting:
                self._concluded(shard, lease, out)

    def _settle_ending(self, shard: ShardTask, lease: Lease, out: list[sm.Instruction]) -> None:
        if lease.promoting:
            if not shard.progress.promoting:
                self._concluded(shard, lease, out)
        elif not shard.busy(lease):
            self._end(shard, lease, lease.ending, lease.error, out)

    def _concluded(self, shard: ShardTask, lease: Lease, out: list[sm.Instruction]) -> None:
        task = shard.progress
        lease.promoting = False
        if shard.conclusion is None:
            shard.conclusion = sm.TellEnded(
                task.index,
                lease.token,
                "concluded",
                0,
                verified=task.verified,
                best_us=task.best_us if task.verified else None,
                best_trial_id=task.best_trial_id if task.verified else "",
                fallback=task.verified and task.state is TaskState.FALLBACK,
                error="" if task.verified else task.error,
                baseline_us=task.baseline_us if task.verified else None,
            )
        self._release(shard, lease, out)
        self._over(shard, lease, replace(shard.conclusion, token=lease.token), out)

    def _published(self, shard: ShardTask, lease: Lease, out: list[sm.Instruction]) -> None:
        """Another job has tuned the task: its result is this one's, too."""
        task = shard.progress
        assert task.published is not None
        task.state = TaskState.FALLBACK if task.published_is_fallback else TaskState.REUSED
        task.best_us, task.verified = task.published.median_us, True
        ended = sm.TellEnded(
            task.index,
            lease.token,
            "published",
            0,
            verified=True,
            best_us=task.published.median_us,
            best_trial_id=task.best_trial_id,
            fallback=task.published_is_fallback,
            baseline_us=task.baseline_us,
            reused=task.reused,
        )
        self._release(shard, lease, out)
        self._over(shard, lease, ended, out)

    def _release(self, shard: ShardTask, lease: Lease, out: list[sm.Instruction]) -> None:
        if lease.claim:
            shard.claimed = False
            out.append(sm.ReleaseClaim(shard.progress.index))

    def _end(self, shard: ShardTask, lease: Lease, reason: str, error: str, out: list[sm.Instruction]) -> None:
        if not shard.progress.state.final:
            shard.progress.state = TaskState.PENDING
        self._over(shard, lease, sm.TellEnded(shard.progress.index, lease.token, reason, 0, error=error), out)

    def _over(self, shard: ShardTask, lease: Lease, ended: sm.TellEnded, out: list[sm.Instruction]) -> None:
        if shard.lease is lease:
            shard.lease = None
        shard.winding_down.pop(lease.token, None)
        recent = {token: at_s for token, at_s in shard.ended_at_s.items() if self._now_s - at_s <= self.lease_s}
        shard.ended_at_s = recent | {lease.token: self._now_s}
        out.append(replace(ended, measured=lease.measured, holder=lease.holder))
