"""Claims: who works on a thing at the moment, so that two teams do not tune the same workload at once.

A claim is a lease with a fencing token. It ends by itself when its holder stops renewing it, and the next claimer gets
a larger token: whoever still works under the old one can see, with :meth:`Claims.renew`, that it was overtaken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from tuner_core.errors import UsageError


@dataclass(frozen=True)
class Claim:
    """Who holds a key.

    Attributes:
        token: Fencing token of the current holder; grows with every new holder of the key.
        holder: Its name.
        mine: Whether the caller is the holder.
        expires_in_s: How long the claim still lasts unless it is renewed.
    """

    token: int
    holder: str
    mine: bool
    expires_in_s: float


class Claims(ABC):
    """Claims by key, kept where the records are. Thread-safe; every method blocks.

    Raises (any method):
        UsageError: An empty key or holder, or a time to live that is not positive.
        StoreError, UnavailableError: As of the store; nothing is known about the claim then.
    """

    @abstractmethod
    def claim(self, key: str, holder: str, ttl_s: float) -> Claim:
        """Take a key unless somebody else holds it. The holder itself keeps its token and gets the new time.

        Args:
            key: What is claimed.
            holder: Name of the claimer, unique among all that may claim.
            ttl_s: How long the claim lasts without :meth:`renew`.

        Returns:
            The claim as it stands now; its ``mine`` says who won.
        """

    @abstractmethod
    def renew(self, key: str, token: int, ttl_s: float) -> bool:
        """Let a claim last ``ttl_s`` from now; False when it is no longer the caller's. A late renewal counts as
        long as nobody else has taken the key."""

    @abstractmethod
    def release(self, key: str, token: int) -> bool:
        """Give a key back; False when it was no longer the caller's."""


def check_claim(key: str, holder: str, ttl_s: float) -> None:
    """Raise UsageError unless the arguments of :meth:`Claims.claim` make sense."""
    if not key or not holder:
        raise UsageError("a claim needs a key and a holder")
    if not 0 < ttl_s <= 86_400:
        raise UsageError(f"a claim lasts more than 0 and at most 86400 s, not {ttl_s}")
