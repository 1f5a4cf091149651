"""The shard's state machine, driven without processes: leases come from outside, a simulated engine does the work."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import pytest

from tests.unit.simulated_search import next_piece
from tuner_core.errors import ConflictError, TunerError, UsageError
from tuner_core.model import FailureKind, TaskState
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.progress import Limits, TaskPlan
from tuner_server.scheduler.shard_machine import ShardMachine

BATCH = 4
LEASE_S = 10.0
TASKS = [TaskPlan("a", 1, True), TaskPlan("b", 4, True), TaskPlan("c", 2, False)]


class SimulatedEngine:
    """Answers instructions in an order drawn from a seed; latency of candidate n is ``1000 / (n + 1)``."""

    def __init__(self, seed: int = 0, *, lane: bool = True, **limits: int) -> None:
        self.machine = ShardMachine(TASKS, LEASE_S)
        self.random = random.Random(seed)
        self.limits = Limits(**{"batch": BATCH, **limits})
        self.pending: list[sm.Instruction] = []
        self.told: list[sm.Tell] = []
        self.built: set[str] = set()
        self.runs: Counter[str] = Counter()
        self.generated: Counter[int] = Counter()
        self.sessions: list[m.OpenSession | m.CloseSession] = []
        self.reported: list[m.Report] = []
        self.promoted: list[m.Promote] = []
        self.known: dict[int, m.Known] = {}
        self.space: Mapping[int, int] = {}
        self.failing: set[int] = set()
        self.asked: list[tuple[int, int]] = []  # of a task that gets a batch, with it: in flight; size of the batch
        self.now_s = 0.0
        if lane:
            self.take(self.machine.handle(sm.LaneOpened(self.limits)))

    def grant(self, token: int, trials: int, *, task: int = 0, conclude: bool = False) -> None:
        self.take(self.machine.grant(task, token, trials, conclude, self.now_s))

    def handle(self, event: sm.Event) -> None:
        self.take(self.machine.handle(event))

    def take(self, instructions: list[sm.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case sm.TellBaseline() | sm.TellTrial() | sm.TellEnded():
                    self.told.append(instruction)
                case m.OpenSession() | m.CloseSession():
                    self.sessions.append(instruction)
                case m.Report():
                    self.reported.append(instruction)
                case m.Abandon(task, batch, traces):
                    waiting = {one.trace: one for one in self.pending if isinstance(one, m.RunTrial)}
                    for trace in traces:
                        if trace in waiting and trace not in self.built:
                            self.pending.remove(waiting[trace])
                            self.handle(m.TrialDropped(task, batch, trace))
                case m.Forget() | m.Say():
                    pass
                case _:
                    self.pending.append(instruction)
            if isinstance(instruction, m.Generate):
                self.asked.append((self.machine.tasks[instruction.task].outstanding, instruction.count))

    def run(self, steps: int = 10**6) -> None:
        """Answer what is pending, or so many of it."""
        while self.pending and steps > 0:
            steps -= 1
            instruction = self.pending.pop(self.random.randrange(len(self.pending)))
            for event in self.answer(instruction):
                self.handle(event)

    def run_until(self, measured: int) -> None:
        while sum(self.runs.values()) < measured:
            assert self.pending
            self.run(1)

    def answer(self, instruction: sm.Instruction) -> list[sm.Event]:
        match instruction:
            case sm.LookUp(task):
                return [sm.KnownFound(task, self.known.get(task, m.Known()))]
            case m.MeasureBaseline(task):
                return [m.BaselineMeasured(task, f"fallback{task}", 5000.0, f"id-fallback{task}")]
            case m.Generate():
                piece, rest = next_piece(instruction, self.generated, self.space)
                self.pending += rest
                return [piece]
            case m.RunTrial(task, batch, trace):
                self.runs[trace] += 1
                if task in self.failing:
                    return [m.TrialFailed(task, batch, trace, FailureKind.RUN_ERROR, "no", f"id-{trace}")]
                return [m.TrialMeasured(task, batch, trace, latency(trace), f"id-{trace}")]
            case m.Promote(task, traces):
                self.promoted.append(instruction)
                alone = {t: 4000.0 if t.startswith("fallback") else latency(t) for t in traces}
                return [m.Promoted(task, tuple(m.KnownTrial(t, us) for t, us in alone.items()))]
            case m.Check(task, trace):
                return [m.Checked(task, trace, "ok", "", f"verified-{trace}")]
        raise AssertionError(instruction)

    def ends(self, task: int = 0) -> list[tuple[int, str, int]]:
        return [(t.token, t.reason, t.measured) for t in self.told if isinstance(t, sm.TellEnded) and t.task == task]

    def trials(self, token: int, task: int = 0) -> list[str]:
        return [t.trial_id for t in self.told if isinstance(t, sm.TellTrial) and (t.task, t.token) == (task, token)]


def latency(trace: str) -> float:
    return 5000.0 if trace.startswith("fallback") else 1000.0 / (int(trace.rpartition("c")[2]) + 1)


def known(count: int, start: int = 0) -> m.Known:
    trials = tuple(m.KnownTrial(f"t0c{start + n}", latency(f"t0c{start + n}")) for n in range(count))
    return m.Known(trials, baseline=m.KnownTrial("fallback0", 5000.0), baseline_trial_id="old")


def test_nothing_is_done_before_a_lease_comes() -> None:
    engine = SimulatedEngine()
    assert engine.pending == [] and not engine.machine.busy
    engine.handle(sm.Tick(1e6))
    assert engine.pending == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("failing", [False, True])
def test_a_lease_gets_exactly_its_trials_failed_ones_included(seed: int, failing: bool) -> None:
    engine = SimulatedEngine(seed)
    engine.failing = {0} if failing else set()
    engine.grant(1, 10)
    engine.grant(1, 7, task=1)
    engine.run()
    assert engine.ends(0) == [(1, "measured", 10)] and engine.ends(1) == [(1, "measured", 7)]
    assert len(set(engine.trials(1))) == 10 and len(set(engine.trials(1, task=1))) == 7
    assert sum(engine.runs.values()) == 17 and set(engine.runs.values()) == {1}
    assert engine.told.index(next(t for t in engine.told if isinstance(t, sm.TellEnded))) >= 7
    assert not engine.machine.busy


def test_the_baseline_is_measured_with_the_first_lease_and_told_to_every_one() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 0, task=2)  # not worth trials
    engine.run()
    assert engine.told == [
        sm.TellBaseline(2, 1, 5000.0, "id-fallback2"),
        sm.TellEnded(2, 1, "measured", 0),
    ]
    engine.grant(2, 0, task=2)
    assert engine.told[2:] == [sm.TellBaseline(2, 2, 5000.0, "id-fallback2"), sm.TellEnded(2, 2, "measured", 0)]
    assert engine.pending == []


def test_a_fallback_that_cannot_be_measured_does_not_hold_the_lease_up() -> None:
    engine = SimulatedEngine()
    answer = engine.answer

    def fail(instruction: sm.Instruction) -> list[sm.Event]:
        if isinstance(instruction, m.MeasureBaseline):
            return [m.BaselineFailed(instruction.task, "out of memory")]
        return answer(instruction)

    engine.answer = fail  # type: ignore[method-assign]
    engine.grant(1, 4)
    engine.run()
    (told,) = [t for t in engine.told if isinstance(t, sm.TellBaseline)]
    assert told.latency_us is None and "out of memory" in told.error
    assert engine.ends() == [(1, "measured", 4)]


def test_the_search_starts_from_what_the_store_holds_when_the_first_lease_comes() -> None:
    engine = SimulatedEngine()
    engine.known[0] = known(6)
    engine.generated[0] = 6
    engine.grant(1, 8)
    engine.run()
    (opened,) = engine.sessions
    assert isinstance(opened, m.OpenSession) and len(opened.known) == 6
    assert engine.told[0] == sm.TellBaseline(0, 1, 5000.0, "old")  # nothing to measure
    assert engine.ends() == [(1, "measured", 8)]  # what was known does not count


def test_the_search_stays_warm_from_lease_to_lease() -> None:
    engine = SimulatedEngine()
    for token in (1, 2, 3):
        engine.grant(token, 6)
        engine.run()
    assert [type(one) for one in engine.sessions] == [m.OpenSession]
    assert sum(len(report.results) for report in engine.reported) == 18
    assert engine.machine.tasks[0].measured == 18


def test_a_task_that_was_leased_elsewhere_learns_what_was_measured_there() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 4)
    engine.run()
    engine.known[0] = m.Known((*known(4).trials, *known(5, start=50).trials))
    engine.generated[0] = 4
    engine.grant(4, 4)  # 2 and 3 were others'
    engine.run()
    assert [len(report.results) for report in engine.reported] == [4, 5, 4]
    assert [type(one) for one in engine.sessions] == [m.OpenSession]
    assert engine.ends() == [(1, "measured", 4), (4, "measured", 4)]


def test_an_extension_never_takes_trials_back_and_may_come_twice() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 8)
    engine.grant(1, 12)
    engine.grant(1, 12)
    engine.grant(1, 8)
    engine.run()
    assert engine.ends() == [(1, "measured", 12)]


def test_old_tokens_and_ended_leases_are_refused() -> None:
    engine = SimulatedEngine()
    engine.grant(5, 4)
    with pytest.raises(ConflictError, match="old"):
        engine.grant(4, 4)
    engine.run()
    with pytest.raises(ConflictError, match="ended"):
        engine.grant(5, 8)
    with pytest.raises(UsageError):
        engine.grant(1, 4, task=2)
    with pytest.raises(UsageError):
        engine.grant(0, 4, task=1)
    assert sum(engine.runs.values()) == 4


def test_tokens_from_before_a_restart_are_old() -> None:
    machine = ShardMachine(TASKS, LEASE_S, {0: 7})
    for token in (6, 7):
        with pytest.raises(ConflictError):
            machine.grant(0, token, 4, False, 0.0)
    machine.grant(0, 8, 4, False, 0.0)


def test_a_newer_token_ends_the_older_lease() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 16)
    engine.run_until(measured=5)
    engine.grant(2, 8)
    engine.run()
    (first, second) = engine.ends()
    assert first[:2] == (1, "revoked") and 5 <= first[2] < 16 and second == (2, "measured", 8)
    assert len(engine.trials(1)) == first[2] and len(engine.trials(2)) == 8
    assert set(engine.runs.values()) == {1}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("reason", ["revoked", "expired", "draining"])
def test_a_lease_that_ends_early_finishes_what_is_built_and_starts_nothing_more(seed: int, reason: str) -> None:
    engine = SimulatedEngine(seed)
    engine.grant(1, 20)
    engine.run_until(measured=6)
    built = [one.trace for one in engine.pending if isinstance(one, m.RunTrial)][:1]
    engine.built = set(built)
    before = sum(engine.runs.values())
    match reason:
        case "revoked":
            engine.handle(sm.LeaseRevoked(0, 1))
        case "expired":
            engine.handle(sm.Tick(LEASE_S + 0.1))
        case "draining":
            engine.handle(sm.AllRevoked("draining"))
    assert not [one for one in engine.pending if isinstance(one, m.RunTrial) and one.trace not in built]
    engine.run()
    assert engine.ends() == [(1, reason, before + len(built))]
    assert engine.told[-1] == sm.TellEnded(0, 1, reason, before + len(built))  # after its last trial
    assert not engine.machine.busy


def test_candidates_that_nobody_measured_are_the_first_of_the_next_lease() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 20)
    engine.run_until(measured=3)
    engine.handle(sm.LeaseRevoked(0, 1))
    engine.run()
    generated = engine.generated[0]
    left = generated - sum(engine.runs.values())
    assert left > 0
    engine.grant(2, left)
    engine.run()
    assert engine.generated[0] == generated and set(engine.runs.values()) == {1}
    assert engine.ends()[1] == (2, "measured", left)


def test_renewals_and_extensions_move_the_deadline() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 4)
    assert engine.machine.renew([(0, 1), (1, 9)], 8.0) == [1]
    engine.handle(sm.Tick(17.0))
    assert engine.machine.shards[0].lease is not None
    engine.now_s = 17.5
    engine.grant(1, 8)
    engine.handle(sm.Tick(27.0))
    assert engine.machine.shards[0].lease is not None
    engine.handle(sm.Tick(28.0))
    assert engine.machine.shards[0].lease is None


def test_a_lease_that_has_just_ended_is_not_called_lost_since_its_end_is_on_the_way() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 4)
    engine.run()
    assert engine.machine.renew([(0, 1)], 1.0) == []
    assert engine.machine.renew([(0, 1)], 1.0 + LEASE_S) == [0]


def test_conclude_promotes_checks_and_publishes_the_best_of_all_that_is_known() -> None:
    engine = SimulatedEngine()
    engine.known[0] = known(5, start=90)  # better than anything that is found here
    engine.grant(1, 12)
    engine.run()
    engine.grant(2, 0, conclude=True)
    engine.run()
    (promote,) = engine.promoted
    assert promote.traces[:5] == ("t0c94", "t0c93", "t0c92", "t0c91", "t0c90") and promote.traces[-1] == "fallback0"
    assert engine.told[-1] == sm.TellEnded(
        0,
        2,
        "concluded",
        0,
        verified=True,
        best_us=latency("t0c94"),
        best_trial_id="verified-t0c94",
        baseline_us=4000.0,  # as promotion measured it, alone
    )
    assert isinstance(engine.sessions[-1], m.CloseSession)
    assert engine.machine.tasks[0].state is TaskState.TUNED


def test_one_lease_may_search_and_conclude() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 10, conclude=True)
    engine.run()
    ended = engine.told[-1]
    assert isinstance(ended, sm.TellEnded)
    assert (ended.reason, ended.measured, ended.verified, ended.fallback) == ("concluded", 10, True, False)


def test_a_conclusion_that_is_asked_for_again_is_told_again() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 10, conclude=True)
    engine.run()
    first = engine.told[-1]
    engine.grant(2, 0, conclude=True)
    engine.run()
    again = engine.told[-1]
    assert isinstance(first, sm.TellEnded) and isinstance(again, sm.TellEnded)
    assert again.best_trial_id == first.best_trial_id and again.token == 2 and len(engine.promoted) == 1
    engine.grant(3, 4, conclude=True)  # but not when more has been measured
    engine.run()
    assert len(engine.promoted) == 2


def test_concluding_without_a_valid_candidate_says_why() -> None:
    engine = SimulatedEngine()
    engine.failing = {0}
    engine.grant(1, 9, conclude=True)
    engine.run()
    ended = engine.told[-1]
    assert isinstance(ended, sm.TellEnded)
    assert (ended.reason, ended.verified, ended.best_us) == ("concluded", False, None)
    assert "9 run_error" in ended.error


@pytest.mark.parametrize("event", [sm.LeaseRevoked(0, 1), sm.Tick(1e3), sm.AllRevoked("draining")])
def test_a_promotion_that_has_begun_is_finished(event: sm.Event) -> None:
    engine = SimulatedEngine()
    engine.grant(1, 4, conclude=True)
    while not any(isinstance(one, m.Promote) for one in engine.pending):
        engine.run(1)
    engine.handle(event)
    assert engine.ends() == []
    engine.run()
    assert engine.ends() == [(1, "concluded", 4)]


def test_a_small_space_is_exhausted() -> None:
    engine = SimulatedEngine()
    engine.space = {0: 6}
    engine.grant(1, 20)
    engine.run()
    assert engine.ends() == [(1, "exhausted", 6)]


def test_a_lost_search_is_opened_again_and_after_three_times_the_lease_fails() -> None:
    engine = SimulatedEngine()
    answer = engine.answer
    losses = iter([True, False, True, True, True])

    def lose(instruction: sm.Instruction) -> list[sm.Event]:
        if isinstance(instruction, m.Generate) and next(losses, False):
            return [m.SessionLost(0, instruction.batch, "killed")]
        return answer(instruction)

    engine.answer = lose  # type: ignore[method-assign]
    engine.grant(1, 16)
    engine.run()
    (first,) = [t for t in engine.told if isinstance(t, sm.TellEnded)]
    assert first.reason == "failed" and "killed" in first.error
    engine.grant(2, 8)
    engine.run()
    assert engine.ends()[1] == (2, "measured", 8)


def test_after_a_stop_every_lease_is_over_and_what_was_measured_counts() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 20)
    engine.grant(1, 20, task=1)
    engine.run_until(measured=9)
    engine.pending.clear()
    engine.handle(sm.Stopped("failed", "no worker can be started"))
    ends = [t for t in engine.told if isinstance(t, sm.TellEnded)]
    assert [(t.reason, t.error) for t in ends] == [("failed", "no worker can be started")] * 2
    assert sum(t.measured for t in ends) == 9
    assert not engine.machine.busy
    engine.grant(2, 4)  # and it may be tried again
    engine.run()
    assert engine.ends()[-1] == (2, "measured", 4)


def test_a_draining_instance_takes_no_leases_and_extends_none() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 4, conclude=True)
    engine.handle(sm.AllRevoked("draining"))
    for token, task in ((1, 0), (2, 0), (1, 1)):
        with pytest.raises(ConflictError, match="draining"):
            engine.grant(token, 8, task=task)


def test_leases_wait_for_partitions() -> None:
    engine = SimulatedEngine(lane=False)
    engine.grant(1, 8)
    assert engine.pending == [] and engine.machine.busy and "waiting" in engine.machine.phase
    engine.grant(1, 4, task=1)
    engine.handle(sm.LeaseRevoked(1, 1))  # one that is taken back meanwhile is over at once
    assert engine.ends(1) == [(1, "revoked", 0)]
    engine.handle(sm.LaneOpened(engine.limits))
    engine.run()
    assert engine.ends() == [(1, "measured", 8)]


def test_a_shard_whose_searches_were_closed_starts_again_from_what_it_knows() -> None:
    engine = SimulatedEngine()
    engine.grant(1, 8)
    engine.run()
    engine.handle(sm.Stopped("idle"))
    assert len(engine.ends()) == 1
    engine.grant(2, 4)
    engine.run()
    opened = engine.sessions[-1]
    assert isinstance(opened, m.OpenSession) and len(opened.known) == 8


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_no_trial_is_told_twice_and_every_lease_ends_once_with_its_count(seed: int) -> None:
    engine = SimulatedEngine(seed, batches_at_once=1 + seed % 4)
    draw = random.Random(seed)
    tokens: Counter[int] = Counter()
    granted: dict[tuple[int, int], int] = {}
    for _ in range(120):
        engine.now_s += draw.random()
        task = draw.randrange(2)
        match draw.randrange(10):
            case 0 | 1:
                tokens[task] += draw.choice([1, 1, 2])
                trials = draw.randrange(12)
                engine.grant(tokens[task], trials, task=task, conclude=draw.random() < 0.3)
                granted[task, tokens[task]] = trials
            case 2 | 3:
                try:
                    more = granted.get((task, tokens[task]), 0) + draw.randrange(8)
                    engine.grant(tokens[task], more, task=task)
                    granted[task, tokens[task]] = more
                except TunerError:
                    pass
            case 4:
                engine.handle(sm.LeaseRevoked(task, tokens[task]))
            case 5:
                engine.handle(sm.Tick(engine.now_s))
            case 6:
                engine.machine.renew([(task, tokens[task])], engine.now_s)
            case _:
                engine.run(draw.randrange(12))
    engine.run()
    ends = [t for t in engine.told if isinstance(t, sm.TellEnded)]
    assert Counter((t.task, t.token) for t in ends) == Counter(list(granted))  # each once
    assert not engine.machine.busy
    told = [(t.task, t.trial_id) for t in engine.told if isinstance(t, sm.TellTrial)]
    assert len(told) == len(set(told)) == sum(engine.runs.values())
    for ended in ends:
        mine = engine.trials(ended.token, ended.task)
        assert ended.measured == len(mine) <= granted[ended.task, ended.token]
        if ended.reason == "measured":
            assert ended.measured == granted[ended.task, ended.token]
