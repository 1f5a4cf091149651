"""One job at a time tunes a task: claims in the record store tell jobs of other servers to wait for its records."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
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
POLL_S = 2.0


def claim_key(key: RecordKey) -> str:
    """What is claimed: a task, by everything that its records are looked up by."""
    parts = [key.workload_digest, key.target_digest, key.device_model, key.sm_count, key.tvm_version]
    return f"tune:{sha256_hex(canonical_json(parts))}"


class SingleFlight:
    """The claims of one job.

    A store that cannot be reached, or keeps no claims, holds nothing up: tuning twice costs time, not records.

    Args:
        store: Where the claims are.
        holder: This job, e.g. ``host-a/job-1``: the same after a restart.
        on_taken: Called with a task's index when it waited for another job and is this job's now.
        ttl_s: How long a claim lasts without renewal.
        poll_s: Pause between looks at claims of others.
    """

    def __init__(
        self,
        store: RecordStore,
        holder: str,
        on_taken: Callable[[int], Awaitable[None]],
        *,
        ttl_s: float = TTL_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._store = store
        self._holder = holder
        self._on_taken = on_taken
        self._ttl_s = ttl_s
        self._poll_s = poll_s
        self._mine: dict[int, tuple[str, int]] = {}
        self._waiting: dict[int, str] = {}
        self._keeper: asyncio.Task[None] | None = None

    async def begin(self, tasks: Mapping[int, RecordKey]) -> dict[int, str]:
        """Claim tasks.

        Args:
            tasks: Index to key.

        Returns:
            Those that another job holds, with its name; they are claimed as soon as it lets go of them.
        """
        held: dict[int, str] = {}
        claims = self._claims()
        if claims is None:
            return held
        for index, key in tasks.items():
            name = claim_key(key)
            if (holder := await self._take(claims, index, name)) is not None:
                held[index] = holder
                self._waiting[index] = name
        if self._mine or self._waiting:
            self._keeper = asyncio.create_task(self._keep(claims))
        return held

    async def let_go(self, index: int) -> None:
        """Release a task that is finished; one that is not held is left alone."""
        name, token = self._mine.pop(index, ("", 0))
        claims = self._claims()
        if name and claims is not None:
            await self._try("release", partial(claims.release, name, token))

    async def stop(self) -> None:
        """Release everything."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._waiting.clear()
        for index in list(self._mine):
            await self.let_go(index)

    def _claims(self) -> Claims | None:
        try:
            return self._store.claims
        except TunerError:
            return None

    async def _take(self, claims: Claims, index: int, name: str) -> str | None:
        """Claim one task. Returns: who else holds it, None when it is this job's or nobody can say."""
        claim = await self._try("claim", partial(claims.claim, name, self._holder, self._ttl_s))
        if claim is not None and not claim.mine:
            return claim.holder
        if claim is not None:
            self._mine[index] = (name, claim.token)
        return None

    async def _keep(self, claims: Claims) -> None:
        """Renew what is held and look whether what is awaited has become free, until cancelled."""
        renewed_at = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(self._poll_s)
            for index, name in list(self._waiting.items()):
                if await self._take(claims, index, name) is None:
                    del self._waiting[index]
                    await self._on_taken(index)
            now = asyncio.get_running_loop().time()
            if now - renewed_at < self._ttl_s / 3:
                continue
            renewed_at = now
            for index, (name, token) in list(self._mine.items()):
                kept = await self._try("renew", partial(claims.renew, name, token, self._ttl_s))
                if kept is False and self._mine.get(index) == (name, token):
                    log.warning("%s was overtaken on a task that it had claimed: it was out of reach", self._holder)
                    del self._mine[index]

    async def _try(self, what: str, action: Callable[[], _T]) -> _T | None:
        try:
            return await asyncio.to_thread(action)
        except TunerError as error:
            log.warning("cannot %s in the store (%s): another job may tune the same operators", what, error)
            return None
