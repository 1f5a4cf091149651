"""The spool under any order of commits, outages, lost answers, crashes and replays."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.contract.record_values import make_record, make_workload
from tuner_core.errors import UnavailableError
from tuner_core.model import Record, Workload
from tuner_core.store.interface import CommitResult, RecordFilter
from tuner_core.store.spooled import SpooledStore
from tuner_core.store.sqlite import SqliteStore

WORKLOADS = [make_workload(f"operator {number}") for number in range(2)]
EVERYTHING = RecordFilter(include_failed=True)


class Unsteady(SqliteStore):
    """A shared store that can be away, or store a commit and lose the answer."""

    mode = "up"

    def commit(self, records: Sequence[Record], workloads: Iterable[Workload] = ()) -> CommitResult:
        if self.mode == "down":
            raise UnavailableError("down")
        result = super().commit(records, workloads)
        if self.mode == "mute" and (records or workloads):
            raise UnavailableError("the answer was lost")
        return result

    def get(self, trial_id: str) -> Record | None:
        if self.mode != "up":
            raise UnavailableError("down")
        return super().get(trial_id)


class SpoolMachine(RuleBasedStateMachine):
    """Whatever happens, each acknowledged record is in the shared store once when it answers again."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.acknowledged: list[str] = []
        self.next_number = 0
        Unsteady.mode = "up"
        self.open()
        self.store.commit([], WORKLOADS)

    def open(self) -> None:
        self.shared = Unsteady(Path(self.directory.name) / "shared.db")
        self.store = SpooledStore(self.shared, Path(self.directory.name) / "spool.db")

    @rule(count=st.integers(1, 4), again=st.booleans(), which=st.integers(0, 1))
    def commit(self, count: int, again: bool, which: int) -> None:
        first = max(0, self.next_number - 2) if again else self.next_number
        records = [make_record(WORKLOADS[number % 2], number) for number in range(first, first + count)]
        self.next_number = max(self.next_number, first + count)
        self.store.commit(records, [WORKLOADS[which]])
        self.acknowledged += [record.trial_id for record in records if record.trial_id not in self.acknowledged]

    @rule(mode=st.sampled_from(["up", "down", "mute"]))
    def change(self, mode: str) -> None:
        Unsteady.mode = mode

    @rule()
    def crash(self) -> None:
        """The process ends without a word: another one opens the same files."""
        self.store._closing.set()
        self.store._wake.set()
        self.store._replaying.join()
        self.open()

    @invariant()
    def every_acknowledged_record_is_somewhere(self) -> None:
        for trial_id in self.acknowledged[-4:]:
            assert self.store._spool.get(trial_id) or SqliteStore.get(self.shared, trial_id)

    def teardown(self) -> None:
        Unsteady.mode = "up"
        pause = threading.Event()
        for _ in range(3_000):
            if self.store.waiting == 0:
                break
            pause.wait(0.01)
        found = [record.trial_id for record in self.shared.query(EVERYTHING, limit=1_000).records]
        assert sorted(found) == sorted(self.acknowledged)
        in_order = self.shared.follow(EVERYTHING, "sqlite-0").records
        assert [record.trial_id for record in in_order] == self.acknowledged
        self.store.close()
        self.directory.cleanup()


TestSpool = SpoolMachine.TestCase
TestSpool.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
