"""Claims in Redis. The clock is the server's."""

from __future__ import annotations

from tuner_core.model import sha256_hex
from tuner_core.store.claims import Claim, Claims, check_claim
from tuner_core.store.redis.connection import Connection

_KEEP_ENDED_MS = 86_400_000


class RedisClaims(Claims):
    """One hash per claim, changed by scripts.

    Args:
        connection: Of the store.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def claim(self, key: str, holder: str, ttl_s: float) -> Claim:
        """See :meth:`Claims.claim`."""
        check_claim(key, holder, ttl_s)
        ttl_ms = max(1, round(ttl_s * 1000))
        token, found, mine, left_ms = self._connection.script(
            "claim", [self._key(key)], [holder, ttl_ms, _KEEP_ENDED_MS]
        )
        return Claim(int(token), found.decode(), bool(mine), left_ms / 1000)

    def renew(self, key: str, token: int, ttl_s: float) -> bool:
        """See :meth:`Claims.renew`."""
        check_claim(key, "the holder", ttl_s)
        return self._change(key, token, max(1, round(ttl_s * 1000)))

    def release(self, key: str, token: int) -> bool:
        """See :meth:`Claims.release`."""
        return self._change(key, token, -1)

    def _change(self, key: str, token: int, ttl_ms: int) -> bool:
        return bool(self._connection.script("renew", [self._key(key)], [token, ttl_ms, _KEEP_ENDED_MS]))

    def _key(self, key: str) -> str:
        return self._connection.keys.claim(sha256_hex(key)[:32])
