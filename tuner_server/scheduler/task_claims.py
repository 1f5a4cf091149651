"""The claims that one job holds on its tasks in the record store, so that no other job tunes them at the same time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tuner_core.errors import TunerError
from tuner_core.model import RecordKey, canonical_json, sha256_hex
from tuner_core.store.claims import Claims
from tuner_core.store.interface import RecordStore

log = logging.getLogger(__name__)
_T = TypeVar("_T")

TTL_S = 30.0
"""A holder that has not been heard of for so long is taken for dead."""


def claim_key(key: RecordKey) -> str:
    """What is claimed: a task, by everything that its records are looked up by."""
    parts = [key.workload_digest, key.target_digest, key.device_model, key.sm_count, key.tvm_version]
    return f"tune:{sha256_hex(canonical_json(parts))}"


@dataclass(frozen=True)
class Taken:
    """What came of a claim.

    Attributes:
        holder: The other job that holds it; empty: it is ours, or nobody can say.
        fresh: It is ours under a token that we have not had: somebody else may have held it meanwhile.
    """

    holder: str = ""
    fresh: bool = True


class TaskClaims:
    """Claims in one store, under one name.

    A store that cannot be reached, or keeps no claims, holds nothing up: tuning twice costs time, not records.

    Args:
        store: Where the claims are.
        holder: Who claims: the same after a restart, and for every instance that works for the job.
        ttl_s: How long a claim lasts without renewal.
    """

    def __init__(self, store: RecordStore, holder: str, ttl_s: float = TTL_S) -> None:
        self.holder = holder
        self.ttl_s = ttl_s
        self._store = store
        self._tokens: dict[int, tuple[str, int]] = {}

    @property
    def held(self) -> list[int]:
        """Tasks whose claim is ours, as far as we know."""
        return list(self._tokens)

    async def take(self, index: int, key: RecordKey) -> Taken:
        """Claim a task; one that is ours already stays so."""
        name = claim_key(key)
        claims = self._claims()
        claim = None
        if claims is not None:
            claim = await self._try("claim", partial(claims.claim, name, self.holder, self.ttl_s))
        before = self._tokens.get(index)
        if claim is None:
            return Taken(fresh=before is None)
        if not claim.mine:
            self._tokens.pop(index, None)
            return Taken(claim.holder)
        self._tokens[index] = (name, claim.token)
        return Taken(fresh=before != self._tokens[index])

    async def renew(self, index: int) -> bool:
        """Let a claim last; False when it is known not to be ours any more, and forgotten."""
        entry = self._tokens.get(index)
        claims = self._claims()
        if entry is None or claims is None:
            return True
        kept = await self._try("renew", partial(claims.renew, *entry, self.ttl_s))
        if kept is False and self._tokens.get(index) == entry:
            del self._tokens[index]
            return False
        return True

    async def release(self, index: int) -> None:
        """Give a task back; one that is not held is left alone."""
        name, token = self._tokens.pop(index, ("", 0))
        claims = self._claims()
        if name and claims is not None:
            await self._try("release", partial(claims.release, name, token))

    async def release_all(self) -> None:
        """Give everything back."""
        for index in self.held:
            await self.release(index)

    def _claims(self) -> Claims | None:
        try:
            return self._store.claims
        except TunerError:
            return None

    async def _try(self, what: str, action: Callable[[], _T]) -> _T | None:
        try:
            return await asyncio.to_thread(action)
        except TunerError as error:
            log.warning("cannot %s in the store (%s): another job may tune the same operators", what, error)
            return None
