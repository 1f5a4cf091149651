"""Keeps search and build off the cores while a measurement runs, where there are not enough cores for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol


class Pausable(Protocol):
    """Something that yields the processor on demand, e.g. a pool of processes (SIGSTOP and SIGCONT)."""

    def pause(self) -> None:
        """Stop at once."""
        ...

    def resume(self) -> None:
        """Go on."""
        ...


class CoreGate:
    """Counts measurements; what is pausable stands still while any of them needs it to.

    Entering never waits, and nothing that is paused is ever waited for inside, so the gate cannot deadlock: hold it
    only around the request to a worker. Measurements side by side are one pause.

    Args:
        pausables: What to pause.
        spare: Whether search and build have cores of their own: then only what asks for a quiet host pauses them.
    """

    def __init__(self, pausables: Sequence[Pausable] = (), spare: bool = False) -> None:
        self._pausables = list(pausables)
        self._spare = spare
        self._measuring = 0
        self._quiet = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the pausables stand still."""
        return self._closed

    @property
    def spare(self) -> bool:
        """Whether search and build have cores of their own. May change when the device is divided anew."""
        return self._spare

    @spare.setter
    def spare(self, value: bool) -> None:
        self._spare = value
        self._apply()

    def add(self, pausable: Pausable) -> None:
        """Put one more under the gate."""
        self._pausables.append(pausable)
        if self._closed:
            pausable.pause()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold while a worker measures a candidate."""
        self._measuring += 1
        self._apply()
        try:
            yield
        finally:
            self._measuring -= 1
            self._apply()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Hold while any load of the host would disturb a measurement: pauses even where there are spare cores."""
        self._quiet += 1
        self._apply()
        try:
            yield
        finally:
            self._quiet -= 1
            self._apply()

    def _apply(self) -> None:
        closed = self._quiet > 0 or (self._measuring > 0 and not self._spare)
        if closed == self._closed:
            return
        self._closed = closed
        for pausable in self._pausables:
            if closed:
                pausable.pause()
            else:
                pausable.resume()
