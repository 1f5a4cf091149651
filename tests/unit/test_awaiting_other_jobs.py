"""Tasks of a sharded job that another job tunes: waited for, taken over, or tuned after all."""

from __future__ import annotations

from tests.unit.test_lease_machine import BATCH, Bench, grants
from tuner_core.leases import messages as m
from tuner_core.leases.state import TaskHistory
from tuner_core.model import TaskState

HOLDER = "job-other"


def hold(bench: Bench, task: str) -> list[m.Instruction]:
    """The task's present lease ends because another job holds the claim."""
    instance, token = bench.leases()[task]
    return bench.accept(bench.feed(m.LeaseEnded, instance, task, token, "held", holder=HOLDER))


def test_the_share_of_a_task_that_another_job_tunes_is_set_aside_and_the_others_go_on() -> None:
    bench = Bench(tasks=2, trials=64)
    bench.accept(bench.join("a"))
    out = hold(bench, "t0")
    assert [one.text for one in out if isinstance(one, m.Say)] == [
        f"{HOLDER} tunes operators of this model at this moment: their records are taken from there"
    ]
    awaited = bench.machine.board.tasks["t0"].awaited
    assert awaited is not None and awaited.set_aside == 32
    assert set(bench.leases()) == {"t1"}
    for _ in range(20):
        for task, (instance, token) in bench.leases().items():
            lease = bench.machine.board.instances[instance].leases[task]
            bench.accept(bench.measure(instance, task, token, min(BATCH, lease.outstanding)))
    assert len(bench.machine.board.tasks["t1"].counted) == 32  # and not a trial of the other's share


def test_it_is_asked_once_a_heartbeat_whether_the_other_job_is_done() -> None:
    bench = Bench(tasks=1, trials=64)
    bench.accept(bench.join("a"))
    asked = []
    hold(bench, "t0")
    for _ in range(4):
        asked += grants(bench.accept(bench.pass_time(1.25, "a")))
        out = hold(bench, "t0")
        assert not [one for one in out if isinstance(one, m.Say)]  # said once
    assert len(asked) == 4
    assert all(one.take_over and one.trials == BATCH and not one.conclude for one in asked)
    assert len({one.token for one in asked}) == 4
    assert bench.machine.board.unassigned == 0 and bench.machine.board.tasks["t0"].awaited.set_aside == 64  # type: ignore[union-attr]


def test_what_the_other_job_has_published_ends_the_task_and_saves_its_trials() -> None:
    bench = Bench(tasks=1, trials=64)
    bench.accept(bench.join("a"))
    hold(bench, "t0")
    bench.accept(bench.pass_time(1.25, "a"))
    instance, token = bench.leases()["t0"]
    out = bench.feed(
        m.LeaseEnded, instance, "t0", token, "published", True, 3.0, "best", baseline_us=9.0, reused=40, holder=""
    )
    task = bench.machine.board.tasks["t0"]
    assert (task.state, task.verified, task.best_us, task.best_trial_id) == (TaskState.REUSED, True, 3.0, "best")
    assert (task.reused, task.baseline_us, task.counted) == (40, 9.0, {})
    assert m.MeasureModel("a", {"t0": "best"}) in out  # the job is over but for the model
    assert any(isinstance(one, m.Say) and one.text == f"t0: taken from {HOLDER}, 40 trials" for one in out)


def test_a_task_that_the_other_job_left_is_tuned_here_with_what_was_set_aside() -> None:
    bench = Bench(tasks=1, trials=64)
    bench.accept(bench.join("a"))
    hold(bench, "t0")
    bench.accept(bench.pass_time(1.25, "a"))
    instance, token = bench.leases()["t0"]
    out = bench.accept(bench.measure(instance, "t0", token, 1))
    assert any(isinstance(one, m.Say) and "left it without a result" in one.text for one in out)
    assert any(one.token == token and one.trials > BATCH for one in grants(out))  # the same lease is extended
    for _ in range(20):
        if (lease := bench.machine.board.instances["a"].leases.get("t0")) is not None:
            bench.accept(bench.measure("a", "t0", lease.token, min(BATCH, lease.outstanding)))
    assert len(bench.machine.board.tasks["t0"].counted) == 64


def test_the_share_is_not_lost_when_the_instance_that_asks_dies() -> None:
    bench = Bench(tasks=1, trials=64)
    bench.accept(bench.join("a"))
    bench.accept(bench.join("b"))
    for _ in range(8):
        while bench.leases():
            hold(bench, next(iter(bench.leases())))
        bench.accept(bench.pass_time(1.25, "a", "b"))
        instance, _ = bench.leases()["t0"]
        bench.accept(bench.feed(m.InstanceGone, instance, "is gone"))
        bench.accept(bench.join(instance))
    while bench.leases():
        hold(bench, next(iter(bench.leases())))
    assert bench.machine.board.tasks["t0"].awaited.set_aside == 64  # type: ignore[union-attr]


def test_a_task_without_trials_set_aside_is_promoted_when_the_other_job_left_it() -> None:
    bench = Bench(tasks=1, trials=16)
    bench.accept(bench.join("a"))
    token = bench.leases()["t0"][1]
    for _ in range(2):
        bench.accept(bench.measure("a", "t0", token, BATCH))
    bench.accept(bench.feed(m.LeaseEnded, "a", "t0", token, "measured"))
    hold(bench, "t0")  # the promotion: the claim was lost while nobody renewed it
    (ask,) = grants(bench.accept(bench.pass_time(1.25, "a")))
    assert ask.conclude and not ask.take_over  # its own trials are to be weighed, too
    bench.feed(m.LeaseEnded, "a", "t0", ask.token, "concluded", True, 4.0, "mine")
    assert bench.machine.board.tasks["t0"].state is TaskState.TUNED


def test_a_published_best_of_another_job_is_reused_without_promoting_it_again() -> None:
    known = {"t0": TaskHistory(reused=64, best_us=5.0, published_us=5.0, published_id="old")}
    bench = Bench(tasks=1, trials=64, known=known)
    out = bench.accept(bench.join("a"))
    (baseline,) = grants(out)  # not known: measured, for the report
    assert (baseline.trials, baseline.conclude) == (0, False)
    bench.feed(m.BaselineMeasured, "a", "t0", baseline.token, 9.0)
    out = bench.feed(m.LeaseEnded, "a", "t0", baseline.token, "measured")
    task = bench.machine.board.tasks["t0"]
    assert (task.state, task.verified, task.baseline_us) == (TaskState.REUSED, True, 9.0)
    assert m.MeasureModel("a", {"t0": "old"}) in out


def test_a_task_with_a_published_best_is_not_waited_for() -> None:
    known = {"t0": TaskHistory(reused=8, best_us=5.0, baseline_us=9.0, published_us=5.0, published_id="old")}
    bench = Bench(tasks=1, trials=64, known=known)
    bench.accept(bench.join("a"))
    out = hold(bench, "t0")
    task = bench.machine.board.tasks["t0"]
    assert (task.state, task.best_trial_id) == (TaskState.REUSED, "old")
    assert m.MeasureModel("a", {"t0": "old"}) in out
