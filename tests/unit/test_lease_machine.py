"""The lease state machine, event by event."""

from __future__ import annotations

from typing import Any

from tuner_core.allocation.budget import MIN_TRIALS
from tuner_core.leases import messages as m
from tuner_core.leases.machine import LeaseMachine
from tuner_core.leases.state import EPOCH_BITS, LeaseSettings, TaskHistory, TaskPlan
from tuner_core.model import JobState, TaskState

H = 1.0
BATCH = 8


class Bench:
    """A machine, a clock, and what it has said so far."""

    def __init__(self, tasks: int = 2, trials: int = 64, *, untunable: int = 0, **more: Any) -> None:
        plans = [TaskPlan(f"t{i}", 1, True, 10.0 - i) for i in range(tasks)]
        plans += [TaskPlan(f"u{i}", 1, False) for i in range(untunable)]
        wait_s = more.pop("wait_s", None)
        self.in_flight = more.pop("in_flight", 0)
        settings = LeaseSettings(heartbeat_s=H, wait_s=wait_s, negligible_share=more.pop("negligible_share", 0.0))
        self.machine = LeaseMachine(plans, trials, settings, **more)
        self.now = 0.0
        self.trial = 0
        self.tokens: set[int] = set()

    def feed(self, kind: Any, *values: Any, **named: Any) -> list[m.Instruction]:
        return self.machine.handle(kind(self.now, *values, **named))

    def join(self, name: str, incarnation: str = "1") -> list[m.Instruction]:
        return self.feed(m.InstanceJoined, name, incarnation, 1, BATCH, in_flight=self.in_flight)

    def accept(self, out: list[m.Instruction]) -> list[m.Instruction]:
        """The instances take what they are given; what follows from that."""
        more: list[m.Instruction] = []
        for one in out:
            if isinstance(one, m.Warm):
                more += self.accept(self.feed(m.Warmed, one.instance, one.task, one.token))
            elif isinstance(one, m.Grant):
                more += self.accept(self.feed(m.LeaseAccepted, one.instance, one.task, one.token))
        return [*out, *more]

    def measure(self, instance: str, task: str, token: int, count: int, us: float = 5.0) -> list[m.Instruction]:
        out: list[m.Instruction] = []
        for _ in range(count):
            self.trial += 1
            self.tokens.add(token)
            out += self.feed(m.TrialFinished, instance, task, token, f"trial{self.trial}", us)
        return out

    def pass_time(self, seconds: float, *alive: str) -> list[m.Instruction]:
        """Time in which only these instances are heard from."""
        out: list[m.Instruction] = []
        for _ in range(int(seconds * 8)):
            self.now += 1 / 8
            for name in alive:
                out += self.feed(m.Heard, name)
            out += self.feed(m.Tick)
        return out

    def leases(self) -> dict[str, tuple[str, int]]:
        """Task to instance and token."""
        tasks = self.machine.board.tasks.values()
        return {task.plan.name: (one.instance, one.token) for task in tasks for one in task.leases.values()}


def grants(out: list[m.Instruction]) -> list[m.Grant]:
    return [one for one in out if isinstance(one, m.Grant)]


def test_tasks_are_spread_over_the_instances_and_stay_where_they_are() -> None:
    bench = Bench(tasks=2, trials=160)
    bench.accept(bench.join("a"))
    taken = bench.accept(bench.join("b"))
    ended = [one for one in taken if isinstance(one, m.Revoke)]
    for one in ended:  # b had nothing, so a gives one back that it had not begun
        bench.accept(bench.feed(m.LeaseEnded, one.instance, one.task, one.token, "revoked"))
    homes = {task: instance for task, (instance, _) in bench.leases().items()}
    assert sorted(homes.values()) == ["a", "b"]
    for _ in range(6):
        for task, (instance, token) in bench.leases().items():
            bench.accept(bench.measure(instance, task, token, BATCH))
        bench.accept(bench.pass_time(0.25, "a", "b"))
    assert {task: instance for task, (instance, _) in bench.leases().items()} == homes


