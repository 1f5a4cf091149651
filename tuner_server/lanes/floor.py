"""Which job may begin on which devices, and how these must be divided for it. Pure: no processes, no waiting.

A device is divided into the shares that its configuration names. A job asks for one share and runs on every partition
that has it, on all devices that match its target. Jobs that ask for different shares on offer run side by side, jobs
of one share one after the other. A share that no partition has needs whole devices: those that nobody uses are divided
anew for it, and go back to their configuration when a job wants that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wish:
    """A job's wish for partitions.

    Attributes:
        job: Who wishes; unique.
        sm_percent: The share.
        devices: Devices that would do, in order of preference: all of one model, target and SM count.
        on_offer: Whether their configurations have the share; if not, they must be divided for it.
    """

    job: str
    sm_percent: int
    devices: tuple[str, ...]
    on_offer: bool


@dataclass(frozen=True)
class Grant:
    """A wish fulfilled: ``configured`` says whether the devices are to be divided as configured, or into its share."""

    wish: Wish
    devices: tuple[str, ...]
    configured: bool


@dataclass
class _Device:
    configured: tuple[int, ...]
    odd_share: int | None = None  # divided into it at present, not as configured
    ready: bool = True  # whether it is divided at all
    users: set[str] = field(default_factory=set)


class Floor:
    """The devices of a server, who uses them, and who waits, in order.

    Args:
        devices: Shares of the configured partitions, by device.
    """

    def __init__(self, devices: Mapping[str, Sequence[int]]) -> None:
        self._devices = {name: _Device(tuple(shares)) for name, shares in devices.items()}
        self._waiting: list[Wish] = []
        self._running: dict[str, Wish] = {}

    @property
    def waiting(self) -> tuple[Wish, ...]:
        """Wishes that are not granted yet, in order."""
        return tuple(self._waiting)

    def ask(self, wish: Wish) -> None:
        """Queue a wish; :meth:`grants` says when it is granted."""
        self._waiting.append(wish)

    def leave(self, job: str) -> None:
        """A job ended, or waits no more."""
        self._waiting = [wish for wish in self._waiting if wish.job != job]
        self._running.pop(job, None)
        for device in self._devices.values():
            device.users.discard(job)

    def undivided(self, device: str) -> None:
        """The device could not be divided; the next job that wants it has it tried again."""
        self._devices[device].ready = False

    def grants(self) -> list[Grant]:
        """Wishes that are fulfilled now, oldest first.

        A wish that waits for a whole device keeps later ones off it, so that it gets there some time.
        """
        granted = []
        kept: set[str] = set()  # for wishes that wait
        taken = {(wish.sm_percent, wish.devices) for wish in self._running.values()}
        for wish in list(self._waiting):
            lane = (wish.sm_percent, wish.devices)
            usable = [name for name in wish.devices if name not in kept and self._usable(name, wish)]
            if lane in taken:
                usable = []
            elif not usable:
                kept.update(wish.devices)
            taken.add(lane)
            if usable:
                self._waiting.remove(wish)
                self._running[wish.job] = wish
                for name in usable:
                    device = self._devices[name]
                    device.users.add(wish.job)
                    device.odd_share = None if wish.on_offer else wish.sm_percent
                    device.ready = True
                granted.append(Grant(wish, tuple(usable), wish.on_offer))
        return granted

    def _usable(self, name: str, wish: Wish) -> bool:
        device = self._devices[name]
        if not device.users:
            return True
        return device.ready and wish.on_offer and device.odd_share is None
