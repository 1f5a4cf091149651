"""The leases of a shard's tasks. Written by the shard's state machine only."""

from __future__ import annotations

from dataclasses import dataclass, field

from tuner_core.errors import ConflictError, UsageError
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.progress import TaskProgress


@dataclass
class Lease:
    """A slice of a task's trials, held by this instance.

    Attributes:
        trials: New trials that it allows in all.
        conclude: Whether the task's best is promoted when they are measured.
        deadline_s: When it ends unless it is renewed.
        asked: Trials that are measured, being measured or being searched.
        measured: Trials that have been measured or have failed.
        told_baseline: Whether the client knows the baseline from this lease.
        promoting: The promotion has begun.
        ending: Why it ends early; empty while it runs.
        error: What went wrong.
        claim: The task is worked on only while its claim is the job's.
        take_over: What another job has published ends it.
        holder: Who else holds the claim.
    """

    token: int
    trials: int
    conclude: bool
    deadline_s: float
    asked: int = 0
    measured: int = 0
    told_baseline: bool = False
    promoting: bool = False
    ending: str = ""
    error: str = ""
    claim: bool = False
    take_over: bool = False
    holder: str = ""

    @property
    def remaining(self) -> int:
        """Trials that may still be asked for."""
        return 0 if self.ending else max(0, self.trials - self.asked)


@dataclass
class ShardTask:
    """One task of a shard.

    Attributes:
        progress: Its search and promotion.
        token: The newest token seen.
        lease: The lease with that token, while it runs.
        winding_down: Leases that end early, with trials under way.
        ended_at_s: When a lease ended, by token.
        looked_up: Whether the store's records are known; ``looking``: they are being looked up.
        claimed: Whether this instance renews the job's claim; ``claiming``: it is being taken.
        baseline_asked: The baseline is being measured.
        baseline_error: Why there is none.
        spare: Candidates that were generated and not measured: the next lease begins with them.
        own: Traces measured here.
        conclusion: What the last promotion came to, while nothing new is known.
        served: Order in which tasks got their last batch.
    """

    progress: TaskProgress
    token: int = 0
    lease: Lease | None = None
    winding_down: dict[int, Lease] = field(default_factory=dict)
    ended_at_s: dict[int, float] = field(default_factory=dict)
    looked_up: bool = False
    looking: bool = False
    claimed: bool = False
    claiming: bool = False
    baseline_asked: bool = False
    baseline_trial_id: str = ""
    baseline_error: str = ""
    spare: list[str] = field(default_factory=list)
    own: set[str] = field(default_factory=set)
    conclusion: sm.TellEnded | None = None
    served: int = 0

    @property
    def leases(self) -> list[Lease]:
        """All that are not over."""
        return [*self.winding_down.values(), *([self.lease] if self.lease is not None else [])]

    @property
    def baseline_settled(self) -> bool:
        """Whether the baseline is known, or known not to be had."""
        return self.progress.baseline_us is not None or bool(self.baseline_error)

    @property
    def ready(self) -> bool:
        """Whether what the lease rests on is there: the claim, if it needs one, and the store's records."""
        return self.looked_up and (self.lease is None or self.claimed or not self.lease.claim)

    @property
    def taken_over(self) -> bool:
        """Whether the lease is to end with what another job has published."""
        return self.lease is not None and self.lease.take_over and self.progress.published is not None

    @property
    def wants_trials(self) -> bool:
        """Whether its lease has trials left that can be asked for now."""
        if self.lease is None or not self.lease.remaining or not self.ready or self.taken_over:
            return False
        return bool(self.spare) or not self.progress.exhausted

    @property
    def working(self) -> bool:
        """Whether it needs partitions: it has leases, or something is under way."""
        task = self.progress
        return bool(self.leases or task.batches or task.promoting or self.baseline_asked or self.looking)

    def find(self, token: int) -> Lease | None:
        """A lease that is not over."""
        return next((lease for lease in self.leases if lease.token == token), None)

    def busy(self, lease: Lease) -> bool:
        """Whether trials of a lease are built or measured, or its best is promoted."""
        batches = self.progress.batches.values()
        return lease.promoting or any(batch.lease == lease.token and batch.waiting for batch in batches)

    def check(self, token: int, trials: int) -> None:
        """Refuse what may not be granted.

        Raises:
            UsageError: No token, or trials for a task that is not worth any.
            ConflictError: An old token.
        """
        name = self.progress.plan.name
        if token < 1 or trials < 0:
            raise UsageError(f"a lease of {name} wants a token from 1 and trials from 0, not {token} and {trials}")
        if trials and not self.progress.plan.tunable:
            raise UsageError(f"{name} is not worth trials; lease it with 0 to have its baseline measured")
        if token < self.token:
            raise ConflictError(f"token {token} of {name} is old: {self.token} has been seen")
        if token == self.token and self.lease is None:
            raise ConflictError(f"the lease of {name} with token {token} has ended; grant a new one")
        if token == self.token and self.lease is not None and self.lease.promoting and trials > self.lease.trials:
            raise ConflictError(f"{name} is being promoted; wait for the end of the lease with token {token}")