def test_a_lease_is_extended_under_its_token_before_it_runs_dry() -> None:
    bench = Bench(tasks=1, trials=400)
    bench.accept(bench.join("a"))
    (token,) = {token for _, token in bench.leases().values()}
    for _ in range(20):
        out = bench.accept(bench.measure("a", "t0", token, 4))
        assert {one.token for one in grants(out)} <= {token}
        (lease,) = bench.machine.board.tasks["t0"].leases.values()
        assert lease.outstanding >= BATCH


def test_what_is_added_to_a_lease_before_its_instance_answers_is_told_with_the_answer() -> None:
    bench = Bench(tasks=1, trials=400, in_flight=32)
    (first,) = grants(bench.join("a"))
    (lease,) = bench.machine.board.tasks["t0"].leases.values()
    assert lease.trials > first.trials  # more was decided on at once, but cannot be said yet
    told = grants(bench.feed(m.LeaseAccepted, "a", "t0", first.token))
    assert [(one.token, one.trials) for one in told] == [(first.token, lease.trials)]


def test_an_instance_is_leased_as_many_trials_as_it_says_it_needs_in_flight_and_a_batch_more() -> None:
    bench = Bench(tasks=12, trials=1000, in_flight=72)
    for name in ("a", "b"):
        bench.accept(bench.join(name))
    for _ in range(20):
        for task, (name, token) in bench.leases().items():
            bench.accept(bench.measure(name, task, token, 1))
        for one in bench.machine.board.instances.values():
            assert 72 <= one.outstanding <= 72 + BATCH


def test_a_task_that_hardly_gains_still_keeps_its_instance_busy_when_there_is_nothing_better_for_it() -> None:
    bench = Bench(tasks=12, trials=1000, in_flight=72)
    for name in ("a", "b"):
        bench.accept(bench.join(name))
    matters = next(task for task, (name, _) in bench.leases().items() if name == "a")
    for _ in range(60):
        for task, (name, token) in bench.leases().items():
            bench.accept(bench.measure(name, task, token, 1, 1000.0 if task == matters else 1.0))
        for one in bench.machine.board.instances.values():
            assert one.outstanding >= 72


def test_a_silent_instance_loses_its_leases_within_two_heartbeats_and_they_run_elsewhere_under_newer_tokens() -> None:
    bench = Bench(tasks=2, trials=400, in_flight=32)
    bench.accept(bench.join("a"))
    before = bench.leases()
    bench.now = 0.5
    bench.feed(m.InstanceJoined, "b", "1", 1, BATCH, in_flight=32)
    bench.measure("a", "t0", before["t0"][1], 4)  # a is heard from for the last time
    out = bench.accept(bench.pass_time(1.75, "b"))
    assert any(isinstance(one, m.Say) and "silent" in one.text for one in out)
    after = bench.leases()
    assert set(after) == set(before)
    for task, (instance, token) in after.items():
        assert instance == "b"
        assert token > before[task][1]


def test_what_an_instance_was_at_goes_on_elsewhere_at_once_though_all_others_have_enough_to_do() -> None:
    bench = Bench(tasks=12, trials=4000, in_flight=32)
    for name in ("a", "b", "c"):
        bench.accept(bench.join(name))
    for _ in range(3):  # all have their fill
        for task, (name, token) in bench.leases().items():
            bench.accept(bench.measure(name, task, token, 4))
        bench.accept(bench.pass_time(1.0, "a", "b", "c"))
    held = {task for task, (name, _) in bench.leases().items() if name == "a"}
    assert len(held) > 1
    bench.accept(bench.feed(m.InstanceGone, "a", "is gone"))
    assert held <= set(bench.leases())


