"""Groups of records in memory: which of them match a filter, those with the best bound first.

A group is records that share everything but the schedule and its measurement: a million records are some ten thousand
groups. A backend keeps its groups here, each with a bound for every order: none of its records comes before that. A
page is then found in the few groups with the best bounds, however many match.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tuner_core.model import Record
from tuner_core.store.interface import RecordFilter
from tuner_core.store.shapes import parse_shape, shape_matches

ArgsInfo = tuple[tuple[str, str, tuple[int, ...]], ...]

EXACT = (
    "op",
    "model",
    "device_model",
    "sm_percent",
    "sm_count",
    "team",
    "job",
    "workload_digest",
    "target_digest",
    "tvm_version",
)
"""Fields of a record that a filter of the same name asks for as they are."""

# with a condition that leaves fewer than one group in so many, its groups are looked through instead of all
_NARROW = 8
# from so large a part of the groups on, sorting again costs less than moving each
_RESORT = 16
_FACTS_CACHED = 20_000
_TEXTS_KEPT = 100_000
_FAILED_US = float("inf")
_TEXTS = (
    "workload_digest",
    "target_json",
    "target_digest",
    "device_model",
    "device_arch",
    "tvm_version",
    "cuda_version",
    "driver_version",
    "job",
    "team",
    "model",
    "instance",
    "op",
    "description",
    "layout",
)


class Operator:
    """A workload under one description; ``groups`` are those of its records."""

    __slots__ = ("args_info", "description", "digest", "groups", "lowered")

    def __init__(self, digest: str, description: str, args_info: ArgsInfo) -> None:
        self.digest = digest
        self.description = description
        self.lowered = description.lower()
        self.args_info = args_info
        self.groups: set[Any] = set()


class Group:
    """Records that share everything but the schedule and its measurement.

    Attributes:
        name: Unique among the groups of a store, and never given to another.
        key: Stands for the look-up key of the records.
        shared: What they have in common, as a record with the rest left blank.
        best_us: No record has a lower median; infinity: all failed.
        newest: No record was created later.
        verified: Whether there may be a verified record.
    """

    __slots__ = ("best_us", "key", "name", "newest", "number", "operator", "shared", "verified")

    def __init__(self, name: Hashable, key: Hashable, shared: Record, args_info: ArgsInfo) -> None:
        self.name = name
        self.key = key
        self.shared = shared
        self.operator = Operator(shared.workload_digest, shared.description, args_info)
        self.number = -1
        self.best_us = _FAILED_US
        self.newest = float("-inf")
        self.verified = False

    @property
    def digest(self) -> str:
        """Of the workload."""
        return self.shared.workload_digest

    @property
    def place(self) -> tuple[str, str]:
        """Workload and device: what a nearest share is chosen for."""
        return self.shared.workload_digest, self.shared.device_model

    def bound(self, order: str) -> float:
        """No record of the group comes before this in the order."""
        return self.best_us if order == "latency" else -self.newest


G = TypeVar("G", bound=Group)
_Test = Callable[[Any], bool]


@dataclass(frozen=True)
class _Condition(Generic[G]):
    """One restriction of a filter: how many groups meet it, which these are, and whether one does."""

    size: int
    groups: Callable[[], Iterable[G]]
    test: _Test


@dataclass(frozen=True)
class Change(Generic[G]):
    """A group, new or known, and its bounds from now on."""

    group: G
    best_us: float
    newest: float
    verified: bool


class Selection(Generic[G]):
    """Groups whose records may match a filter.

    Attributes:
        share: About which part of all groups this is, at most; 1.0 where the filter restricts no group.
    """

    def __init__(
        self,
        index: GroupIndex[G],
        ordered: Iterable[tuple[float, int, G]],
        left: Sequence[_Test],
        tests: Sequence[_Test],
        share: float,
    ) -> None:
        self._index = index
        self._ordered = ordered
        self._left = _all_of(left)
        self._matches = _all_of(tests)
        self.share = share

    def __iter__(self) -> Iterator[tuple[float, G]]:
        """Bounds and groups, the best first. Lazy: whoever stops early has looked at few."""
        test = self._left
        return ((bound, group) for bound, _, group in self._ordered if test(group))

    def of_key(self, key: Hashable) -> list[G]:
        """Those of one look-up key."""
        return [group for group in self._index.at("key", key) if self._matches(group)]

    def of_place(self, place: tuple[str, str]) -> list[G]:
        """Those of one workload and device."""
        return [group for group in self._index.at("place", place) if self._matches(group)]


class GroupIndex(Generic[G]):
    """The groups of one store. Thread-safe: a selection stays as it is, whatever changes meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._readers = 0
        self._removed: list[Hashable] = []
        self._groups: dict[Hashable, G] = {}
        self._by_field: dict[str, dict[Any, set[G]]] = {name: {} for name in (*EXACT, "tag", "key", "place")}
        self._operators: dict[tuple[str, str], Operator] = {}
        self._numbers = 0
        # (bound, number, group), ascending; a list that a selection reads is replaced, not changed
        self._ordered: dict[str, list[tuple[float, int, G]]] = {"latency": [], "newest": []}
        self._lent: set[str] = set()
        self._texts: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def get(self, name: Hashable) -> G | None:
        """The group of that name."""
        return self._groups.get(name)

    def everything(self) -> list[G]:
        """All groups."""
        with self._lock:
            return list(self._groups.values())

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """No group is taken out before this ends: an older state of the store may still have records in it."""
        with self._lock:
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1

    def at(self, field: str, value: Any) -> list[G]:
        """The groups with this value of a field."""
        with self._lock:
            return list(self._by_field[field].get(value, ()))

    def change(self, changes: Sequence[Change[G]], removed: Iterable[Hashable] = ()) -> None:
        """Put groups in or move their bounds, and take others out, these once nobody reads."""
        with self._lock:
            self._removed += removed
            if self._readers:
                removed = ()
            else:
                removed, self._removed = self._removed, []
            gone = [group for group in map(self._groups.get, removed) if group is not None]
            for order in self._ordered:
                stale = [group for group in gone if group.number >= 0]
                moved = [c for c in changes if c.group.number < 0 or c.group.bound(order) != _bound(c, order)]
                stale += [change.group for change in moved if change.group.number >= 0]
                self._leave(order, stale)
            for group in gone:
                self._take_out(group)
            joining: dict[str, list[G]] = {order: [] for order in self._ordered}
            for change in changes:
                group = change.group
                for order, groups in joining.items():
                    if group.number < 0 or group.bound(order) != _bound(change, order):
                        groups.append(group)
                group.best_us, group.newest, group.verified = change.best_us, change.newest, change.verified
                if group.number < 0:
                    self._put_in(group)
            for order, groups in joining.items():
                self._join(order, groups)

    def select(self, where: RecordFilter, order: str) -> Selection[G]:
        """The groups whose records may match, ``verified_only`` and ``include_failed`` included."""
        with self._lock:
            conditions = self._conditions(where)
            everything = max(1, len(self._groups))
            narrowest = min(conditions, key=lambda condition: condition.size, default=None)
            left: list[_Test] = [condition.test for condition in conditions if condition is not narrowest]
            if where.verified_only:
                left.append(lambda group: group.verified)
            if not where.include_failed:
                left.append(lambda group: group.best_us != _FAILED_US)
            tests = left if narrowest is None else [narrowest.test, *left]
            share = 1.0 if narrowest is None else narrowest.size / everything
            if narrowest is None or narrowest.size * _NARROW > everything:
                self._lent.add(order)
                return Selection(self, self._ordered[order], tests, tests, share)
            candidates = list(narrowest.groups())
        test = _all_of(left)
        chosen = sorted((group.bound(order), group.number, group) for group in candidates if test(group))
        return Selection(self, chosen, (), tests, share)

    def _conditions(self, where: RecordFilter) -> list[_Condition[G]]:
        found = [self._exact(name, value) for name in EXACT if (value := getattr(where, name)) not in ("", None)]
        if where.min_sm_percent is not None or where.max_sm_percent is not None:
            low = where.min_sm_percent or 0
            high = 100 if where.max_sm_percent is None else where.max_sm_percent
            shares = [groups for share, groups in self._by_field["sm_percent"].items() if low <= share <= high]
            found.append(_of_sets(shares, lambda group: low <= group.shared.sm_percent <= high))
        if where.text:
            part = where.text.lower()
            found.append(self._of_operators(lambda operator: part in operator.lowered))
        if where.dtype:
            dtype = where.dtype
            found.append(self._of_operators(lambda operator: any(kind[1] == dtype for kind in operator.args_info)))
        if where.shape:
            shape = parse_shape(where.shape)
            found.append(self._of_operators(lambda o: shape_matches(shape, o.args_info, o.description)))
        found += [self._tagged(name, value) for name, value in where.tags.items()]
        if where.since is not None:
            found.append(self._since(where.since))
        return found

    def _exact(self, name: str, value: Any) -> _Condition[G]:
        return _of_sets([self._by_field[name].get(value, set())], lambda group: getattr(group.shared, name) == value)

    def _tagged(self, name: str, value: str) -> _Condition[G]:
        groups = self._by_field["tag"].get((name, value), set())
        return _of_sets([groups], lambda group: group.shared.tags.get(name) == value)

    def _of_operators(self, wanted: Callable[[Operator], bool]) -> _Condition[G]:
        operators = {operator for operator in self._operators.values() if wanted(operator)}
        return _of_sets([operator.groups for operator in operators], lambda group: group.operator in operators)

    def _since(self, since: float) -> _Condition[G]:
        ordered = self._ordered["newest"]
        size = bisect.bisect_right(ordered, -since, key=lambda entry: entry[0])
        return _Condition(size, lambda: [entry[2] for entry in ordered[:size]], lambda group: group.newest >= since)

    def _own(self, order: str) -> list[tuple[float, int, G]]:
        """The list of an order, to be changed."""
        if order in self._lent:
            self._lent.discard(order)
            self._ordered[order] = list(self._ordered[order])
        return self._ordered[order]

    def _leave(self, order: str, groups: Sequence[G]) -> None:
        if not groups:
            return
        ordered = self._own(order)
        if len(groups) * _RESORT > len(ordered):
            numbers = {group.number for group in groups}
            self._ordered[order] = [entry for entry in ordered if entry[1] not in numbers]
            return
        for group in groups:
            del ordered[bisect.bisect_left(ordered, (group.bound(order), group.number))]

    def _join(self, order: str, groups: Sequence[G]) -> None:
        if not groups:
            return
        ordered = self._own(order)
        if len(groups) * _RESORT > len(ordered):
            ordered += [(group.bound(order), group.number, group) for group in groups]
            ordered.sort()
            return
        for group in groups:
            bisect.insort(ordered, (group.bound(order), group.number, group))

    def _put_in(self, group: G) -> None:
        self._numbers += 1
        group.number = self._numbers
        self._intern(group.shared)
        place = (group.operator.digest, group.operator.description)
        group.operator = self._operators.setdefault(place, group.operator)
        group.operator.groups.add(group)
        self._groups[group.name] = group
        for field, value in _places(group):
            self._by_field[field].setdefault(value, set()).add(group)

    def _take_out(self, group: G) -> None:
        del self._groups[group.name]
        operator = group.operator
        operator.groups.discard(group)
        if not operator.groups:
            del self._operators[operator.digest, operator.description]
        for field, value in _places(group):
            groups = self._by_field[field][value]
            groups.discard(group)
            if not groups:
                del self._by_field[field][value]

    def _intern(self, shared: Record) -> None:
        """One object for the same text in thousands of groups."""
        if len(self._texts) > _TEXTS_KEPT:
            self._texts.clear()
        for name in _TEXTS:
            value = getattr(shared, name)
            object.__setattr__(shared, name, self._texts.setdefault(value, value))


