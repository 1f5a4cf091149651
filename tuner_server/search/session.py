"""One task's search: draws schedules from MetaSchedule's design space, learns from their latencies, proposes new ones.

MetaSchedule's own evolutionary search applies, post-processes and scores every member of every generation: 6 ms for
each application and 5 ms for its features, 0.25 s of CPU for each candidate that is measured at its defaults. Here
generations live on decisions alone (:mod:`tuner_server.search.space`), and only what will be returned is applied. The
design space, the post-processors and the traces are MetaSchedule's.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import Instruction, Trace
from tvm.target import Target

from tuner_core.compiler.guard import load_workload
from tuner_core.compiler.trace import trace_json
from tuner_core.model import sha256_hex
from tuner_server.search.cost_model import CostModel
from tuner_server.search.messages import KnownTrial, SearchFailed, SearchSettings
from tuner_server.search.space import DesignSpace, Knob, Point

_MIN_TRIALS_TO_TRAIN = 8


@dataclass(frozen=True)
class _Applied:
    trace: str
    space: DesignSpace
    point: Point | None
    module_hash: int


class SearchSession:
    """The search of one workload for one target.

    Args:
        body: The workload's canonical JSON.
        target_json: The target.
        settings: How to search.
        seed: Equal seeds and equal reports give equal candidates.
        known: Trials from before: they are learned from, and their schedules not proposed again.

    Raises:
        UsageError: The workload is malformed, or holds what no operator needs.
    """

    def __init__(
        self, body: str, target_json: str, settings: SearchSettings, seed: int, known: Sequence[KnownTrial] = ()
    ) -> None:
        self._settings = settings
        self._rng = random.Random(seed)
        self._mod = load_workload(body)
        self._target = Target(json.loads(target_json))
        with self._target:
            context = ms.TuneContext(
                self._mod,
                target=self._target,
                space_generator="post-order-apply",
                search_strategy="replay-trace",
                rand_state=self._rng.randrange(1, 2**31 - 1),
                num_threads=1,
            )
            sketches = context.generate_design_space()
        self._context = context
        self._postprocs = list(context.space_generator.postprocs or ())
        self._instructions: list[list[Any]] = []
        self._spaces: list[DesignSpace] = []
        for index, sketch in enumerate(sketches):
            self._instructions.append(list(sketch.trace.insts))
            self._spaces.append(DesignSpace(index, json.loads(trace_json(sketch.trace))))
        self._model = CostModel(self._spaces, self._settings.boost_rounds)
        self._trials: list[tuple[DesignSpace, Point, float | None]] = []
        self._trained_on = 0
        self._seen_points: set[tuple[int, Point]] = set()
        self._seen_modules: set[int] = set()
        self._seen_traces: set[str] = set()
        self._pending: dict[str, tuple[DesignSpace, Point]] = {}
        self._rejections: Counter[str] = Counter()
        self._produced = 0
        fastest = sorted(known, key=lambda trial: (trial.median_us is None, trial.median_us or 0.0))
        self.report(fastest[: settings.known_limit])
        for trial in fastest[settings.known_limit :]:
            self._seen_traces.add(sha256_hex(trial.trace))

    @property
    def space_sizes(self) -> list[int]:
        """Number of knobs of each design space."""
        return [len(space.knobs) for space in self._spaces]

    def report(self, trials: Sequence[KnownTrial]) -> None:
        """Learn the outcome of trials, own or foreign ones; traces of another design space are only not repeated."""
        for trial in trials:
            digest = sha256_hex(trial.trace)
            self._seen_traces.add(digest)
            found = self._pending.pop(digest, None) or self._locate(trial.trace)
            if found is not None:
                space, point = found
                self._seen_points.add((space.index, point))
                self._trials.append((space, point, trial.median_us))

    def generate(self, count: int) -> list[str]:
        """New schedules to measure.

        Args:
            count: How many at most.

        Returns:
            Traces as JSON, none of them returned or known before; fewer or none when the space seems exhausted.

        Raises:
            SearchFailed: Not a single valid schedule has been found for this task yet, and neither was one now.
        """
        deadline = time.monotonic() + self._settings.batch_seconds
        attempts = count * self._settings.attempts_per_candidate
        found: list[str] = []
        repeats = 0  # since the last new one
        ranked = iter(self._proposals(count))
        while len(found) < count and attempts > 0 and repeats < self._settings.repeats_to_exhaust:
            if found and time.monotonic() > deadline:
                break
            attempts -= 1
            exploring = self._rng.random() < self._settings.epsilon
            proposal = None if exploring else next(ranked, None)
            if proposal is not None:
                self._seen_points.add((proposal[0].index, proposal[1]))  # also when it turns out invalid or a duplicate
            applied = self._apply(*proposal) if proposal else self._draw()
            if applied is None:
                continue
            if self._is_new(applied):
                found.append(applied.trace)
                repeats = 0
            else:
                repeats += 1
        self._produced += len(found)
        if not self._produced and not self._trials:
            reasons = ", ".join(f"{reason} {number}" for reason, number in self._rejections.most_common(3))
            raise SearchFailed(f"no valid schedule among the samples of {len(self._spaces)} design spaces ({reasons})")
        return found

    def _is_new(self, applied: _Applied) -> bool:
        digest = sha256_hex(applied.trace)
        if applied.module_hash in self._seen_modules or digest in self._seen_traces:
            self._rejections["duplicate"] += 1
            return False
        self._seen_modules.add(applied.module_hash)
        self._seen_traces.add(digest)
        if applied.point is not None:
            self._seen_points.add((applied.space.index, applied.point))
            self._pending[digest] = (applied.space, applied.point)
        return True

    def _locate(self, trace: str) -> tuple[DesignSpace, Point] | None:
        try:
            parsed = json.loads(trace)
            for space in self._spaces:
                if (point := space.point_of(parsed)) is not None:
                    return space, point
        except (ValueError, TypeError, LookupError):  # another tool's trace, or a broken one
            pass
        return None

    def _proposals(self, count: int) -> list[tuple[DesignSpace, Point]]:
        """Points that the model likes best, best first; none while there is too little to learn from."""
        elites = sorted(
            ((space, point, latency) for space, point, latency in self._trials if latency is not None),
            key=lambda trial: trial[2],
        )
        if len(self._trials) < max(_MIN_TRIALS_TO_TRAIN, self._settings.random_first) or not elites:
            return []
        if self._trained_on != len(self._trials):
            self._model.train(self._trials, seed=self._rng.randrange(2**31))
            self._trained_on = len(self._trials)
        parents = [(space, point) for space, point, _ in elites[: max(16, len(elites) // 8)]]
        by_space: dict[int, list[Point]] = {}
        for space, point, _ in self._trials:
            by_space.setdefault(space.index, []).append(point)
        scored: dict[tuple[int, Point], float] = {}
        for _ in range(self._settings.generations):
            fresh: dict[tuple[int, Point], tuple[DesignSpace, Point]] = {}
            for _ in range(self._settings.proposals):
                space, point = self._offspring(parents, by_space)
                key = (space.index, point)
                if key not in scored and key not in self._seen_points:
                    fresh[key] = (space, point)
            if not fresh:
                break
            scores = self._model.predict(list(fresh.values()))
            scored.update(zip(fresh, scores.tolist(), strict=True))
            best = sorted(scored, key=scored.__getitem__, reverse=True)[: max(32, 2 * count)]
            parents = [(self._spaces[index], point) for index, point in best]
            parents += [(space, point) for space, point, _ in elites[:8]]
        ranked = sorted(scored, key=scored.__getitem__, reverse=True)
        return [(self._spaces[index], point) for index, point in ranked]

    def _offspring(
        self, parents: Sequence[tuple[DesignSpace, Point]], by_space: dict[int, list[Point]]
    ) -> tuple[DesignSpace, Point]:
        rng = self._rng
        space, point = parents[min(rng.randrange(len(parents)), rng.randrange(len(parents)))]
        chance = rng.random()
        if chance < 0.15:
            return space, space.redraw(point, rng)
        if chance < 0.35:
            partner_space, partner = rng.choice(parents)
            if partner_space is space:
                return space, space.mutate(space.cross(point, partner, rng), rng)
        if chance < 0.45:
            index = rng.choice(list(by_space))
            return self._spaces[index], self._spaces[index].mutate(rng.choice(by_space[index]), rng)
        return space, space.mutate(point, rng)

    def _draw(self) -> _Applied | None:
        """A random schedule, decided by TVM while it is applied."""
        return self._apply(self._rng.choice(self._spaces), None) if self._spaces else None

    def _apply(self, space: DesignSpace, point: Point | None) -> _Applied | None:
        instructions = self._instructions[space.index]
        decisions: dict[Any, Any] = {}
        if point is not None:
            instructions = list(instructions)
            for knob, value in zip(space.knobs, point, strict=True):
                if knob.kind == "parallel":
                    instructions[knob.position] = _with_limit(instructions[knob.position], knob, value)
                else:
                    decisions[instructions[knob.position]] = list(value) if isinstance(value, tuple) else value
        schedule = Schedule(self._mod, seed=self._rng.randrange(1, 2**31 - 1), debug_mask=0, error_render_level="none")
        try:
            Trace(instructions, decisions).apply_to_schedule(schedule, remove_postproc=True)
            schedule.enter_postproc()
            for postproc in self._postprocs:
                if not postproc.apply(schedule):
                    self._rejections[str(postproc).rsplit(".", 1)[-1].split("(")[0]] += 1
                    return None
        except Exception as error:  # a ScheduleError, or a check inside a primitive
            self._rejections[type(error).__name__] += 1
            return None
        text = trace_json(schedule.trace)
        return _Applied(
            text,
            space,
            space.point_of(json.loads(text)),
            tvm_ffi.structural_hash(schedule.mod),
        )


def _with_limit(instruction: Any, knob: Knob, limit: Any) -> Any:
    return Instruction(instruction.kind, [instruction.inputs[0], limit], instruction.attrs, instruction.outputs)