def test_the_next_holder_gets_the_records_before_the_lease() -> None:
    bench = Bench(tasks=1, trials=100)
    bench.accept(bench.join("a"))
    bench.measure("a", "t0", bench.leases()["t0"][1], 4)
    bench.feed(m.InstanceGone, "a", "is gone")
    out = bench.join("b")
    (warm,) = (one for one in out if isinstance(one, m.Warm))
    assert warm.instance == "b" and not grants(out)
    (grant,) = grants(bench.feed(m.Warmed, "b", "t0", warm.token))
    assert grant.token == warm.token


def test_instances_without_a_task_of_their_own_join_others_under_tokens_of_their_own() -> None:
    bench = Bench(tasks=1, trials=100)
    bench.accept(bench.join("a"))
    bench.accept(bench.join("b"))
    task = bench.machine.board.tasks["t0"]
    assert set(task.leases) == {"a", "b"}
    first, second = task.leases["a"].token, task.leases["b"].token
    assert first != second
    bench.feed(m.TrialFinished, "a", "t0", first, "same", 5.0)
    bench.feed(m.TrialFinished, "b", "t0", second, "same", 5.0)  # both searches came upon it
    bench.feed(m.TrialFinished, "b", "t0", second, "other", 6.0)
    bench.feed(m.TrialFinished, "b", "t0", first, "forged", 6.0)
    assert list(task.counted) == ["same", "other"]
    bench.feed(m.InstanceGone, "a", "is gone")
    assert set(task.leases) == {"b"}
    assert bench.machine.board.unassigned == 98 - task.leases["b"].outstanding


def test_a_task_that_several_tuned_is_promoted_once_by_one_that_has_the_records_of_all() -> None:
    bench = Bench(tasks=1, trials=48)
    bench.accept(bench.join("a"))
    bench.accept(bench.join("b"))
    seen: list[m.Instruction] = []
    while not any(isinstance(one, m.Warm) for one in seen):
        for name in ("a", "b"):
            lease = bench.machine.board.tasks["t0"].leases.get(name)
            if lease is not None and lease.outstanding:
                bench.accept(bench.measure(name, "t0", lease.token, lease.outstanding))
            elif lease is not None:
                seen += bench.feed(m.LeaseEnded, name, "t0", lease.token, "measured")
    assert len(bench.machine.board.tasks["t0"].counted) == 48
    (warm,) = (one for one in seen if isinstance(one, m.Warm))
    (grant,) = grants(bench.feed(m.Warmed, warm.instance, "t0", warm.token))
    assert grant.conclude
    assert grant.token > max(bench.tokens) + 1  # a gap: the instance has to look up what the other measured


def test_a_fast_instance_leaves_trials_for_operators_that_wait_for_their_baselines_to_tell_whether_they_get_any() -> (
    None
):
    bench = Bench(tasks=10, trials=128, in_flight=300, negligible_share=0.005)
    bench.accept(bench.join("a"))
    board = bench.machine.board
    waiting = [name for name, task in board.tasks.items() if not task.chosen]
    assert waiting and board.unassigned >= MIN_TRIALS * len(waiting)
    for name, task in board.tasks.items():
        bench.accept(bench.feed(m.BaselineMeasured, "a", name, task.last_token, 10.0, f"baseline-{name}"))
    assert board.chosen and all(task.chosen for task in board.tasks.values())
    while board.unassigned or board.instances["a"].outstanding:
        for lease in list(board.instances["a"].leases.values()):
            bench.accept(bench.measure("a", lease.task, lease.token, lease.outstanding))
            if not lease.conclude:
                bench.accept(bench.feed(m.LeaseEnded, "a", lease.task, lease.token, "measured"))
    assert all(len(task.counted) >= MIN_TRIALS for task in board.tasks.values())


def test_an_instance_with_nothing_left_to_measure_promotes_as_many_as_others_cannot_take_yet() -> None:
    bench = Bench(tasks=12, trials=96, in_flight=96)
    bench.accept(bench.join("a"))
    while any(lease.trials for lease in bench.machine.board.instances["a"].leases.values()):
        for lease in list(bench.machine.board.instances["a"].leases.values()):
            bench.accept(bench.measure("a", lease.task, lease.token, lease.outstanding))
            if lease.trials:
                bench.accept(bench.feed(m.LeaseEnded, "a", lease.task, lease.token, "measured"))
    at_a = bench.machine.board.instances["a"].conclusions
    bench.accept(bench.join("b"))
    assert at_a >= 6
    assert bench.machine.board.instances["b"].conclusions == min(12 - at_a, 6) > 1


