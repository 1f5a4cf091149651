"""Design spaces as vectors of decisions, so that thousands of schedules can be drawn, mutated and compared unapplied.

MetaSchedule describes a space as a trace whose sampling instructions carry decisions. Applying a trace costs
milliseconds; changing a decision costs microseconds. A :class:`DesignSpace` holds the *knobs* of such a trace, a
*point* one value for each of them. Everything here works on the JSON of traces and knows nothing of TVM's objects.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Value = int | tuple[int, ...]
Point = tuple[Value, ...]

_PARALLEL = "meta_schedule.parallel"
_MAX_JOBS_PER_CORE = 16
# Shares of mutations, after MetaSchedule's default mutators (TileSize 0.9, ComputeLocation 0.05, Unroll 0.03, Parallel
# 0.02), flattened: every knob has to move within a few dozen trials.
_WEIGHTS = {"tile": 1.0, "location": 0.4, "categorical": 0.4, "unroll": 0.4, "parallel": 0.25}
_UNROLL = ("meta_schedule.unroll_explicit", "meta_schedule.unroll_implicit")
_MASKED = -1


@dataclass(frozen=True)
class Knob:
    """One decision of a space.

    Attributes:
        kind: ``tile`` (SamplePerfectTile), ``categorical`` (SampleCategorical), ``unroll`` (a SampleCategorical that
            limits unrolling), ``location`` (SampleComputeLocation) or ``parallel`` (the limit of the annotation
            ``meta_schedule.parallel``).
        position: Index of its instruction.
        options: Choices of a categorical or unroll knob; the limits of a parallel knob.
        levels: Number of factors of a tile.
        max_innermost: Largest innermost factor of a tile; 0: none.
    """

    kind: str
    position: int
    options: tuple[int, ...] = ()
    levels: int = 0
    max_innermost: int = 0


def _knob_of(position: int, instruction: Sequence[Any], unrolls: frozenset[str]) -> Knob | None:
    kind, inputs, attrs, outputs = instruction
    if kind == "SamplePerfectTile":
        return Knob("tile", position, levels=int(attrs[0]), max_innermost=int(attrs[1]))
    if kind == "SampleCategorical":
        use = "unroll" if outputs[0] in unrolls else "categorical"
        return Knob(use, position, options=tuple(range(len(attrs[0]))))
    if kind == "SampleComputeLocation":
        return Knob("location", position)
    if kind == "Annotate" and attrs == [_PARALLEL] and isinstance(inputs[1], int):
        cores = max(1, inputs[1] // _MAX_JOBS_PER_CORE)
        return Knob("parallel", position, options=tuple(sorted({cores * jobs for jobs in (1, 4, 16)} | {inputs[1]})))
    return None


def before_postprocessing(instructions: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
    """The instructions of a trace that belong to its space; what follows was derived by post-processors."""
    for index, instruction in enumerate(instructions):
        if instruction[0] == "EnterPostproc":
            return instructions[:index]
    return instructions


def _signature(instructions: Sequence[Sequence[Any]]) -> str:
    plain = []
    for kind, inputs, attrs, outputs in instructions:
        if kind == "Annotate" and attrs == [_PARALLEL]:
            inputs = [inputs[0], "limit"]
        plain.append([kind, inputs, attrs, outputs])
    return json.dumps(plain, separators=(",", ":"))


class DesignSpace:
    """One sketch of a task: its instructions and its knobs.

    Args:
        index: Position among the task's spaces.
        trace: The space's trace as parsed JSON, ``[instructions, decisions]``.

    Attributes:
        signature: Equal for two traces exactly when they are of the same space.
        knobs: What may be decided.
        fixed_extents: Whether every point's tiles have the same extents, so that one point is enough to redraw from.
        feature_names: Of :meth:`features`. Sketches of one operator share names: what is learned from one holds for
            the other.
    """

    def __init__(self, index: int, trace: Sequence[Any]) -> None:
        instructions = before_postprocessing(trace[0])
        self.index = index
        self.signature = _signature(instructions)
        unrolls = frozenset(
            str(inputs[1]) for kind, inputs, attrs, _ in instructions if kind == "Annotate" and attrs[0] in _UNROLL
        )
        knobs = (_knob_of(position, instruction, unrolls) for position, instruction in enumerate(instructions))
        self.knobs = tuple(knob for knob in knobs if knob is not None)
        self._weights = [_WEIGHTS[knob.kind] for knob in self.knobs]
        self._unroll_limits = {
            index: tuple(int(option) for option in instructions[knob.position][2][0])
            for index, knob in enumerate(self.knobs)
            if knob.kind == "unroll"
        }
        self.fixed_extents = all(knob.kind != "location" for knob in self.knobs)
        self._depths = sorted({knob.levels for knob in self.knobs if knob.levels})
        self.feature_names = tuple(self._feature_names())

    def _feature_names(self) -> Iterator[str]:
        counts: Counter[tuple[str, int]] = Counter()
        for knob in self.knobs:
            number = counts[knob.kind, knob.levels]
            counts[knob.kind, knob.levels] += 1
            if knob.levels:
                for level in range(knob.levels - 1, -1, -1):
                    yield f"tile{knob.levels}.{number}.{level}"
                    yield f"tile{knob.levels}.{number}.{level}.inner"
            else:
                yield f"{knob.kind}.{number}"
        for depth in self._depths:
            for level in range(depth):
                yield f"tile{depth}.sum.{level}"

    def point_of(self, trace: Sequence[Any]) -> Point | None:
        """The point that a trace took in this space.

        Args:
            trace: As parsed JSON, with or without what post-processors appended.

        Returns:
            None when the trace is not of this space, or has no decision for a knob.
        """
        instructions = before_postprocessing(trace[0])
        if _signature(instructions) != self.signature:
            return None
        decisions = dict(trace[1])
        values: list[Value] = []
        for knob in self.knobs:
            if knob.kind == "parallel":
                values.append(int(instructions[knob.position][1][1]))
                continue
            decision = decisions.get(knob.position)
            if decision is None:
                return None
            values.append(tuple(int(factor) for factor in decision) if knob.kind == "tile" else int(decision))
        return tuple(values)

    def features(self, point: Point) -> list[float]:
        """Numbers for the cost model: log2 of tile factors and of what lies inside them, choices as they are.

        The last entries are sums over all tiles of equal depth, level by level: the logarithm of a register tile's or
        a thread block's size, which no single knob shows.
        """
        row: list[float] = []
        sums = {(depth, level): 0.0 for depth in self._depths for level in range(depth)}
        for knob, value in zip(self.knobs, point, strict=True):
            if isinstance(value, tuple):
                inner = 0.0
                for level in range(len(value) - 1, -1, -1):
                    bits = math.log2(value[level]) if value[level] > 0 else 0.0
                    inner += bits
                    row += (bits, inner)
                    sums[len(value), level] += bits
            elif knob.kind == "parallel":
                row.append(math.log2(max(1, value)))
            else:
                row.append(float(value))
        return row + list(sums.values())

    def mutate(self, point: Point, rng: random.Random) -> Point:
        """A neighbour of a point: usually one knob changed, sometimes two or three."""
        if not self.knobs:
            return point
        values = list(point)
        for _ in range(1 + (rng.random() < 0.3) + (rng.random() < 0.1)):
            index = rng.choices(range(len(values)), self._weights)[0]
            values[index] = _changed(self.knobs[index], values[index], rng)
        return tuple(values)

    def redraw(self, point: Point, rng: random.Random) -> Point:
        """A random point, with the loop extents of another one."""
        return tuple(_redrawn(knob, value, rng) for knob, value in zip(self.knobs, point, strict=True))

    def without_unrolling(self, point: Point) -> Point:
        """The point with its limits of unrolling masked: points that agree here may well become the same code."""
        pairs = zip(self.knobs, point, strict=True)
        return tuple(_MASKED if knob.kind == "unroll" else value for knob, value in pairs)

    def unroll_limit(self, point: Point) -> int | None:
        """How many steps a point lets a loop be unrolled to; None when its space has no such limit, or several."""
        if len(self._unroll_limits) != 1:
            return None
        ((index, limits),) = self._unroll_limits.items()
        choice = point[index]
        return limits[choice] if isinstance(choice, int) else None

    def cross(self, first: Point, second: Point, rng: random.Random) -> Point:
        """Each knob from one of two parents."""
        return tuple(a if rng.random() < 0.5 else b for a, b in zip(first, second, strict=True))


def _changed(knob: Knob, value: Value, rng: random.Random) -> Value:
    if isinstance(value, tuple):
        return _moved_factor(value, knob.max_innermost, rng) if rng.random() < 0.8 else _redrawn(knob, value, rng)
    if knob.kind == "location":
        return max(-2, value + rng.choice((-3, -2, -1, 1, 2, 3)))
    others = [option for option in knob.options if option != value]
    return rng.choice(others) if others else value


def _redrawn(knob: Knob, value: Value, rng: random.Random) -> Value:
    if isinstance(value, tuple):
        return _random_tile(math.prod(value), len(value), knob.max_innermost, rng)
    if knob.kind == "location":
        return max(-2, value + rng.randint(-5, 5))  # TVM takes the nearest valid one
    if knob.kind == "parallel":
        return value
    return rng.choice(knob.options)


def _moved_factor(tile: tuple[int, ...], max_innermost: int, rng: random.Random) -> tuple[int, ...]:
    """Move a divisor from one level to another, as MetaSchedule's MutateTileSize does."""
    sources = [level for level, factor in enumerate(tile) if factor > 1]
    if not sources or len(tile) < 2:
        return tile
    source = rng.choice(sources)
    goal = rng.choice([level for level in range(len(tile)) if level != source])
    divisors = [d for d in range(2, tile[source] + 1) if tile[source] % d == 0]
    if max_innermost and goal == len(tile) - 1:
        divisors = [d for d in divisors if d * tile[goal] <= max_innermost]
    if not divisors:
        return tile
    divisor = rng.choice(divisors)
    moved = list(tile)
    moved[source] //= divisor
    moved[goal] *= divisor
    return tuple(moved)


def _random_tile(extent: int, levels: int, max_innermost: int, rng: random.Random) -> tuple[int, ...]:
    """Uniform among the ordered factorisations of ``extent``, as SamplePerfectTile draws them."""
    for _ in range(100):
        tile = [1] * levels
        for prime, exponent in Counter(_primes(extent)).items():
            bars = sorted(rng.sample(range(exponent + levels - 1), levels - 1))  # stars and bars
            ends = [-1, *bars, exponent + levels - 1]
            for level in range(levels):
                tile[level] *= prime ** (ends[level + 1] - ends[level] - 1)
        if not max_innermost or tile[-1] <= max_innermost:
            return tuple(tile)
    return (extent,) + (1,) * (levels - 1)


def _primes(number: int) -> list[int]:
    found = []
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    if number > 1:
        found.append(number)
    return found
