"""The job's state machine, driven without processes: a simulated engine answers its instructions in random order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import pytest

from tests.unit.simulated_search import next_piece
from tuner_core.allocation.budget import MIN_TRIALS, TaskHistory, new_trials, tasks_worth_trials
from tuner_core.model import FailureKind, JobState, TaskState
from tuner_server.scheduler import messages as m
from tuner_server.scheduler.machine import JobMachine, Limits, TaskPlan


class SimulatedEngine:
    """Answers instructions in an order drawn from a seed, and keeps account of what it saw.

    Latency of candidate n of task t is ``1000 / (n + 1) + t``, so later candidates are better.
    """

    def __init__(self, machine: JobMachine, seed: int = 0) -> None:
        self.machine = machine
        self.random = random.Random(seed)
        self.pending: list[m.Instruction] = []
        self.measured: Counter[int] = Counter()
        self.promoted: dict[int, tuple[str, ...]] = {}
        self.reported: Counter[int] = Counter()
        self.said: list[str] = []
        self.finish: m.Finish | None = None
        self.in_flight: list[tuple[int, int]] = []  # of a task that gets a batch, and of all: with that batch
        self.space: Mapping[int, int] = {}
        self.failing: set[int] = set()
        self.wrong: set[str] = set()
        self.cannot_sample: set[int] = set()
        self.inconclusive: set[int] = set()
        self.opened: dict[int, tuple[m.KnownTrial, ...]] = {}
        self.generated: Counter[int] = Counter()
        self.model_traces: Mapping[int, str] = {}
        self.unmeasured_when_preparing: list[int] = []
        self.unassigned_when_promoting: dict[int, int] = {}

    def run(self, known: Mapping[int, m.Known] | None = None) -> m.Finish:
        self._take(self.machine.handle(m.Started(known or {})))
        while self.finish is None:
            assert self.pending, f"nothing left to do, but the job has not ended: {self.machine.phase}"
            instruction = self.pending.pop(self.random.randrange(len(self.pending)))
            for event in self._answer(instruction):
                self._take(self.machine.handle(event))
        return self.finish

    def _take(self, instructions: list[m.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case m.Say():
                    self.said.append(instruction.message)
                case m.Finish():
                    self.finish = instruction
                case m.OpenSession():
                    self.opened[instruction.task] = instruction.known
                case m.Report():
                    self.reported[instruction.task] += len(instruction.results)
                case m.CloseSession() | m.Forget():
                    pass
                case m.Promote():
                    self.pending.append(instruction)
                    self.unassigned_when_promoting[instruction.task] = self.machine.unassigned
                case m.PrepareModel():
                    self.unmeasured_when_preparing.append(self.machine.trials - sum(self.measured.values()))
                case _:
                    self.pending.append(instruction)
            if isinstance(instruction, m.Generate):
                outstanding = [task.outstanding for task in self.machine.tasks]
                self.in_flight.append((outstanding[instruction.task], sum(outstanding)))

    def _answer(self, instruction: m.Instruction) -> list[m.Event]:
        match instruction:
            case m.MeasureBaseline(task):
                return [m.BaselineMeasured(task, f"fallback{task}", 5000.0)]
            case m.Generate(task, batch):
                if task in self.cannot_sample:
                    return [m.CannotSample(task, batch, "cannot sample enough initial population")]
                piece, rest = next_piece(instruction, self.generated, self.space)
                self.pending += rest
                return [piece]
            case m.RunTrial(task, batch, trace):
                self.measured[task] += 1
                if task in self.failing:
                    return [m.TrialFailed(task, batch, trace, FailureKind.BUILD_ERROR, "no")]
                return [m.TrialMeasured(task, batch, trace, self.latency(task, trace))]
            case m.Promote(task, traces):
                self.promoted[task] = traces
                return [m.Promoted(task, tuple(m.KnownTrial(t, self.latency(task, t)) for t in traces))]
            case m.Check(task, trace):
                if trace in self.wrong:
                    return [m.Checked(task, trace, "wrong_result", "off by 3")]
                if task in self.inconclusive:
                    return [m.Checked(task, trace, "inconclusive", "NaN in the reference")]
                return [m.Checked(task, trace, "ok", "", f"id-{trace}")]
            case m.MeasureModel(traces):
                self.model_traces = traces
                return [m.ModelMeasured(9000.0, 3000.0, True)]
        raise AssertionError(instruction)

    @staticmethod
    def latency(task: int, trace: str) -> float:
        if trace.startswith("fallback"):
            return 5000.0
        return 1000 / (int(trace.rpartition("c")[2]) + 1) + task


def machine_for(tasks: list[TaskPlan], trials: int, **limits: int) -> JobMachine:
    return JobMachine(tasks, trials, Limits(**limits))


THREE = [TaskPlan("a", 1, True), TaskPlan("b", 4, True), TaskPlan("c", 2, False)]


@pytest.mark.parametrize("seed", range(20))
def test_every_trial_of_the_budget_is_measured_and_reported_once(seed: int) -> None:
    engine = SimulatedEngine(machine_for(THREE, 200), seed)
    assert engine.run().state is JobState.DONE
    assert sum(engine.measured.values()) == 200
    assert sum(task.measured for task in engine.machine.tasks) == 200
    assert sum(engine.reported.values()) == 200
    assert [task.state for task in engine.machine.tasks] == [TaskState.TUNED, TaskState.TUNED, TaskState.SKIPPED]


@pytest.mark.parametrize("seed", range(5))
def test_as_much_is_in_flight_as_two_batches_of_each_task_hold_and_no_more_in_all_than_allowed(seed: int) -> None:
    tasks = [TaskPlan(f"t{n}", 1, True) for n in range(6)]
    engine = SimulatedEngine(machine_for(tasks, 600, batch=16, batches_at_once=5), seed)
    engine.run()
    assert 4 * 16 < max(everything for _, everything in engine.in_flight) <= 5 * 16
    assert max(one for one, everything in engine.in_flight if everything - 16 > 5 * 16 / 3) <= 2 * 16


def test_stragglers_do_not_keep_a_task_from_its_next_batch() -> None:
    machine = machine_for(THREE[:1], 200, batch=8, batches_at_once=4)
    out = machine.handle(m.Started({}, {}))
    out += machine.handle(m.BaselineMeasured(0, "fallback0", 5000.0))
    asked: list[m.Generate] = [one for one in out if isinstance(one, m.Generate)]
    built = [trace for n, one in enumerate(asked) for trace in (f"{n}-{k}" for k in range(one.count))]
    for n, one in enumerate(asked):
        machine.handle(m.CandidatesReady(0, one.batch, tuple(f"{n}-{k}" for k in range(one.count))))
    batch_of = {f"{n}-{k}": one.batch for n, one in enumerate(asked) for k in range(one.count)}
    slow = {f"{n}-0" for n in range(len(asked))}  # the first of each batch takes long to build
    more: list[m.Instruction] = []
    for trace in built:
        if trace not in slow:
            more += machine.handle(m.TrialMeasured(0, batch_of[trace], trace, 100.0, f"id-{trace}"))
    reports = [one for one in more if isinstance(one, m.Report)]
    generated = [one for one in more if isinstance(one, m.Generate)]
    assert generated, "the processes would stand idle until the slow ones are built"
    known = [trial.trace for one in reports for trial in one.results]
    assert len(known) == len(set(known)) and set(known) <= set(built) - slow
    assert more.index(reports[0]) < more.index(generated[0]), "and the search knows what has been measured by then"
    for trace in slow:
        more += machine.handle(m.TrialMeasured(0, batch_of[trace], trace, 100.0, f"id-{trace}"))
    known = [trial.trace for one in more if isinstance(one, m.Report) for trial in one.results]
    assert sorted(known) == sorted(built), "everything is reported, and once"


def test_a_task_has_more_in_flight_when_the_stages_have_little_else_to_do() -> None:
    heavy = [TaskPlan("heavy", 50, True), TaskPlan("light", 1, True)]
    engine = SimulatedEngine(machine_for(heavy, 400, batch=8, batches_at_once=12))
    engine.run()
    assert 2 * 8 < max(one for one, _ in engine.in_flight) <= 4 * 8


def test_the_untuned_model_is_built_once_beside_the_last_trials() -> None:
    engine = SimulatedEngine(machine_for(THREE, 200, batch=16), seed=3)
    engine.run()
    (unmeasured,) = engine.unmeasured_when_preparing
    assert 0 < unmeasured <= 4 * 16, "not while the cores have candidates to build, and not after the last of them"


@pytest.mark.parametrize("seed", range(5))
def test_tasks_that_gain_least_are_promoted_while_the_others_share_the_rest_of_the_budget(seed: int) -> None:
    tasks = [TaskPlan(f"t{weight}", weight, True) for weight in range(1, 25)]
    engine = SimulatedEngine(machine_for(tasks, 1000, batch=8, batches_at_once=20), seed)
    assert engine.run().state is JobState.DONE
    assert sum(engine.measured.values()) == 1000
    early = [task for task, left in engine.unassigned_when_promoting.items() if left > 0]
    assert len(early) >= 4, "they would be promoted one after the other when all trials are given out"
    assert max(engine.unassigned_when_promoting.values()) <= 8 * 20, "not while the budget is large"
    assert 19 * 8 < max(everything for _, everything in engine.in_flight) <= 20 * 8


def test_few_tasks_all_search_to_the_end_of_the_budget() -> None:
    engine = SimulatedEngine(machine_for(THREE, 200), seed=1)
    engine.run()
    assert set(engine.unassigned_when_promoting.values()) == {0}
    assert sum(engine.measured.values()) == 200


def test_the_task_that_weighs_more_gets_more_trials() -> None:
    engine = SimulatedEngine(machine_for([TaskPlan("light", 1, True), TaskPlan("heavy", 30, True)], 400))
    engine.run()
    assert engine.measured[1] > 2 * engine.measured[0] >= 2 * MIN_TRIALS


def test_the_top_eight_and_the_baseline_are_promoted() -> None:
    engine = SimulatedEngine(machine_for(THREE[:1], 40))
    engine.run()
    assert engine.promoted[0] == (*[f"t0c{n}" for n in range(39, 31, -1)], "fallback0")
    task = engine.machine.tasks[0]
    assert (task.best_trace, task.best_us, task.verified, task.best_trial_id) == ("t0c39", 25.0, True, "id-t0c39")
    assert engine.model_traces == {0: "t0c39"}


def test_a_wrong_winner_gives_way_to_the_next() -> None:
    engine = SimulatedEngine(machine_for(THREE[:1], 40))
    engine.wrong = {"t0c39", "t0c38"}
    assert engine.run().state is JobState.DONE
    task = engine.machine.tasks[0]
    assert task.best_trace == "t0c37"
    assert task.failures[FailureKind.WRONG_RESULT] == 2
    assert any("rejected" in line for line in engine.said)


def test_inconclusive_publishes_nothing() -> None:
    engine = SimulatedEngine(machine_for(THREE[:1], 40))
    engine.inconclusive = {0}
    engine.run()
    task = engine.machine.tasks[0]
    assert task.state is TaskState.FALLBACK and not task.verified and "inconclusive" in task.error
    assert engine.model_traces == {}


def test_a_fallback_that_wins_is_the_result() -> None:
    engine = SimulatedEngine(machine_for(THREE[:1], 40))
    engine.latency = lambda task, trace: 1.0 if trace.startswith("fallback") else 50.0  # type: ignore[method-assign]
    engine.run()
    assert engine.machine.tasks[0].state is TaskState.FALLBACK
    assert engine.machine.tasks[0].best_us == 1.0


def test_a_task_that_cannot_sample_says_so_and_takes_the_fallback() -> None:
    engine = SimulatedEngine(machine_for(THREE, 64))
    engine.cannot_sample = {0}
    assert engine.run().state is JobState.DONE
    task = engine.machine.tasks[0]
    assert task.state is TaskState.FALLBACK and "cannot sample" in task.error
    assert any("cannot sample" in line for line in engine.said)
    assert engine.measured[1] == 64  # its trials went to the other


def test_a_small_space_returns_its_trials() -> None:
    engine = SimulatedEngine(machine_for(THREE[:2], 200))
    engine.space = {0: 5}
    engine.run()
    assert engine.measured == {0: 5, 1: 195}


def test_a_task_whose_trials_all_fail_makes_the_job_partly() -> None:
    engine = SimulatedEngine(machine_for(THREE, 100))
    engine.failing = {0}
    finish = engine.run()
    assert finish.state is JobState.PARTLY and "a" in finish.error
    assert engine.machine.tasks[0].state is TaskState.FAILED
    assert "build_error" in engine.machine.tasks[0].error


def test_a_budget_too_small_for_all_goes_to_the_most_expensive() -> None:
    tasks = [TaskPlan(f"t{n}", n + 1, True) for n in range(10)]  # same baseline: the last weighs most
    engine = SimulatedEngine(machine_for(tasks, 2 * MIN_TRIALS))
    assert engine.run().state is JobState.DONE
    assert set(engine.measured) == {8, 9} and sum(engine.measured.values()) == 2 * MIN_TRIALS
    assert [t.state for t in engine.machine.tasks] == [TaskState.SKIPPED] * 8 + [TaskState.TUNED] * 2
    assert any("too few" in line for line in engine.said)


@pytest.mark.parametrize("seed", range(5))
def test_every_chosen_task_gets_its_minimum_however_few_batches_are_in_flight(seed: int) -> None:
    tasks = [TaskPlan(f"t{n}", n + 1, True) for n in range(8)]
    engine = SimulatedEngine(machine_for(tasks, 8 * MIN_TRIALS + 5, batches_at_once=2), seed)
    engine.run()
    assert min(engine.measured.values()) >= MIN_TRIALS and len(engine.measured) == 8
    assert sum(engine.measured.values()) == 8 * MIN_TRIALS + 5


def test_one_trial_is_possible() -> None:
    engine = SimulatedEngine(machine_for(THREE, 1))
    assert engine.run().state is JobState.DONE
    assert sum(engine.measured.values()) == 1


def test_a_model_with_nothing_to_tune_is_done() -> None:
    engine = SimulatedEngine(machine_for([], 64))
    assert engine.run().state is JobState.DONE


def known(count: int, *, own: int = 0, verified: bool = True, task: int = 0) -> m.Known:
    trials = tuple(m.KnownTrial(f"t{task}c{n}", SimulatedEngine.latency(task, f"t{task}c{n}")) for n in range(count))
    return m.Known(
        trials,
        own=own,
        best_verified=trials[-1] if verified else None,
        best_trial_id="old" if verified else "",
        baseline=m.KnownTrial(f"fallback{task}", 5000.0),
    )


def test_a_second_run_measures_nothing_and_says_what_it_reused() -> None:
    machine = machine_for(THREE[:2], 64)
    engine = SimulatedEngine(machine)
    engine.run({0: known(24, task=0), 1: known(40, task=1)})
    assert not engine.measured
    assert [task.state for task in machine.tasks] == [TaskState.REUSED, TaskState.REUSED]
    assert [task.reused for task in machine.tasks] == [24, 40]
    assert any("64 trials" in line for line in engine.said)
    assert engine.model_traces == {0: "t0c23", 1: "t1c39"}


def test_a_larger_second_run_measures_only_the_difference_from_a_warm_search() -> None:
    engine = SimulatedEngine(machine_for(THREE[:1], 64))
    engine.generated[0] = 40
    engine.run({0: known(40)})
    assert engine.measured[0] == 24
    assert len(engine.opened[0]) == 40


def test_an_interrupted_job_goes_on_with_what_is_left() -> None:
    machine = machine_for(THREE[:1], 64)
    engine = SimulatedEngine(machine)
    engine.generated[0] = 50
    engine.run({0: known(50, own=50, verified=False)})
    assert engine.measured[0] == 14
    assert (machine.tasks[0].measured, machine.tasks[0].reused) == (64, 0)


def test_a_new_operator_gets_its_share_beside_a_much_tuned_one() -> None:
    engine = SimulatedEngine(machine_for(THREE[:2], 64))
    engine.run({0: known(500)})
    assert engine.measured[1] == 32 and engine.measured[0] == 0


def test_a_lost_search_is_opened_again_with_what_is_known() -> None:
    machine = machine_for(THREE[:1], 48)
    engine = SimulatedEngine(machine)
    answer = engine._answer
    lost = iter([True])

    def lose_once(instruction: m.Instruction) -> list[m.Event]:
        if isinstance(instruction, m.Generate) and engine.measured[0] >= 16 and next(lost, False):
            return [m.SessionLost(0, instruction.batch, "killed")]
        return answer(instruction)

    engine._answer = lose_once  # type: ignore[method-assign]
    assert engine.run().state is JobState.DONE
    assert engine.measured[0] == 48
    assert len(engine.opened[0]) >= 16


def test_cancel_ends_the_job_at_once() -> None:
    machine = machine_for(THREE, 64)
    machine.handle(m.Started({}))
    assert machine.handle(m.CancelRequested()) == [m.Finish(JobState.CANCELLED)]
    assert machine.handle(m.BaselineMeasured(0, "x", 1.0)) == []


def test_outputs_that_differ_are_never_called_done() -> None:
    machine = machine_for([], 64)
    machine.handle(m.Started({}))
    (finish,) = machine.handle(m.ModelMeasured(1.0, 1.0, False))
    assert isinstance(finish, m.Finish) and finish.state is JobState.PARTLY


def test_new_trials_counts_known_ones_towards_the_budget() -> None:
    assert new_trials(64, [TaskHistory(0, False), TaskHistory(0, False)]) == 64
    assert new_trials(64, [TaskHistory(64, True)]) == 0
    assert new_trials(64, [TaskHistory(10, False), TaskHistory(100, True)]) == 22
    assert new_trials(64, []) == 0


def test_tasks_worth_trials_gives_a_minimum_or_nothing() -> None:
    assert tasks_worth_trials(17, {0: 1.0, 1: 5.0, 2: 3.0}, already_known={}) == [1, 2]
    assert tasks_worth_trials(3, {0: 1.0, 1: 5.0}, already_known={}) == [1]
    assert tasks_worth_trials(0, {0: 1.0}, already_known={}) == []


def test_what_is_hopeless_is_judged_against_the_best_known_at_that_moment() -> None:
    machine = machine_for([TaskPlan("a", 1, True)], 64, batch=8)
    (baseline, *_) = machine.handle(m.Started({}))
    assert isinstance(baseline, m.MeasureBaseline)
    assert machine.tasks[0].hopeless_above_us is None
    machine.handle(m.BaselineMeasured(0, "fallback", 100.0))
    assert machine.tasks[0].hopeless_above_us == pytest.approx(150.0)  # the fallback schedule counts as a schedule
    (run, *_) = machine.handle(m.CandidatesReady(0, 0, ("t0c0", "t0c1")))
    assert isinstance(run, m.RunTrial)
    machine.handle(m.TrialMeasured(0, 0, "t0c0", 40.0))
    assert machine.tasks[0].hopeless_above_us == pytest.approx(60.0)


def test_an_operator_that_another_job_tunes_is_waited_for_and_taken_from_there() -> None:
    machine = machine_for([TaskPlan("a", 1, True), TaskPlan("b", 1, True)], 64, batch=8)
    engine = SimulatedEngine(machine)
    engine._take(machine.handle(m.Started({}, {1: "host-b/job-9"})))
    while engine.pending:  # everything that can be done without b
        for event in engine._answer(engine.pending.pop()):
            engine._take(machine.handle(event))
    assert machine.finished is None
    assert engine.measured == {0: 32}  # b's half of the budget is kept for the case that the other job dies
    assert any("host-b/job-9" in line for line in engine.said)
    published = m.KnownTrial("elsewhere", 7.0)
    known = m.Known(trials=(published,), best_verified=published, best_trial_id="id-elsewhere")
    engine._take(machine.handle(m.ClaimTaken(1, known)))
    while engine.finish is None:
        for event in engine._answer(engine.pending.pop()):
            engine._take(machine.handle(event))
    assert engine.finish.state is JobState.DONE
    assert machine.tasks[1].state is TaskState.REUSED
    assert machine.tasks[1].best_us == 7.0
    assert engine.measured == {0: 32}


def test_an_operator_whose_holder_dies_is_tuned_with_what_was_kept_for_it() -> None:
    machine = machine_for([TaskPlan("a", 1, True), TaskPlan("b", 1, True)], 64, batch=8)
    engine = SimulatedEngine(machine)
    engine._take(machine.handle(m.Started({}, {1: "host-b/job-9"})))
    half_done = tuple(m.KnownTrial(f"t1c{1000 + n}", 50.0) for n in range(5))
    engine._take(machine.handle(m.ClaimTaken(1, m.Known(trials=half_done))))
    while engine.finish is None:
        for event in engine._answer(engine.pending.pop(engine.random.randrange(len(engine.pending)))):
            engine._take(machine.handle(event))
    assert machine.tasks[1].state is TaskState.TUNED
    assert machine.tasks[1].reused == 5
    assert sum(engine.measured.values()) == 64
    assert engine.measured[1] > 0


def test_a_job_that_needs_no_trials_waits_for_nobody() -> None:
    published = m.KnownTrial("stored", 7.0)
    machine = machine_for([TaskPlan("a", 1, True)], 8, batch=8)
    known = m.Known(trials=tuple(m.KnownTrial(f"t0c{n}", 9.0) for n in range(8)), best_verified=published)
    out = machine.handle(m.Started({0: known}, {0: "host-b/job-9"}))
    assert machine.tasks[0].waiting_for == ""
    (baseline,) = [step for step in out if isinstance(step, m.MeasureBaseline)]
    out = machine.handle(m.BaselineMeasured(baseline.task, "fallback", 20.0))
    assert any(isinstance(step, m.MeasureModel) for step in out)
    machine.handle(m.ClaimTaken(0, m.Known()))  # too late to matter
    assert machine.tasks[0].state is TaskState.REUSED


def test_a_search_process_that_ends_over_two_batches_has_ended_once() -> None:
    machine = machine_for(THREE[:1], 64, batch=4)
    out = machine.handle(m.Started({}))
    first, second = [one.batch for one in out if isinstance(one, m.Generate)]
    again = machine.handle(m.SessionLost(0, first, "killed"))
    assert [type(one) for one in again] == [m.OpenSession, m.Generate]
    more = machine.handle(m.SessionLost(0, second, "killed"))
    assert [type(one) for one in more] == [m.Generate]  # of the session that was just opened
    assert machine.tasks[0].session_losses == 1


@pytest.mark.parametrize(
    ("cores", "tasks", "batch", "at_once"),
    [(2, 3, 8, 4), (2, 1, 16, 4), (16, 1, 32, 4), (16, 3, 16, 6), (16, 25, 8, 12), (32, 25, 8, 24)],
)
def test_as_many_candidates_are_in_flight_as_the_cores_can_work_on(
    cores: int, tasks: int, batch: int, at_once: int
) -> None:
    limits = Limits.for_cores(8, 6 * cores).for_tasks(tasks)
    assert (limits.batch, limits.batches_at_once) == (batch, at_once)


@pytest.mark.parametrize(("in_flight", "asked"), [(12, 2), (48, 2), (96, 4), (192, 8)])
def test_before_the_baselines_are_known_the_heaviest_tasks_keep_the_processes_at_work(
    in_flight: int, asked: int
) -> None:
    tasks = [TaskPlan(f"t{n}", 1 + n % 2, True, cost=float(n)) for n in range(20)]
    machine = JobMachine(tasks, 1000, Limits.for_cores(8, in_flight), negligible_share=0.005)
    out = machine.handle(m.Started({}))
    heaviest = sorted(range(20), key=lambda n: -n * (1 + n % 2))
    assert [one.task for one in out if isinstance(one, m.Generate)] == heaviest[:asked]


def test_a_small_host_has_little_to_do_when_its_few_processes_have() -> None:
    small = Limits.for_cores(8, 6 * 2).for_tasks(25)
    assert small.batch * small.batches_at_once == 32
    assert small.little(3) and not small.little(4), "two for each core"
    assert Limits.for_cores(8, 6 * 16).for_tasks(5).little(31)
