"""A job sharded over several instances, as a pure state machine: events in, instructions out.

The machine holds the whole job's budget. It leases slices of a task's trials to one instance at a time, extends a lease
before it runs dry, moves leases away from instances that die, hang, drain or fall behind, and counts a trial only once,
under the newest token of its task. How leases travel, and where records are, is not its business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from tuner_core.allocation import budget
from tuner_core.leases import liveness, placement
from tuner_core.leases import messages as m
from tuner_core.leases.state import (
    EPOCH_BITS,
    Board,
    InstanceState,
    Lease,
    LeaseSettings,
    Phase,
    TaskHistory,
    TaskLedger,
    TaskPlan,
)
from tuner_core.model import JobState, TaskState

MAX_ATTEMPTS = 3
"""How often a baseline, a promotion or the model's measurement is tried."""


class LeaseMachine:
    """State of one sharded job.

    Args:
        tasks: The job's tasks; names are unique.
        trials: The whole job's budget.
        settings: How leases are given.
        known: What the store holds, by task name.
        epoch: How often the job was taken up before, plus one: later tokens are greater than all earlier ones.
    """

    def __init__(
        self,
        tasks: Sequence[TaskPlan],
        trials: int,
        settings: LeaseSettings | None = None,
        *,
        known: Mapping[str, TaskHistory] | None = None,
        epoch: int = 1,
    ) -> None:
        ledgers = {plan.name: TaskLedger(plan, index) for index, plan in enumerate(tasks)}
        self.board = Board(ledgers, settings or LeaseSettings())
        self.trials = trials
        self.phase = "starting"
        self.finished: m.Finish | None = None
        self.model: m.ModelMeasured | None = None
        self.waiting_since_s: float | None = None
        self._epoch = epoch
        self._began_s: float | None = None
        self._joined = False
        self._renewed_s = 0.0
        self._model_at: str | None = None
        self._model_attempts = 0
        self._chosen = False
        self._stopping = False
        self._take_in(known or {})

    @property
    def model_instance(self) -> str:
        """The instance that measures the model, or has measured it."""
        return self._model_at or (self.model.instance if self.model else "")

    def _take_in(self, known: Mapping[str, TaskHistory]) -> None:
        histories = []
        for task in self.board.tasks.values():
            have = known.get(task.plan.name, TaskHistory())
            task.baseline_us, task.baseline_known = have.baseline_us, have.baseline_us is not None
            if not task.plan.tunable:
                continue
            task.counted = dict(have.trials)
            task.failures = Counter(have.failures)
            task.by_instance = Counter(have.by_instance)
            task.reused = have.reused
            task.best_us = have.best_us
            if have.published_id:
                task.best_us, task.best_trial_id = have.published_us, have.published_id
                task.settled, task.settled_fallback = True, have.published_fallback
            if task.known and task.best_us is not None:
                task.history_us = [task.best_us] * (task.known + 1)
            if have.concluded:
                task.chosen, task.verified = True, True
                task.state = TaskState.FALLBACK if have.published_fallback else TaskState.TUNED
            histories.append(budget.TaskHistory(task.known, task.settled))
        self.board.unassigned = budget.new_trials(self.trials, histories)

    # Entry point

    def handle(self, event: m.Event) -> list[m.Instruction]:
        """Take in one event; what is to be done now comes out. Events after the end are ignored."""
        if self.finished is not None:
            return []
        board = self.board
        board.now_s = max(board.now_s, event.now_s)
        if self._began_s is None:
            self._began_s = self._renewed_s = board.now_s
        out: list[m.Instruction] = []
        place = True
        match event:
            case m.InstanceJoined():
                self._join(event, out)
            case m.InstanceGone():
                if (one := board.instances.get(event.instance)) is not None and one.alive:
                    self._lose_instance(one, event.reason, out)
            case m.Heard():
                place = self._hear(event.instance)
                if event.draining:
                    place = self._drain(event.instance, out) or place
            case m.Warmed():
                self._warmed(event, out)
            case m.LeaseAccepted():
                place = self._accepted(event)
            case m.LeaseRefused():
                self._refused(event, out)
            case m.LeaseLost():
                if (lease := self._find(event.instance, event.task, event.token)) is not None:
                    self._release(lease)
            case m.BaselineMeasured():
                self._baseline(event)
            case m.TrialFinished():
                place = self._trial(event)
            case m.LeaseEnded():
                self._ended(event, out)
            case m.ModelMeasured():
                self._model_measured(event, out)
            case m.ModelNotMeasured():
                self._model_not_measured(event, out)
            case m.Tick():
                place = self._tick(out)
            case m.StopRequested():
                self._stopping = True
                for one in board.instances.values():
                    for lease in list(one.leases.values()):
                        self._revoke(lease, out)
            case m.CancelRequested():
                self._revoke_all(out)
                self._finish(JobState.CANCELLED, "", out)
        if place and self.finished is None and not self._stopping:
            self._advance(out)
        return out

    # Instances

    def _join(self, event: m.InstanceJoined, out: list[m.Instruction]) -> None:
        one = self.board.instances.setdefault(event.instance, InstanceState(event.instance))
        if one.incarnation != event.incarnation:
            for lease in list(one.leases.values()):
                self._release(lease)
            if one.incarnation:
                out.append(m.Say(f"{one.name} was restarted; what it held is leased again"))
            one.stale.clear()
            if self._model_at == one.name:
                self._model_at = None
        elif not one.alive:
            out.append(m.Say(f"{one.name} is back"))
        if not one.alive or one.incarnation != event.incarnation:
            one.window_since_s, one.slow_until_s, one.backoff_until_s, one.refusals = None, float("-inf"), 0.0, 0
        one.incarnation, one.workers, one.batch = event.incarnation, event.workers, max(1, event.batch)
        one.alive, one.suspect, one.draining, one.reason = True, False, False, ""
        one.heard_s = self.board.now_s
        for task, token in sorted(one.stale):  # it may still hold what it lost while nobody heard from it
            out.append(m.Revoke(one.name, task, token))
        one.stale.clear()
        self._joined = True
        if event.draining:
            self._drain(one.name, out)

    def _hear(self, name: str) -> bool:
        """Note a sign of life; whether that changes who may get leases."""
        one = self.board.instances.get(name)
        if one is None or not one.alive:
            return False
        one.heard_s = self.board.now_s
        changed, one.suspect = one.suspect, False
        return changed

    def _drain(self, name: str, out: list[m.Instruction]) -> bool:
        one = self.board.instances.get(name)
        if one is None or one.draining:
            return False
        one.draining = True
        out.append(m.Say(f"{name} is draining: it finishes what it measures, its leases move"))
        self._clear(one, out)
        return True

    def _clear(self, one: InstanceState, out: list[m.Instruction]) -> None:
        """Take an instance's leases away in good order; a promotion that runs may end."""
        for lease in list(one.leases.values()):
            if not lease.conclude or lease.phase is not Phase.LIVE:
                self._revoke(lease, out)

    def _lose_instance(self, one: InstanceState, reason: str, out: list[m.Instruction]) -> None:
        held = len(one.leases)
        one.alive, one.suspect, one.reason = False, False, reason
        for lease in list(one.leases.values()):
            self._release(lease)
        if self._model_at == one.name:
            self._model_at = None
        for task in self.board.tasks.values():
            if task.home == one.name:
                task.home = None
        moves = f"; its {held} leases move" if held > 1 else "; its lease moves" if held else ""
        out.append(m.Say(f"{one.name} {reason}{moves}"))

    # Leases

    def _find(self, instance: str, task: str, token: int) -> Lease | None:
        """The task's present lease, if it is this one."""
        ledger = self.board.tasks.get(task)
        lease = ledger.lease if ledger is not None else None
        return lease if lease is not None and (lease.token, lease.instance) == (token, instance) else None

    def _place(self, step: placement.Place, out: list[m.Instruction]) -> None:
        task, one = step.task, step.instance
        task.last_token += 1
        token = (self._epoch << EPOCH_BITS) | task.last_token
        lease = Lease(task.plan.name, token, one.name, step.trials, step.conclude, self.board.now_s)
        task.lease = one.leases[lease.task] = lease
        task.new_trials += step.trials
        self.board.unassigned -= step.trials
        if not step.trials and not step.conclude:
            task.baseline_attempts += 1
        elif task.home != one.name:
            task.home, task.moved_s = one.name, self.board.now_s
        if task.plan.tunable:
            task.state = TaskState.RUNNING
        if task.holder != one.name and (task.known or task.late):
            out.append(m.Warm(one.name, lease.task, token))
        else:
            self._grant(lease, out)

    def _grant(self, lease: Lease, out: list[m.Instruction]) -> None:
        lease.phase, lease.changed_s = Phase.GRANTING, self.board.now_s
        self.board.tasks[lease.task].holder = lease.instance
        out.append(m.Grant(lease.instance, lease.task, lease.token, lease.trials, lease.conclude))

    def _extend(self, step: placement.Extend, out: list[m.Instruction]) -> None:
        lease = step.lease
        lease.trials += step.trials
        self.board.tasks[lease.task].new_trials += step.trials
        self.board.unassigned -= step.trials
        if lease.phase is Phase.LIVE:
            out.append(m.Grant(lease.instance, lease.task, lease.token, lease.trials))

    def _warmed(self, event: m.Warmed, out: list[m.Instruction]) -> None:
        lease = self._find(event.instance, event.task, event.token)
        if lease is not None and lease.phase is Phase.WARMING:
            self._grant(lease, out)

    def _accepted(self, event: m.LeaseAccepted) -> bool:
        self._hear(event.instance)
        self.board.instances[event.instance].refusals = 0
        lease = self._find(event.instance, event.task, event.token)
        if lease is None or lease.phase is not Phase.GRANTING:
            return False
        lease.phase, lease.changed_s = Phase.LIVE, self.board.now_s
        return True

    def _refused(self, event: m.LeaseRefused, out: list[m.Instruction]) -> None:
        one = self.board.instances.get(event.instance)
        lease = self._find(event.instance, event.task, event.token)
        if one is None or lease is None:
            return
        if lease.phase is Phase.LIVE:  # an extension: the lease itself goes on, or its end is on the way
            if event.unanswered:
                lease.repeat = True  # the same again does no harm
            else:
                lease.closed = True
        else:
            one.refusals += 1
            one.backoff_until_s = self.board.now_s + self.board.settings.heartbeat_s * min(4.0, 0.1 * 2**one.refusals)
            self._release(lease)
            out.append(m.Revoke(lease.instance, lease.task, lease.token))
        if event.draining:
            self._drain(one.name, out)

    def _revoke(self, lease: Lease, out: list[m.Instruction]) -> None:
        if lease.phase is Phase.WARMING:
            self._release(lease)
        elif lease.phase is not Phase.REVOKING:
            lease.phase, lease.changed_s = Phase.REVOKING, self.board.now_s
            out.append(m.Revoke(lease.instance, lease.task, lease.token))

    def _release(self, lease: Lease, *, ended: bool = False) -> None:
        """The lease is over here: what it did not measure goes back into the budget."""
        task, one = self.board.tasks[lease.task], self.board.instances[lease.instance]
        task.lease = None
        del one.leases[lease.task]
        left = lease.outstanding
        task.new_trials -= left
        self.board.unassigned += left
        if not ended:
            one.stale.add((lease.task, lease.token))

    def _revoke_all(self, out: list[m.Instruction]) -> None:
        for one in self.board.instances.values():
            for lease in one.leases.values():
                out.append(m.Revoke(lease.instance, lease.task, lease.token))

    # Results

    def _baseline(self, event: m.BaselineMeasured) -> None:
        self._hear(event.instance)
        task = self.board.tasks.get(event.task)
        if task is None or task.baseline_us is not None:
            return
        task.baseline_us = event.latency_us
        task.baseline_known = True
        task.error = f"the fallback schedule failed: {event.error}" if event.latency_us is None else ""
        if not task.plan.tunable:
            task.by_instance[event.instance] += 1

    def _trial(self, event: m.TrialFinished) -> bool:
        """Count a trial; whether the instance now has room for more."""
        self._hear(event.instance)
        task, one = self.board.tasks.get(event.task), self.board.instances.get(event.instance)
        if task is None or one is None or event.trial_id in task.counted:
            return False
        if one.window_since_s is not None:
            one.window_trials += 1
        lease = self._find(event.instance, event.task, event.token)
        if lease is None:  # its record is kept, and the next holder may start from it
            if event.trial_id not in task.late:
                task.late.add(event.trial_id)
                one.late += 1
            return False
        lease.counted += 1
        lease.changed_s = self.board.now_s
        one.trials += 1
        task.by_instance[one.name] += 1
        task.counted[event.trial_id] = event.latency_us
        if event.latency_us is None:
            task.failures[event.failure or "run_error"] += 1
        elif task.best_us is None or event.latency_us < task.best_us:
            task.best_us = event.latency_us
        self._note_history(task, event.latency_us)
        one.unplanned += 1
        if one.unplanned < one.batch // 2 and one.outstanding > one.batch // 2:
            return False  # nothing to decide yet, and this happens with every trial
        one.unplanned = 0
        return True

    def _note_history(self, task: TaskLedger, latency_us: float | None) -> None:
        if not task.history_us:
            before = task.baseline_us if task.baseline_us is not None else latency_us
            if before is None:
                return
            task.history_us = [before]
        best = task.history_us[-1]
        task.history_us.append(best if latency_us is None else min(best, latency_us))

    def _ended(self, event: m.LeaseEnded, out: list[m.Instruction]) -> None:
        self._hear(event.instance)
        one = self.board.instances.get(event.instance)
        if one is not None:
            one.stale.discard((event.task, event.token))
        lease = self._find(event.instance, event.task, event.token)
        if lease is None:
            return
        task = self.board.tasks[event.task]
        self._release(lease, ended=True)
        if event.reason == "draining":
            self._drain(event.instance, out)
        elif event.reason == "exhausted":
            task.exhausted = True
            if event.error:
                task.error = event.error
        elif event.reason == "concluded" and lease.conclude:
            self._concluded(task, event)
        elif event.reason == "failed":
            task.attempts += 1
            task.error = event.error or "the instance does not say why"
            out.append(m.Say(f"{task.plan.name} at {event.instance}: {task.error}"))
            if task.attempts >= MAX_ATTEMPTS and lease.conclude:
                self._without_best(task)
            elif task.attempts >= MAX_ATTEMPTS:
                task.exhausted, task.attempts = True, 0
        if not task.baseline_known and task.baseline_attempts >= MAX_ATTEMPTS:
            task.baseline_known = True
            task.error = event.error or "the fallback schedule was not measured"

    def _concluded(self, task: TaskLedger, event: m.LeaseEnded) -> None:
        task.by_instance.setdefault(event.instance, 0)
        if not event.verified:
            task.error = event.error or task.error
            self._without_best(task)
            return
        task.verified, task.best_us, task.best_trial_id = True, event.best_latency_us, event.best_trial_id
        if event.baseline_us is not None:
            task.baseline_us = event.baseline_us
        task.state = TaskState.FALLBACK if event.fallback else TaskState.TUNED
        task.error = ""

    def _without_best(self, task: TaskLedger) -> None:
        """Nothing could be published: the task keeps the fallback schedule, or fails."""
        valid = [value for value in task.counted.values() if value is not None]
        task.best_us = task.baseline_us
        few = len(task.counted) < budget.MIN_TRIALS
        ours = task.baseline_us is not None and (bool(valid) or few)
        task.state = TaskState.FALLBACK if ours else TaskState.FAILED
        task.error = task.error or f"no valid candidate in {len(task.counted)} trials"

    # Time

    def _tick(self, out: list[m.Instruction]) -> bool:
        board = self.board
        for one in liveness.silent(board):
            silence_s = board.now_s - one.heard_s
            self._lose_instance(one, f"has been silent for {silence_s:.0f} s", out)
        for lease in liveness.unanswered(board):
            self._release(lease)
        for lease in liveness.stuck(board):
            out.append(m.Say(f"{lease.task} makes no progress at {lease.instance}; its lease moves"))
            board.tasks[lease.task].home = None
            board.instances[lease.instance].backoff_until_s = board.now_s + board.settings.heartbeat_s
            self._revoke(lease, out)
        liveness.measure_rates(board)
        for one in liveness.slow(board):
            out.append(m.Say(f"{one.name} is over {board.settings.slow_factor:g} times slower; its leases move"))
            self._clear(one, out)
        if board.now_s - self._renewed_s >= board.settings.heartbeat_s:
            self._renewed_s = board.now_s
            for one in board.instances.values():
                held = [lease for lease in one.leases.values() if lease.phase in (Phase.LIVE, Phase.REVOKING)]
                for lease in held:
                    if lease.repeat and lease.extensible:
                        lease.repeat = False
                        out.append(m.Grant(one.name, lease.task, lease.token, lease.trials))
                if one.alive and held:
                    out.append(m.Renew(one.name, tuple((lease.task, lease.token) for lease in held)))
        return True

    # Decisions

    def _advance(self, out: list[m.Instruction]) -> None:
        if self._wait(out):
            return
        self._choose(out)
        while (step := placement.next_step(self.board)) is not None:
            match step:
                case placement.Place():
                    self._place(step, out)
                case placement.Extend():
                    self._extend(step, out)
                case placement.Take():
                    task = self.board.tasks[step.lease.task]
                    task.home, task.moved_s = step.by.name, self.board.now_s
                    self._revoke(step.lease, out)
        self._settle()
        tasks = self.board.tasks.values()
        if all(task.state.final for task in tasks):
            self.phase = "model"
            self._measure_model(out)
        elif self.phase != "search" and any(task.new_trials for task in tasks):
            self.phase = "search"
        elif self.phase == "starting":
            self.phase = "baseline"

    def _wait(self, out: list[m.Instruction]) -> bool:
        """Whether no instance takes leases; says so once, and gives up in time."""
        board = self.board
        if board.alive():
            self.waiting_since_s = None
            return False
        assert self._began_s is not None
        if not self._joined and board.now_s - self._began_s < 2 * board.settings.heartbeat_s:
            return True
        if any(one.alive and one.leases for one in board.instances.values()):
            return True  # draining, but not done
        wait_s = board.settings.wait_s
        if self.waiting_since_s is None:
            self.waiting_since_s = board.now_s
            if wait_s != 0:
                limit = "" if wait_s is None else f" for up to {wait_s:g} s"
                out.append(m.Say(f"no instance takes leases; waiting{limit} for one (what was measured is kept)"))
        if wait_s is not None and board.now_s - self.waiting_since_s >= wait_s:
            self._finish(JobState.PARTLY, "no instance takes leases any more; what was measured is kept", out)
        return True

    def _choose(self, out: list[m.Instruction]) -> None:
        """Decide which tasks get trials; when they are too few for all, that waits for the baselines."""
        if self._chosen:
            return
        board = self.board
        undecided = [t for t in board.tasks.values() if t.plan.tunable and not t.chosen and not t.state.final]
        need = sum(max(0, budget.MIN_TRIALS - task.known) for task in undecided)
        if board.unassigned >= need:
            chosen = undecided
        elif any(not task.baseline_known for task in undecided):
            return
        else:
            weighted = {task.index: task.plan.weight * (task.baseline_us or 0.0) for task in undecided}
            known = {task.index: task.known for task in undecided}
            worth = set(budget.tasks_worth_trials(board.unassigned, weighted, already_known=known))
            chosen = [task for task in undecided if task.index in worth or task.known]
            left_out = [task for task in undecided if task not in chosen]
            for task in left_out:
                task.error = task.error or "the trial budget is too small for this operator"
            if left_out:
                out.append(
                    m.Say(
                        f"{board.unassigned} trials are too few: {len(left_out)} operators keep the fallback schedule"
                    )
                )
        for task in chosen:
            task.chosen = True
        self._chosen = True

    def _settle(self) -> None:
        """Tasks that need no promotion are over when their baseline is known."""
        for task in self.board.tasks.values():
            if task.state.final or task.lease is not None:
                continue
            if (
                task.plan.tunable
                and task.chosen
                and task.settled
                and self.board.unassigned <= 0
                and not task.new_trials
            ):
                task.state = TaskState.FALLBACK if task.settled_fallback else TaskState.REUSED
                task.verified = True
            elif task.baseline_known and (not task.plan.tunable or (self._chosen and not task.chosen)):
                task.state = TaskState.SKIPPED if task.baseline_us is not None else TaskState.FAILED
                task.best_us = task.baseline_us

    # The end

    def _measure_model(self, out: list[m.Instruction]) -> None:
        if self._model_at is not None:
            return
        usable = self.board.usable()
        if not usable:
            return
        best = min(usable, key=lambda one: (-one.trials, one.name))
        self._model_at = best.name
        chosen = {
            task.plan.name: task.best_trial_id
            for task in self.board.tasks.values()
            if task.state in (TaskState.TUNED, TaskState.REUSED) and task.best_trial_id
        }
        out.append(m.MeasureModel(best.name, chosen))

    def _model_measured(self, event: m.ModelMeasured, out: list[m.Instruction]) -> None:
        if self._model_at is None or event.instance != self._model_at:
            return
        self.model = event
        tasks = list(self.board.tasks.values())
        failed = [task.plan.name for task in tasks if task.state is TaskState.FAILED]
        error = event.error
        if failed:
            error = f"{len(failed)} of {len(tasks)} operators failed: {', '.join(failed)}"
        if event.outputs_match is False:
            error = "the tuned model's output differs from the untuned one's"
        state = JobState.PARTLY if failed or event.outputs_match is False else JobState.DONE
        if failed and len(failed) == len(tasks):
            state = JobState.FAILED
        self._finish(state, error, out)

    def _model_not_measured(self, event: m.ModelNotMeasured, out: list[m.Instruction]) -> None:
        if event.instance != self._model_at:
            return
        self._model_at = None
        self._model_attempts += 1
        one = self.board.instances[event.instance]
        one.backoff_until_s = self.board.now_s + self.board.settings.heartbeat_s
        if self._model_attempts >= MAX_ATTEMPTS:
            self._model_at = event.instance
            self._model_measured(m.ModelMeasured(event.now_s, event.instance, error=event.reason), out)

    def _finish(self, state: JobState, error: str, out: list[m.Instruction]) -> None:
        self.phase = "ended"
        self.finished = m.Finish(state, error)
        out.append(self.finished)
