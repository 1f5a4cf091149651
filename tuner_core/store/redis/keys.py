"""Names of the store's keys.

Everything about one workload has the hash tag ``{DIGEST}`` and so lives in one slot of a cluster: one script changes
it as a whole. What spans workloads (catalogue of changes, events) has the tag ``{index}``; the way from a trial to its
workload is spread over 65,536 small hashes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkloadKeys:
    """Keys of one workload.

    Attributes:
        root: ``PREFIX:{DIGEST}:``.
    """

    root: str

    @property
    def workload(self) -> str:
        """Hash: the workload itself."""
        return self.root + "workload"

    @property
    def records(self) -> str:
        """Hash: trial id to packed record."""
        return self.root + "records"

    @property
    def heads(self) -> str:
        """Hash: group id to its counts and its best."""
        return self.root + "heads"

    @property
    def changes(self) -> str:
        """Sorted set: group id by the stamp of its last change."""
        return self.root + "changes"

    @property
    def facts(self) -> str:
        """Hash: group id to what its records have in common."""
        return self.root + "facts"

    @property
    def condemned(self) -> str:
        """Hash: look-up key and schedule to the stamp at which it was found wrong."""
        return self.root + "condemned"

    @property
    def outbox(self) -> str:
        """List: trial ids that may not be published yet."""
        return self.root + "outbox"

    @property
    def meta(self) -> str:
        """Hash: last stamp ``s``, number of the first entry of the outbox ``o``."""
        return self.root + "meta"

    @property
    def days(self) -> str:
        """Hash: day to the number of records created on it."""
        return self.root + "days"

    @property
    def pending(self) -> str:
        """Hash: trial ids whose schedule was found wrong and whose indexes do not say so yet, to the stamp."""
        return self.root + "pending"

    def shared(self, key: bytes) -> str:
        """Sorted set of a look-up key: valid shared records by latency."""
        return f"{self.root}shared:{key.hex()}"

    def verified(self, key: bytes) -> str:
        """Sorted set of a look-up key: valid verified records by latency."""
        return f"{self.root}verified:{key.hex()}"

    def group(self, group: bytes) -> tuple[str, str, str]:
        """Sorted sets of a group: all records by latency, all by time, its verified ones by latency."""
        name = group.hex()
        return f"{self.root}latency:{name}", f"{self.root}time:{name}", f"{self.root}best:{name}"


@dataclass(frozen=True)
class Keys:
    """All keys under one prefix."""

    prefix: str

    def of(self, digest: str) -> WorkloadKeys:
        """The keys of the workload of that digest, in hex."""
        return WorkloadKeys(f"{self.prefix}:{{{digest}}}:")

    def locator(self, trial: bytes) -> str:
        """Hash: rest of a trial id to its workload's digest."""
        return f"{self.prefix}:trial:{{{trial[:2].hex()}}}"

    def claim(self, key: str) -> str:
        """Hash: the claim of a key. ``key`` is hex, so that it cannot hold a brace."""
        return f"{self.prefix}:claim:{{{key}}}"

    @property
    def about(self) -> str:
        """Hash: what these keys are, and their schema."""
        return f"{self.prefix}:{{index}}:about"

    @property
    def catalogue(self) -> str:
        """Sorted set: workloads by the number of their last change."""
        return f"{self.prefix}:{{index}}:catalogue"

    @property
    def intents(self) -> str:
        """Sorted set: workloads that are being written, by time; what stays there belongs to a writer that died."""
        return f"{self.prefix}:{{index}}:intents"

    @property
    def published(self) -> str:
        """Hash: numbers of the last event ``e`` (a time in us) and change ``c``; workload to how much of its outbox is
        published."""
        return f"{self.prefix}:{{index}}:published"

    @property
    def events(self) -> str:
        """Stream: commits in order."""
        return f"{self.prefix}:{{index}}:events"