def test_a_restarted_instance_gets_the_records_again_because_its_store_may_be_new() -> None:
    bench = Bench(tasks=1, trials=100)
    bench.accept(bench.join("a"))
    bench.measure("a", "t0", bench.leases()["t0"][1], 4)
    assert any(isinstance(one, m.Warm) for one in bench.join("a", "2"))


def test_towards_the_end_slices_shrink_so_that_all_instances_end_together() -> None:
    bench = Bench(tasks=4, trials=160)
    bench.join("a"), bench.join("b")
    one = bench.machine.board.instances
    while bench.machine.board.unassigned:
        bench.accept([])
        for task in bench.machine.board.tasks.values():
            for lease in list(task.leases.values()):
                bench.accept(bench.feed(m.Warmed, lease.instance, lease.task, lease.token))
                bench.feed(m.LeaseAccepted, lease.instance, lease.task, lease.token)
                bench.measure(lease.instance, lease.task, lease.token, min(2, lease.outstanding))
                if not lease.outstanding:
                    bench.feed(m.LeaseEnded, lease.instance, lease.task, lease.token, "measured")
    assert max(one["a"].outstanding, one["b"].outstanding) <= BATCH


def test_late_and_repeated_results_are_not_counted() -> None:
    bench = Bench(tasks=1, trials=100)
    bench.accept(bench.join("a"))
    old = bench.leases()["t0"][1]
    bench.feed(m.TrialFinished, "a", "t0", old, "first", 5.0)
    bench.feed(m.TrialFinished, "a", "t0", old, "first", 5.0)
    bench.accept(bench.join("b"))
    bench.accept(bench.feed(m.InstanceGone, "a", "is gone"))
    bench.join("a")
    bench.feed(m.TrialFinished, "a", "t0", old, "late", 4.0)
    task = bench.machine.board.tasks["t0"]
    assert list(task.counted) == ["first"]
    assert task.late == {"late"}
    assert bench.machine.board.instances["a"].late == 1


def test_an_instance_that_comes_back_is_told_to_drop_what_it_lost() -> None:
    bench = Bench(tasks=1, trials=100)
    bench.accept(bench.join("a"))
    token = bench.leases()["t0"][1]
    bench.accept(bench.join("b"))
    bench.accept(bench.feed(m.InstanceGone, "a", "cannot be reached"))
    assert m.Revoke("a", "t0", token) in bench.join("a")


def test_what_a_lost_lease_had_left_goes_back_into_the_budget() -> None:
    bench = Bench(tasks=1, trials=16)
    bench.accept(bench.join("a"))
    bench.measure("a", "t0", bench.leases()["t0"][1], 5)
    bench.feed(m.InstanceGone, "a", "is gone")
    assert bench.machine.board.unassigned == 11


def test_tokens_of_a_later_epoch_are_greater_than_all_earlier_ones() -> None:
    first, later = Bench(epoch=1), Bench(epoch=2)
    first.accept(first.join("a"))
    later.accept(later.join("a"))
    assert min(token for _, token in later.leases().values()) > (1 << EPOCH_BITS) + 10**6
    assert max(token for _, token in first.leases().values()) < 2 << EPOCH_BITS


def test_baselines_of_operators_that_are_not_tuned_are_spread_too() -> None:
    bench = Bench(tasks=0, trials=1, untunable=12)
    bench.accept(bench.join("a"))
    bench.accept(bench.join("b"))
    assert {instance for instance, _ in bench.leases().values()} == {"a", "b"}
    assert all(one.trials == 0 for task in bench.machine.board.tasks.values() for one in task.leases.values())


