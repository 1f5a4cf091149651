"""Claims in the store file. The clock is this host's: all who use the file run on it."""

from __future__ import annotations

import sqlite3
import time

from tuner_core.store.claims import Claim, Claims, check_claim
from tuner_core.store.sqlite.connections import Writer

_KEEP_ENDED_S = 86_400.0


class SqliteClaims(Claims):
    """Claims as rows, changed inside write transactions.

    Tokens are numbers of one counter for all keys, so they grow per key even after an old row was cleared away.

    Args:
        writer: Of the store.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def claim(self, key: str, holder: str, ttl_s: float) -> Claim:
        """See :meth:`Claims.claim`."""
        check_claim(key, holder, ttl_s)

        def work(connection: sqlite3.Connection) -> Claim:
            now = time.time()
            row = connection.execute("SELECT token, holder, ends_at FROM claims WHERE key = ?", (key,)).fetchone()
            if row is not None and row[2] > now:
                if row[1] != holder:
                    return Claim(row[0], row[1], False, row[2] - now)
                connection.execute("UPDATE claims SET ends_at = ? WHERE key = ?", (now + ttl_s, key))
                return Claim(row[0], holder, True, ttl_s)
            connection.execute("DELETE FROM claims WHERE ends_at < ?", (now - _KEEP_ENDED_S,))
            connection.execute("DELETE FROM claims WHERE key = ?", (key,))
            token = connection.execute(
                "INSERT INTO claims (key, holder, ends_at) VALUES (?, ?, ?)", (key, holder, now + ttl_s)
            ).lastrowid
            return Claim(token or 0, holder, True, ttl_s)

        return self._writer.run(work)

    def renew(self, key: str, token: int, ttl_s: float) -> bool:
        """See :meth:`Claims.renew`."""
        check_claim(key, "the holder", ttl_s)
        return self._change(
            "UPDATE claims SET ends_at = ? WHERE key = ? AND token = ?", (time.time() + ttl_s, key, token)
        )

    def release(self, key: str, token: int) -> bool:
        """See :meth:`Claims.release`."""
        return self._change("DELETE FROM claims WHERE key = ? AND token = ?", (key, token))

    def _change(self, sql: str, parameters: tuple[object, ...]) -> bool:
        return self._writer.run(lambda connection: connection.execute(sql, parameters).rowcount == 1)
