"""The embedded record store: one SQLite file, WAL, durable commits."""

from tuner_core.store.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
