"""The SQLite store when processes die, disks fill up, files are foreign and directories cannot be written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.record_values import make_record, make_workload
from tests.fault.store_writer import WORKLOAD
from tuner_core.errors import StoreError, UnavailableError, UsageError
from tuner_core.model import Record, trace_digest
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.open import open_store
from tuner_core.store.sqlite import SqliteStore, connections
from tuner_core.store.sqlite.rows import RecordWriter
from tuner_core.store.sqlite.schema import MIGRATIONS, Migration, upgrade

MATMUL = make_workload("matmul")
ROOT = Path(__file__).parents[2]


def start_writer(path: Path, first: int, count: int, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fault.store_writer", str(path), str(first), str(count), str(threads)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def run_script(script: str, *arguments: object) -> str:
    """Run a script in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def everything(store: RecordStore) -> list[Record]:
    found: list[Record] = []
    cursor = None
    while True:
        page = store.query(RecordFilter(include_failed=True), limit=1_000, cursor=cursor)
        found += page.records
        cursor = page.next_cursor
        if cursor is None:
            return found


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


class TestCrash:
    def test_every_acknowledged_record_survives_a_killed_process_exactly_once(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        acknowledged: set[str] = set()
        for round_number, kill_after in enumerate((1, 13, 40, 97)):
            # each process writes the last one's records again, and then new ones
            process = start_writer(path, first=max(0, round_number - 1) * 300, count=600, threads=4)
            assert process.stdout is not None
            for _ in range(kill_after):
                acknowledged.add(process.stdout.readline().strip())
            process.kill()
            acknowledged.update(line.strip() for line in process.stdout if line.endswith("\n"))
            process.wait()
            process.stdout.close()
            with contextlib.closing(SqliteStore(path)) as store:
                stored = [record.trial_id for record in everything(store)]
                assert len(stored) == len(set(stored))
                assert acknowledged <= set(stored)
                assert all(store.get(trial_id) is not None for trial_id in acknowledged)
            with contextlib.closing(sqlite3.connect(path)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    def test_processes_write_and_read_the_same_file_at_the_same_time(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        with contextlib.closing(SqliteStore(path)) as store:
            writers = [start_writer(path, first, count=120, threads=2) for first in (0, 60, 120)]
            seen = 0
            while any(writer.poll() is None for writer in writers):
                records = everything(store)
                assert len(records) >= seen
                assert len({record.trial_id for record in records}) == len(records)
                seen = len(records)
                store.commit([make_record(WORKLOAD, 10_000 + seen)], [WORKLOAD])
            for writer in writers:
                assert writer.returncode == 0
                assert writer.stdout is not None
                writer.stdout.close()
            stored = {record.trial_id for record in everything(store)}
            assert {make_record(WORKLOAD, number).trial_id for number in range(240)} <= stored


class TestDurability:
    def test_the_log_is_synced_at_every_commit(self, tmp_path: Path) -> None:
        with contextlib.closing(SqliteStore(tmp_path / "records.db")) as store:
            connection = store._writer._connection
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)

    def test_waiting_commits_share_one_transaction(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        with contextlib.closing(SqliteStore(path)) as store, contextlib.closing(sqlite3.connect(path)) as other:
            store.commit([], [MATMUL])
            statements: list[str] = []
            store._writer._connection.set_trace_callback(statements.append)
            other.execute("BEGIN IMMEDIATE")  # holds the first commit up, so that the others queue
            with ThreadPoolExecutor(16) as pool:
                done = [pool.submit(store.commit, [make_record(MATMUL, number)]) for number in range(16)]
                while len(store._writer._queue) < 15:
                    threading.Event().wait(0.01)
                other.rollback()
                assert sum(future.result().stored for future in done) == 16
            assert statements.count("COMMIT") == 2

    def test_reading_does_not_wait_for_a_writer(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        record = make_record(MATMUL)
        with contextlib.closing(SqliteStore(path)) as store, contextlib.closing(sqlite3.connect(path)) as other:
            store.commit([record], [MATMUL])
            other.execute("BEGIN IMMEDIATE")
            other.execute("DELETE FROM records")
            assert store.top(record.key) == [record]
            other.rollback()

    def test_a_store_held_by_another_process_is_unavailable_not_wrong(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connections, "_BUSY_TIMEOUT_MS", 50)
        path = tmp_path / "records.db"
        with contextlib.closing(SqliteStore(path)) as store, contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(UnavailableError) as error:
                store.commit([make_record(MATMUL)], [MATMUL])
            assert str(path) in one_line(error)
            other.rollback()
            assert store.commit([make_record(MATMUL)], [MATMUL]).stored == 1


class TestCost:
    def test_a_keyed_look_up_costs_the_same_in_a_store_forty_times_as_large(self, tmp_path: Path) -> None:
        wanted = make_record(MATMUL, 0, median_us=5.0)
        neighbours = [make_record(MATMUL, number) for number in range(1, 60)]
        with contextlib.closing(SqliteStore(tmp_path / "records.db")) as store:
            store.commit([wanted, *neighbours], [MATMUL])
            self.steps(store, wanted)  # the first query reads the catalogue, a later one what changed since
            before = self.steps(store, wanted)
            others = [make_workload(f"other {number}") for number in range(40)]
            for other in others:
                store.commit([make_record(other, number) for number in range(60)], [other])
            self.steps(store, wanted)
            assert self.steps(store, wanted) == before

    @staticmethod
    def steps(store: SqliteStore, wanted: Record) -> list[int]:
        """Instructions of SQLite's virtual machine for a look-up, a get and a query by workload."""
        counts = []
        for call in (
            lambda: store.top(wanted.key, 8),
            lambda: [store.get(wanted.trial_id)],
            lambda: list(store.query(RecordFilter(workload_digest=MATMUL.digest), limit=8).records),
        ):
            count = 0

            def tick() -> int:
                nonlocal count
                count += 1
                return 0

            with store._readers.reading() as connection:  # the pool lends this one again for the call
                connection.set_progress_handler(tick, 1)
            assert call()[0] == wanted
            with store._readers.reading() as connection:
                connection.set_progress_handler(None, 0)
            counts.append(count)
        assert all(counts)
        return counts


class TestRefusal:
    def test_a_newer_schema_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        SqliteStore(path).close()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA user_version = {MIGRATIONS[-1].version + 1}")
        before = path.read_bytes()
        with pytest.raises(StoreError) as error:
            SqliteStore(path)
        text = one_line(error)
        assert f"schema {MIGRATIONS[-1].version + 1}" in text
        assert "upgrade" in text
        assert path.read_bytes() == before

    def test_a_database_of_another_program_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE notes (text)")
            connection.commit()
        with pytest.raises(StoreError, match="another program") as error:
            SqliteStore(path)
        one_line(error)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("notes",)]

    def test_a_file_that_is_no_database_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        path.write_text("these are not records\n" * 100)
        with pytest.raises(StoreError, match="not a record store") as error:
            SqliteStore(path)
        one_line(error)

    def test_a_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError) as error:
            SqliteStore(tmp_path)
        assert str(tmp_path) in one_line(error)

    @pytest.mark.parametrize("url", ["records.db", "sqlite://", "sqlite:///", "sqlite://host/x.db", "mysql://x/y"])
    def test_what_is_no_store_url_is_a_usage_error(self, url: str) -> None:
        with pytest.raises(UsageError) as error:
            open_store(url)
        assert "sqlite:///" in one_line(error)

    def test_a_url_may_have_blanks_and_extra_slashes(self, tmp_path: Path) -> None:
        for url in (f"sqlite://{tmp_path}/my%20records.db", f"sqlite:///{tmp_path}/my records.db"):
            open_store(url).close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["my records.db"]


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can enter; pytest's own are private."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class TestUnwritable:
    # root may write everywhere: the process gives that up after its imports
    SCRIPT = """
        import os, sys
        from tuner_core.errors import StoreError
        from tuner_core.store.sqlite import SqliteStore
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            SqliteStore(sys.argv[1])
        except StoreError as error:
            print(error)
    """

    @pytest.mark.parametrize("inside", ["records.db", "deeper/records.db"])
    def test_a_directory_that_cannot_be_written_is_refused(self, open_directory: Path, inside: str) -> None:
        open_directory.chmod(0o555)
        said = run_script(self.SCRIPT, open_directory / inside)
        assert said.count("\n") == 1
        assert str(open_directory) in said
        assert list(open_directory.iterdir()) == []

    def test_a_store_file_that_cannot_be_written_is_refused(self, open_directory: Path) -> None:
        path = open_directory / "records.db"
        SqliteStore(path).close()
        path.chmod(0o444)
        open_directory.chmod(0o555)
        said = run_script(self.SCRIPT, path)
        assert said.count("\n") == 1
        assert str(path) in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a file system; the file size limit stands in for it")
    yield path
    subprocess.run(["umount", path], check=True)


class TestFullDisk:
    def test_a_full_disk_loses_nothing_and_commits_go_on_when_there_is_space(self, small_disk: Path) -> None:
        path = small_disk / "records.db"
        with contextlib.closing(SqliteStore(path)) as store:
            store.commit([make_record(MATMUL, number) for number in range(50)], [MATMUL])
            filler = small_disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            acknowledged = 50
            with pytest.raises(StoreError) as error:
                while True:
                    store.commit([make_record(MATMUL, acknowledged)])
                    acknowledged += 1
            assert "space" in one_line(error)
            assert len(everything(store)) == acknowledged
            with pytest.raises(StoreError):
                store.commit([make_record(MATMUL, number) for number in range(1_000, 3_000)])
            filler.unlink()
            assert store.commit([make_record(MATMUL, acknowledged)]).stored == 1
            assert len(everything(store)) == acknowledged + 1
        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    def test_a_full_disk_at_the_start_is_one_clear_line(self, small_disk: Path) -> None:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(StoreError) as error:
            SqliteStore(small_disk / "records.db")
        assert "space" in one_line(error)

    def test_a_write_beyond_the_file_size_limit_loses_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        said = run_script(
            """
            import resource, sys
            from tests.contract.record_values import make_record, make_workload
            from tuner_core.errors import StoreError
            from tuner_core.store.sqlite import SqliteStore
            workload = make_workload("matmul")
            store = SqliteStore(sys.argv[1])
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            number = 0
            try:
                while True:
                    store.commit([make_record(workload, n) for n in range(number, number + 50)], [workload])
                    number += 50
            except StoreError as error:
                print(number)
                print(error)
            """,
            path,
        ).splitlines()
        assert len(said) == 2
        assert str(path) in said[1]
        with contextlib.closing(SqliteStore(path)) as store:
            stored = everything(store)
            assert len(stored) == int(said[0]) > 0
            assert stored[0] == make_record(MATMUL, 0)


class TestMigration:
    def open(self, path: Path) -> sqlite3.Connection:
        return connections.connect(str(path))

    def test_records_from_before_bounds_were_kept_and_of_older_writers_since_are_found(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        records = [make_record(MATMUL, number, job=f"job-{number % 3}", median_us=9.0 - number) for number in range(8)]
        with contextlib.closing(self.open(path)) as older:
            upgrade(older, str(path), MIGRATIONS[:2])
            writer = RecordWriter(older)
            writer.put_workload(MATMUL)
            for record in records[:4]:
                writer.put_record(record, trace_digest(record.trace))
            with contextlib.closing(SqliteStore(path)) as store:
                assert store.query(RecordFilter()).records == tuple(reversed(records[:4]))
                assert store.query(RecordFilter(job="job-1"), limit=1).records == (records[1],)
                # a process that was started before the upgrade goes on: it knows nothing of bounds
                for record in records[4:]:
                    writer.put_record(record, trace_digest(record.trace))
                assert store.query(RecordFilter()).records == tuple(reversed(records))
                assert store.query(RecordFilter(job="job-1"), limit=1).records == (records[7],)

    def test_pending_steps_run_in_order_and_keep_the_records(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        record = make_record(MATMUL)
        with contextlib.closing(SqliteStore(path)) as store:
            store.commit([record], [MATMUL])
        base = MIGRATIONS[-1].version
        later = (
            *MIGRATIONS,
            Migration(base + 1, ("ALTER TABLE records ADD COLUMN colour TEXT DEFAULT 'red'",)),
            Migration(base + 2, ("UPDATE records SET colour = colour || '-ish'", "CREATE TABLE extra (id)")),
        )
        with contextlib.closing(self.open(path)) as connection:
            upgrade(connection, str(path), later)
            upgrade(connection, str(path), later)  # nothing is left to do
            assert connection.execute("SELECT trial_id, colour FROM records").fetchall() == [
                (bytes.fromhex(record.trial_id), "red-ish")
            ]
            assert connection.execute("PRAGMA user_version").fetchone() == (base + 2,)
        with pytest.raises(StoreError, match="schema"):
            SqliteStore(path)  # this version does not know those steps

    def test_a_step_that_fails_leaves_the_version_before_it(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        SqliteStore(path).close()
        base = MIGRATIONS[-1].version
        broken = (
            *MIGRATIONS,
            Migration(base + 1, ("CREATE TABLE first_step (id)",)),
            Migration(base + 2, ("CREATE TABLE second_step (id)", "INSERT INTO nowhere VALUES (1)")),
        )
        with contextlib.closing(self.open(path)) as connection:
            with pytest.raises(sqlite3.OperationalError):
                upgrade(connection, str(path), broken)
            assert connection.execute("PRAGMA user_version").fetchone() == (base + 1,)
            names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            assert "first_step" in names
            assert "second_step" not in names

    def test_many_openers_of_a_new_file_make_one_schema(self, tmp_path: Path) -> None:
        path = tmp_path / "records.db"
        start = threading.Barrier(8)

        def opened(number: int) -> int:
            start.wait()
            with contextlib.closing(SqliteStore(path)) as store:
                return store.commit([make_record(MATMUL, number)], [MATMUL]).stored

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(opened, range(8))) == 8
        with contextlib.closing(SqliteStore(path)) as store:
            assert len(everything(store)) == 8

    def test_every_version_from_the_first_is_reached_without_a_gap(self) -> None:
        assert [migration.version for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_a_closed_store_leaves_no_file_open(tmp_path: Path) -> None:
    def open_files() -> set[str]:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        found = set()
        for link in links:
            with contextlib.suppress(OSError):
                found.add(str(link.readlink()))
        return {name for name in found if name.startswith(str(tmp_path))}

    store = SqliteStore(tmp_path / "records.db")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.commit([make_record(MATMUL, number)], [MATMUL]), range(8)))
        list(pool.map(lambda _: everything(store), range(8)))
    assert open_files()
    store.close()
    assert open_files() == set()