N = TypeVar("N", bound=Hashable)


class SharedFacts(Generic[N, G]):
    """What the records of groups have in common, by the group's name; of groups outside the index, too. Thread-safe.

    Args:
        index: Whose groups know it themselves.
    """

    def __init__(self, index: GroupIndex[G]) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._cached: OrderedDict[N, Record] = OrderedDict()

    def of(self, names: Iterable[N], read: Callable[[list[N]], dict[N, Record]]) -> dict[N, Record]:
        """By name.

        Args:
            names: Of the groups.
            read: Reads those that are not known from the store; a group that was just deleted may be missing.
        """
        found: dict[N, Record] = {}
        missing: list[N] = []
        with self._lock:
            for name in names:
                group = self._index.get(name)
                record = self._cached.get(name) if group is None else group.shared
                if record is None:
                    missing.append(name)
                else:
                    found[name] = record
        if missing:
            fresh = read(missing)
            found |= fresh
            with self._lock:
                self._cached |= fresh
                while len(self._cached) > _FACTS_CACHED:
                    self._cached.popitem(last=False)
        return found


def _all_of(tests: Sequence[_Test]) -> _Test:
    if not tests:
        return lambda group: True
    first, *rest = tests
    if not rest:
        return first
    further = _all_of(rest)
    return lambda group: first(group) and further(group)


def nearest_first(sm_percent: int, shares: Iterable[int]) -> list[int]:
    """Shares by their distance from one, of two equally near ones the lower first."""
    return sorted(shares, key=lambda share: (abs(share - sm_percent), share))


def _bound(change: Change[G], order: str) -> float:
    return change.best_us if order == "latency" else -change.newest


def _of_sets(sets: Sequence[Set[Any]], test: _Test) -> _Condition[Any]:
    return _Condition(sum(map(len, sets)), lambda: [group for groups in sets for group in groups], test)


def _places(group: Group) -> list[tuple[str, Any]]:
    places: list[tuple[str, Any]] = [(name, getattr(group.shared, name)) for name in EXACT]
    places += [("key", group.key), ("place", group.place)]
    places.extend(("tag", item) for item in group.shared.tags.items())
    return places
