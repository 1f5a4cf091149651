"""A job sharded over several instances, as a pure state machine: events in, instructions out.

The machine holds the whole job's budget. It leases slices of a task's trials to one instance at a time, extends a lease
before it runs dry, moves leases away from instances that die, hang, drain or fall behind, and counts a trial only once,
under the newest token of its task. How leases travel, and where records are, is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuner_core.leases import holding, liveness, membership, placement, reports, selection
from tuner_core.leases import messages as m
from tuner_core.leases.reports import MAX_ATTEMPTS
from tuner_core.leases.state import Board, LeaseSettings, Phase, TaskHistory, TaskLedger, TaskPlan
from tuner_core.model import JobState, TaskState


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
        self.board = Board(ledgers, settings or LeaseSettings(), epoch=epoch)
        self.trials = trials
        self.phase = "starting"
        self.finished: m.Finish | None = None
        self.model: m.ModelMeasured | None = None
        self.waiting_since_s: float | None = None
        self._began_s: float | None = None
        self._renewed_s = 0.0
        self._model_attempts = 0
        self._stopping = False
        selection.take_in(self.board, trials, known or {})

    @property
    def model_instance(self) -> str:
        """The instance that measures the model, or has measured it."""
        return self.board.model_at or (self.model.instance if self.model else "")

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
                membership.join(board, event, out)
            case m.InstanceGone():
                if (one := board.instances.get(event.instance)) is not None and one.alive:
                    membership.lose_instance(board, one, event.reason, out)
            case m.Heard():
                place = membership.hear(board, event.instance)
                if event.draining:
                    place = membership.drain(board, event.instance, out) or place
            case m.Warmed():
                holding.warmed(board, event, out)
            case m.LeaseAccepted():
                place = reports.accepted(board, event)
            case m.LeaseRefused():
                reports.refused(board, event, out)
            case m.LeaseLost():
                if (lease := holding.find(board, event.instance, event.task, event.token)) is not None:
                    holding.release(board, lease)
            case m.BaselineMeasured():
                reports.baseline(board, event)
            case m.TrialFinished():
                place = reports.trial(board, event, out)
            case m.LeaseEnded():
                reports.ended(board, event, out)
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
                        holding.revoke(board, lease, out)
            case m.CancelRequested():
                holding.revoke_all(board, out)
                self._finish(JobState.CANCELLED, "", out)
        if place and self.finished is None and not self._stopping:
            self._advance(out)
        return out

    # Time

    def _tick(self, out: list[m.Instruction]) -> bool:
        board = self.board
        for one in liveness.silent(board):
            silence_s = board.now_s - one.heard_s
            membership.lose_instance(board, one, f"has been silent for {silence_s:.0f} s", out)
        for lease in liveness.unanswered(board):
            holding.release(board, lease)
        for lease in liveness.stuck(board):
            out.append(m.Say(f"{lease.task} makes no progress at {lease.instance}; its lease moves"))
            board.tasks[lease.task].home = None
            board.instances[lease.instance].backoff_until_s = board.now_s + board.settings.heartbeat_s
            holding.revoke(board, lease, out)
        liveness.measure_rates(board)
        for one in liveness.slow(board):
            out.append(m.Say(f"{one.name} is over {board.settings.slow_factor:g} times slower; its leases move"))
            membership.clear(board, one, out)
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
        board = self.board
        if self._wait(out):
            return
        selection.choose(board, out)
        while (step := placement.next_step(board)) is not None:
            match step:
                case placement.Place():
                    holding.place(board, step, out)
                case placement.Extend():
                    holding.extend(board, step)
                case placement.Take():
                    task = board.tasks[step.lease.task]
                    task.home, task.moved_s = step.by.name, board.now_s
                    holding.revoke(board, step.lease, out)
        holding.tell(board, out)
        selection.settle(board)
        tasks = board.tasks.values()
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
        if not self.board.joined and board.now_s - self._began_s < 2 * board.settings.heartbeat_s:
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

    # The end

    def _measure_model(self, out: list[m.Instruction]) -> None:
        if self.board.model_at is not None:
            return
        usable = self.board.usable()
        if not usable:
            return
        best = min(usable, key=lambda one: (-one.trials, one.name))
        self.board.model_at = best.name
        chosen = {
            task.plan.name: task.best_trial_id
            for task in self.board.tasks.values()
            if task.state in (TaskState.TUNED, TaskState.REUSED) and task.best_trial_id
        }
        out.append(m.MeasureModel(best.name, chosen))

    def _model_measured(self, event: m.ModelMeasured, out: list[m.Instruction]) -> None:
        if self.board.model_at is None or event.instance != self.board.model_at:
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
        if event.instance != self.board.model_at:
            return
        self.board.model_at = None
        self._model_attempts += 1
        one = self.board.instances[event.instance]
        one.backoff_until_s = self.board.now_s + self.board.settings.heartbeat_s
        if self._model_attempts >= MAX_ATTEMPTS:
            self.board.model_at = event.instance
            self._model_measured(m.ModelMeasured(event.now_s, event.instance, error=event.reason), out)

    def _finish(self, state: JobState, error: str, out: list[m.Instruction]) -> None:
        self.phase = "ended"
        self.finished = m.Finish(state, error)
        out.append(self.finished)
