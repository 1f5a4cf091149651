"""One task's search: draws schedules from MetaSchedule's design space, learns from their latencies, proposes new ones.

MetaSchedule's own evolutionary search applies, post-processes and featurises every member of every generation, 11 ms of
CPU each. Here generations live on decisions alone (:mod:`tuner_server.search.space`), and only what will be returned
is applied. The design space, the post-processors and the traces are MetaSchedule's.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from tuner_core.model import sha256_hex
from tuner_server.search.build_cost import cheaper
from tuner_server.search.cost_model import CostModel
from tuner_server.search.evolution import rank_offspring
from tuner_server.search.experience import Experience
from tuner_server.search.features import FeatureTable, Located
from tuner_server.search.messages import KnownTrial, SearchFailed, SearchSettings
from tuner_server.search.sketches import Applied, Rejected, Sketches
from tuner_server.search.space import DesignSpace, Point
from tuner_server.search.twins import Twins
from tuner_server.search.validity import ValidityModel

_MIN_PARENTS = 8
_RANDOM_PARENTS = 32  # for each space
_BASES = 24  # points of each space from which random ones are redrawn
_REDRAWS = 512
_ENOUGH = 8  # allowed ones, to take the first that is likely to be valid
_MOST_SEEN = 64  # before a space is taken to hold little else
_LIKELY = 0.5


class SearchSession:
    """The search of one workload for one target.

    Args:
        body: The workload's canonical JSON.
        target_json: The target.
        settings: How to search.
        seed: Equal seeds and equal reports give equal candidates.
        known: Trials from before: they are learned from, and their schedules not proposed again.
        experience: Of all sessions for this target; this one learns from it and adds to it.
        seeds: Traces that were good elsewhere, e.g. at another share of the device: proposed first, best first.

    Raises:
        UsageError: The workload is malformed, or holds what no operator needs.
    """

    def __init__(
        self,
        body: str,
        target_json: str,
        settings: SearchSettings,
        seed: int,
        known: Sequence[KnownTrial] = (),
        experience: Experience | None = None,
        seeds: Sequence[str] = (),
    ) -> None:
        self._settings = settings
        self._rng = random.Random(seed)
        self._sketches = Sketches(body, target_json, self._draw_seed())
        self._spaces = self._sketches.spaces
        table = FeatureTable(self._spaces)
        self._task = sha256_hex(body)
        self._experience = experience
        self._model = CostModel(table, settings.boost_rounds, experience, self._task)
        self._validity = ValidityModel(table)
        self._trials: list[tuple[DesignSpace, Point, float | None]] = []
        self._trained_on = 0
        self._bases: dict[int, list[Point]] = {
            space.index: [base] if base is not None and space.fixed_extents else []
            for space, base in zip(self._spaces, self._sketches.bases, strict=True)
        }
        self._seen_points: set[Located] = set()
        self._seen_modules: set[int] = set()
        self._seen_traces: set[str] = set()
        self._twins = Twins(self._sketches.target)
        self._pending: dict[str, Located] = {}
        self._ranked: Iterator[Located] = iter(())
        self._rejections: Counter[str] = Counter()
        self._valid = 0
        fastest = sorted(known, key=lambda trial: (trial.median_us is None, trial.median_us or 0.0))
        self.report(fastest[: settings.known_limit])
        for trial in fastest[settings.known_limit :]:
            self._seen_traces.add(sha256_hex(trial.trace))
        located = [place for seed_trace in seeds if (place := self._locate(seed_trace)) is not None]
        self._seeds = [place for place in dict.fromkeys(located) if place not in self._seen_points]

    @property
    def knobs(self) -> list[int]:
        """Number of knobs of each design space."""
        return [len(space.knobs) for space in self._spaces]

    @property
    def rejections(self) -> dict[str, int]:
        """How many schedules were tried in vain, by reason."""
        return dict(self._rejections)

    def report(self, trials: Sequence[KnownTrial]) -> None:
        """Learn the outcome of trials, own or foreign ones; traces of another design space are only not repeated."""
        for trial in trials:
            digest = sha256_hex(trial.trace)
            self._seen_traces.add(digest)
            located = self._pending.pop(digest, None)
            if located is None and (located := self._locate(trial.trace)) is not None:
                self._note(located)
                self._twins.add(*located)
            if located is not None:
                self._trials.append((*located, trial.median_us))
                if self._experience is not None:
                    self._experience.add(self._task, located, trial.median_us)

    def close(self) -> None:
        """Leave to the others what was learned, and nothing else."""
        if self._experience is not None:
            self._experience.forget_opinion(self._task)

    def generate(self, count: int, following: int = 0, continued: bool = False) -> list[str]:
        """New schedules to measure.

        Args:
            count: How many at most.
            following: So many more will be asked for at once: they are ranked together with these.
            continued: These are among those that were to follow the last ones.

        Returns:
            Traces as JSON, none of them returned or known before; fewer or none when the space seems exhausted.

        Raises:
            SearchFailed: Not a single valid schedule has been found for this task yet, and neither was one now.
        """
        start = time.process_time()  # which stands still while the process is paused
        found: list[str] = []
        repeats = 0  # since the last new one
        attempts = count * self._settings.attempts_per_candidate
        if not continued:
            self._ranked = iter(self._proposals(count + following))
        while len(found) < count and attempts > 0 and repeats < self._settings.repeats_to_exhaust:
            if time.process_time() - start > self._settings.batch_cpu_s * (1 if found else 3):
                break
            attempts -= 1
            space, point = self._next_point()
            if point is not None and self._twins.has(space, point):
                self._rejections["twin"] += 1
                continue
            applied = self._sketches.apply(space, point, self._draw_seed())
            valid = isinstance(applied, Applied)
            if applied.point is not None:
                self._validity.record((space, applied.point), valid)
            if isinstance(applied, Rejected):
                self._rejections[applied.reason] += 1
                if applied.point is not None:
                    self._note((space, applied.point))
                continue
            self._valid += 1
            if self._is_new(space, applied):
                found.append(applied.trace)
                repeats = 0
            else:
                self._rejections["duplicate"] += 1
                repeats += 1
        if not self._valid and not self._trials:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in self._rejections.most_common(3))
            raise SearchFailed(f"no valid schedule among the samples of {len(self._spaces)} design spaces ({reasons})")
        return found

    def _next_point(self) -> tuple[DesignSpace, Point | None]:
        if self._seeds:
            return self._seeds.pop(0)
        beginning = len(self._trials) < self._settings.random_first
        at_random = self._settings.random_share if beginning else self._settings.epsilon
        if self._rng.random() >= at_random and (proposal := next(self._ranked, None)) is not None:
            self._seen_points.add(proposal)  # also when it turns out to be a duplicate
            return proposal
        return self._random_point()

    def _random_point(self) -> tuple[DesignSpace, Point | None]:
        """A point drawn at random, invalid ones avoided; None as the point lets TVM draw it."""
        space = self._rng.choice(self._spaces)
        bases = self._bases[space.index]
        if len(bases) < self._bases_wanted(space):
            return space, None  # only TVM knows the extents of the loops
        allowed: list[Located] = []
        seen = 0
        for _ in range(_REDRAWS):
            located = (space, space.redraw(self._rng.choice(bases), self._rng))
            if located in self._seen_points:
                seen += 1
            elif self._sketches.allows(*located):
                allowed.append(located)
            if len(allowed) == _ENOUGH or seen == _MOST_SEEN:
                break
        probabilities = self._validity.probability(allowed)
        likely = [located for located, chance in zip(allowed, probabilities, strict=True) if chance >= _LIKELY]
        if likely and self._settings.cost_weight:
            return cheaper(likely, self._sketches.build_cost, self._rng)
        return next(iter(likely or allowed), (space, None))

    def _bases_wanted(self, space: DesignSpace) -> int:
        return 1 if space.fixed_extents and self._bases[space.index] else _BASES // 4

    def _acceptable(self, located: Located) -> bool:
        return located not in self._seen_points and self._sketches.allows(*located)

    def _proposals(self, count: int) -> list[Located]:
        """Points that the model likes best, best first; none while there is too little to learn from."""
        if self._trained_on != len(self._trials):
            self._model.train(self._trials, seed=self._rng.randrange(2**31))
            self._trained_on = len(self._trials)
        valid = sorted((trial for trial in self._trials if trial[2] is not None), key=lambda trial: trial[2] or 0.0)
        if len(self._trials) < self._settings.random_first and not (self._experience and self._model.ready):
            return []
        parents = [(space, point) for space, point, _ in valid]
        if len(parents) < _MIN_PARENTS:
            parents += self._random_parents()
        if not parents or not self._model.ready:
            return []
        return rank_offspring(
            parents,
            self._model,
            self._validity,
            self._acceptable,
            self._settings,
            count,
            self._rng,
            self._sketches.build_cost,
        )

    def _random_parents(self) -> list[Located]:
        """Random points of each space, with loop extents that TVM has decided."""
        parents = []
        for space in self._spaces:
            bases = self._bases[space.index]
            for _ in range(self._bases_wanted(space) - len(bases)):
                drawn = self._sketches.apply(space, None, self._draw_seed())
                if drawn.point is not None:
                    bases.append(drawn.point)
            if bases:
                parents += [(space, space.redraw(self._rng.choice(bases), self._rng)) for _ in range(_RANDOM_PARENTS)]
        return parents

    def _is_new(self, space: DesignSpace, applied: Applied) -> bool:
        digest = sha256_hex(applied.trace)
        if applied.module_hash in self._seen_modules or digest in self._seen_traces:
            return False
        self._seen_modules.add(applied.module_hash)
        self._seen_traces.add(digest)
        if applied.point is None:
            return True
        located = (space, applied.point)
        if self._twins.has(space, applied.point, applied.module):
            return False
        self._twins.add(*located)
        self._note(located)
        self._pending[digest] = located
        return True

    def _locate(self, trace: str) -> Located | None:
        try:
            parsed = json.loads(trace)
            for space in self._spaces:
                if (point := space.point_of(parsed)) is not None:
                    return space, point
        except (ValueError, TypeError, LookupError):  # another tool's trace, or a broken one
            pass
        return None

    def _note(self, located: Located) -> None:
        self._seen_points.add(located)
        space, point = located
        bases = self._bases[space.index]
        if len(bases) < _BASES:
            bases.append(point)

    def _draw_seed(self) -> int:
        return self._rng.randrange(1, 2**31 - 1)
