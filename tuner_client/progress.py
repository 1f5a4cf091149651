"""Where the client says what it is doing: the seam between the work and its rendering."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol

from tuner_client.job import JobReport


class Progress(Protocol):
    """Hears what happens, in order. Implementations render; none of the methods may block for long."""

    def step(self, text: str) -> AbstractContextManager[None]:
        """A piece of work that takes seconds, e.g. ``importing the model``, for as long as the context is open."""

    def note(self, text: str) -> None:
        """One line worth keeping."""

    def job(self, report: JobReport, message: str = "") -> None:
        """The job's newest state, with the server's line for people, if it sent one."""

    def reconnecting(self, reason: str, waited_s: float) -> None:
        """The server has been out of reach for ``waited_s`` seconds; the next attempt comes soon."""


class Silent:
    """Renders nothing."""

    def step(self, text: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def note(self, text: str) -> None:
        return None

    def job(self, report: JobReport, message: str = "") -> None:
        return None

    def reconnecting(self, reason: str, waited_s: float) -> None:
        return None
