"""How the stages say that a trial has failed."""

from __future__ import annotations

from tuner_core.model import FailureKind


class TrialFailed(Exception):
    """A trial that has no latency, with the kind that its record will carry.

    Attributes:
        kind: Why.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
