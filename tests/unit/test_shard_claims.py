"""Claims of a shard's tasks: its state machine, and the claims themselves over a real store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.record_values import make_record, make_workload
from tests.unit.test_shard_machine import SimulatedEngine
from tuner_core.store.interface import RecordStore
from tuner_core.store.open import open_store
from tuner_server.scheduler import messages as m
from tuner_server.scheduler import shard_messages as sm
from tuner_server.scheduler.task_claims import TaskClaims

KEY = make_record(make_workload("a")).key


class Claiming(SimulatedEngine):
    """Leases want claims; ``holder`` has those of others, by task."""

    def __init__(self, **options: bool) -> None:
        self.holders: dict[int, str] = {}
        self.claimed: list[int] = []
        self.released: list[int] = []
        self.looked_up: list[int] = []
        self.fresh = True
        super().__init__(**options)

    def lease(self, token: int, trials: int, *, conclude: bool = False, take_over: bool = False) -> None:
        self.take(self.machine.grant(0, token, trials, conclude, self.now_s, claim=True, take_over=take_over))

    def take(self, instructions: list[sm.Instruction]) -> None:
        self.released += [one.task for one in instructions if isinstance(one, sm.ReleaseClaim)]
        super().take([one for one in instructions if not isinstance(one, sm.ReleaseClaim)])

    def answer(self, instruction: sm.Instruction) -> list[sm.Event]:
        if isinstance(instruction, sm.LookUp):
            self.looked_up.append(instruction.task)
        if isinstance(instruction, sm.TakeClaim):
            self.claimed.append(instruction.task)
            return [sm.ClaimAnswered(instruction.task, self.holders.get(instruction.task, ""), self.fresh)]
        return super().answer(instruction)

    @property
    def ended(self) -> list[sm.TellEnded]:
        return [told for told in self.told if isinstance(told, sm.TellEnded)]


def test_a_task_is_claimed_before_it_is_looked_up_and_searched_and_released_when_it_is_published() -> None:
    engine = Claiming()
    engine.lease(1, 8)
    assert engine.pending == [sm.TakeClaim(0)]
    engine.run()
    assert engine.claimed == [0] and engine.ends() == [(1, "measured", 8)]
    assert engine.machine.shards[0].claimed and not engine.released  # the task is the job's between two leases
    engine.lease(2, 4)
    engine.run()
    assert engine.claimed == [0] and engine.looked_up == [0]
    engine.lease(3, 0, conclude=True)
    engine.run()
    assert engine.ends()[-1][1] == "concluded" and engine.released == [0]
    assert not engine.machine.shards[0].claimed


def test_a_lease_of_a_task_that_another_job_holds_ends_at_once_and_says_who() -> None:
    engine = Claiming()
    engine.holders[0] = "job-other"
    engine.lease(1, 8)
    engine.run()
    (ended,) = engine.ended
    assert (ended.reason, ended.holder, ended.measured) == ("held", "job-other", 0)
    assert not engine.runs and not engine.looked_up and not engine.released
    assert not engine.machine.busy


def test_what_the_other_job_has_published_ends_a_lease_that_waits_for_it() -> None:
    engine = Claiming()
    engine.known[0] = m.Known(
        trials=(m.KnownTrial("theirs", 40.0),),
        best_verified=m.KnownTrial("theirs", 39.0),
        best_trial_id="id-theirs",
        baseline=m.KnownTrial("fallback0", 5000.0),
    )
    engine.lease(1, 8, take_over=True)
    engine.run()
    (ended,) = engine.ended
    assert (ended.reason, ended.verified, ended.best_us, ended.best_trial_id) == ("published", True, 39.0, "id-theirs")
    assert (ended.reused, ended.baseline_us) == (1, 5000.0)
    assert not engine.runs and engine.released == [0]
    engine.lease(2, 8)  # without take_over it is searched, from what is known
    engine.run()
    assert engine.ends()[-1] == (2, "measured", 8)


def test_a_task_that_the_other_job_left_without_a_result_is_tuned_from_its_records() -> None:
    engine = Claiming()
    engine.known[0] = m.Known(trials=(m.KnownTrial("theirs", 40.0),))
    engine.lease(1, 8, take_over=True)
    engine.run()
    assert engine.ends() == [(1, "measured", 8)]
    (opened,) = engine.sessions
    assert isinstance(opened, m.OpenSession) and opened.known[0].trace == "theirs"


def test_a_lost_claim_is_taken_again_and_the_lease_ends_when_another_job_has_it() -> None:
    engine = Claiming()
    engine.lease(1, 40)
    engine.run_until(8)
    engine.handle(sm.ClaimLost(0))
    while len(engine.looked_up) < 2:  # it is ours under a new token: others may have added records meanwhile
        assert engine.pending
        engine.run(1)
    assert engine.claimed == [0, 0]
    engine.holders[0] = "job-other"
    engine.handle(sm.ClaimLost(0))
    engine.run()
    (ended,) = engine.ended
    assert (ended.reason, ended.holder) == ("held", "job-other")
    assert ended.measured == len(engine.trials(1)) < 40  # what was being measured is finished and counted


def test_a_claim_that_was_kept_is_no_reason_to_look_up_again() -> None:
    engine = Claiming()
    engine.lease(1, 4)
    engine.run()
    engine.handle(sm.LaneClosed())  # nothing to do for a while
    engine.handle(sm.LaneOpened(engine.limits))
    engine.fresh = False
    engine.lease(2, 4)
    engine.run()
    assert engine.claimed == [0, 0] and engine.looked_up == [0]


@pytest.mark.parametrize("event", [sm.LeaseRevoked(0, 1), sm.AllRevoked("draining"), sm.Tick(1000.0)])
def test_a_lease_that_is_taken_away_takes_the_claim_along_but_does_not_give_it_to_other_jobs(event: sm.Event) -> None:
    engine = Claiming()
    engine.lease(1, 40)
    engine.run_until(4)
    engine.handle(event)
    assert not engine.machine.shards[0].claimed  # it is not renewed here any more
    engine.run()
    assert not engine.released


def test_leases_without_claims_ask_for_none() -> None:
    engine = Claiming()
    engine.grant(1, 4)
    engine.run()
    engine.grant(2, 0, conclude=True)
    engine.run()
    assert not engine.claimed and not engine.released


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return open_store(f"sqlite:///{tmp_path / 'records.sqlite'}")


def test_the_instances_of_a_job_are_one_holder_and_those_of_another_job_are_not(store: RecordStore) -> None:
    async def run() -> None:
        here, there, other = TaskClaims(store, "job-1"), TaskClaims(store, "job-1"), TaskClaims(store, "job-2")
        assert (await here.take(0, KEY)).holder == "" and (await there.take(5, KEY)).holder == ""
        assert (await other.take(0, KEY)).holder == "job-1"
        assert await here.renew(0) and await there.renew(5)
        await there.release(5)  # it was promoted there
        assert not await here.renew(0) and here.held == []
        assert (await other.take(0, KEY)).holder == ""
        await here.release_all()  # nothing of its own is left, and nothing of another's is touched
        assert (await here.take(0, KEY)).holder == "job-2"

    asyncio.run(run())


def test_a_claim_of_instances_that_died_is_taken_over_and_their_token_is_worth_nothing(store: RecordStore) -> None:
    async def run() -> None:
        dead, other = TaskClaims(store, "job-1", ttl_s=0.05), TaskClaims(store, "job-2")
        await dead.take(0, KEY)
        while (await other.take(0, KEY)).holder:
            await asyncio.sleep(0.02)
        assert not await dead.renew(0)
        await dead.take(0, KEY)
        await dead.release_all()
        assert await other.renew(0)

    asyncio.run(run())


def test_a_claim_under_a_token_that_was_held_before_is_not_fresh(store: RecordStore) -> None:
    async def run() -> None:
        job = TaskClaims(store, "job-1")
        assert (await job.take(0, KEY)).fresh
        assert not (await job.take(0, KEY)).fresh
        await job.release(0)
        assert (await job.take(0, KEY)).fresh

    asyncio.run(run())