def test_a_drained_instance_gives_its_leases_back_and_gets_none() -> None:
    bench = Bench(tasks=1, trials=100)
    bench.accept(bench.join("a"))
    token = bench.leases()["t0"][1]
    bench.join("b")
    out = bench.feed(m.Heard, "a", True)
    assert m.Revoke("a", "t0", token) in out
    bench.accept(bench.feed(m.LeaseEnded, "a", "t0", token, "revoked"))
    assert {instance for instance, _ in bench.leases().values()} == {"b"}


def test_without_instances_a_job_waits_and_says_so_once() -> None:
    bench = Bench()
    bench.accept(bench.join("a"))
    out = bench.feed(m.InstanceGone, "a", "is gone") + bench.pass_time(60)
    assert sum(isinstance(one, m.Say) and "waiting" in one.text for one in out) == 1
    assert bench.machine.finished is None
    assert grants(bench.accept(bench.join("a", "2")))


def test_a_job_that_shall_not_wait_ends_partly_done() -> None:
    bench = Bench(wait_s=0.0)
    bench.accept(bench.join("a"))
    bench.feed(m.InstanceGone, "a", "is gone")
    assert bench.machine.finished is not None
    assert bench.machine.finished.state is JobState.PARTLY


def test_a_stopping_job_gives_its_leases_back_and_grants_none() -> None:
    bench = Bench()
    bench.accept(bench.join("a"))
    held = bench.leases()
    out = bench.feed(m.StopRequested)
    assert {one.task for one in out if isinstance(one, m.Revoke)} == set(held)
    for task, (instance, token) in held.items():
        assert not bench.feed(m.LeaseEnded, instance, task, token, "revoked")


def test_a_job_that_goes_on_measures_only_what_is_missing() -> None:
    known = {
        "t0": TaskHistory(
            trials={f"k{i}": 5.0 for i in range(32)},
            best_us=5.0,
            baseline_us=9.0,
            published_us=4.0,
            published_id="best",
            concluded=True,
        ),
        "t1": TaskHistory(trials={f"l{i}": 5.0 for i in range(20)}, best_us=5.0, baseline_us=9.0),
    }
    bench = Bench(tasks=2, trials=64, known=known, epoch=2)
    assert bench.machine.board.unassigned == 12
    out = bench.accept(bench.join("a"))
    assert {one.task for one in out if isinstance(one, m.Warm)} == {"t1"}
    assert bench.machine.board.tasks["t0"].state is TaskState.TUNED


def test_the_tasks_that_are_expected_to_cost_most_are_leased_first() -> None:
    bench = Bench(tasks=8, trials=800)
    out = bench.join("a")
    first = [grant.task for grant in grants(out)]
    assert first == [f"t{i}" for i in range(len(first))] and 1 <= len(first) < 8


def test_trials_go_where_the_whole_job_gains_whichever_instance_a_task_began_at() -> None:
    bench = Bench(tasks=2, trials=480)
    bench.accept(bench.join("a"))
    bench.accept(bench.join("b"))
    latency_us = {"t0": 1000.0, "t1": 100.0}
    measured = {"t0": 0, "t1": 0}
    for _ in range(400):
        tasks = bench.machine.board.tasks.values()
        leases = [(task.plan.name, one) for task in tasks for one in task.leases.values() if one.outstanding]
        for task, lease in leases:
            latency_us[task] -= 1.0 if task == "t0" else 0.0  # the other stays as it is
            measured[task] += 1
            bench.accept(bench.measure(lease.instance, task, lease.token, 1, latency_us[task]))
        ended = [one for one in bench.accept(bench.pass_time(0.125, "a", "b")) if isinstance(one, m.Revoke)]
        for one in ended:
            bench.accept(bench.feed(m.LeaseEnded, one.instance, one.task, one.token, "revoked"))
    assert sum(measured.values()) >= 400
    assert measured["t0"] > 2 * measured["t1"]
    assert set(bench.machine.board.tasks["t0"].by_instance) == {"a", "b"}
