"""The workers that have one share, on one device or on several, as a job uses them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tuner_core.errors import UnavailableError
from tuner_server.lanes.device import SharedDevice
from tuner_server.measure.fleet import Alone
from tuner_server.measure.inputs import ArgsInfo
from tuner_server.measure.requests import CheckOutcome, Measurement, MeasureRequest, WorkerSnapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

_RECHECK_S = 0.5  # a worker that came back on another device is noticed then


class LaneFleet:
    """Requests go to whichever device has a worker of the share to spare, and never wait behind a device's promotion.

    Args:
        devices: Where the workers are.
        sm_percent: Their share.
    """

    def __init__(self, devices: Sequence[SharedDevice], sm_percent: int) -> None:
        self._devices = list(devices)
        self._sm_percent = sm_percent
        self._out: Counter[str] = Counter()  # requests handed to each device
        self._waiting: deque[asyncio.Future[SharedDevice]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def workers(self) -> list[WorkerSnapshot]:
        """The workers as they are now."""
        return [worker for device in self._devices for worker in self._of(device)]

    @property
    def capacity(self) -> int:
        """Workers that take requests now."""
        return sum(self._ready(device) for device in self._devices)

    def _of(self, device: SharedDevice) -> list[WorkerSnapshot]:
        return [worker for worker in device.fleet.workers() if worker.sm_percent == self._sm_percent]

    def _ready(self, device: SharedDevice) -> int:
        return sum(worker.state in ("idle", "measuring") for worker in self._of(device))

    async def measure(self, request: MeasureRequest) -> Measurement:
        """Time one candidate on the next idle worker of the share.

        Raises:
            TrialFailed: It failed, with its kind.
            TunerError: There is no worker on any device, and none can be started.
        """
        request = replace(request, sm_percent=self._sm_percent)

        async def on(device: SharedDevice, freed: Callable[[], None]) -> Measurement:
            return await device.fleet.measure(request, freed)

        return await self._anywhere(on)

    async def check(
        self, artifact: Path, args_info: ArgsInfo, reference: Path | None, fallback: Path | None = None
    ) -> CheckOutcome:
        """Compare an artifact's outputs with a reference, see :meth:`WorkerFleet.check`."""

        async def on(device: SharedDevice, _freed: Callable[[], None]) -> CheckOutcome:
            return await device.fleet.check(artifact, args_info, reference, fallback, sm_percent=self._sm_percent)

        return await self._anywhere(on)

    async def alone(self, work: Callable[[Alone], Awaitable[T]]) -> T:
        """Do something with one device alone, all its shares drained; the other devices go on.

        Args:
            work: Measures on it. It is begun anew on another device when no worker of the first can be started.

        Raises:
            TrialFailed: What ``work`` raises.
            TunerError: There is no worker on any device, and none can be started.
        """
        while True:
            try:
                async with self.exclusive() as alone:
                    return await work(alone)
            except UnavailableError as error:
                if self.capacity == 0:
                    raise
                log.warning("%s; measuring alone on another device", error)

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Alone]:
        """Have one device alone, all its shares drained; the other devices go on."""
        device = min(
            self._devices,
            key=lambda device: (self._ready(device) == 0, device.wanted_alone, self._out[device.name]),
        )
        device.wanted_alone += 1
        try:
            async with device.fleet.exclusive(self._sm_percent) as alone:
                yield alone
        finally:
            device.wanted_alone -= 1
            self._dispatch()

    async def _anywhere(self, work: Callable[[SharedDevice, Callable[[], None]], Awaitable[T]]) -> T:
        while True:
            async with self._place() as (device, freed):
                try:
                    return await work(device, freed)
                except UnavailableError as error:
                    if self.capacity == 0:
                        raise
                    log.warning("%s: %s; measuring on another device", device.name, error)

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[tuple[SharedDevice, Callable[[], None]]]:
        """A device to send a request to, and what to call when its worker is free again, before the answer.

        With a single device its own queue does the waiting.
        """
        if len(self._devices) == 1:
            yield self._devices[0], lambda: None
            return
        device = await self._next()
        with contextlib.ExitStack() as place:
            place.callback(self._leave, device)
            yield device, place.close

    def _leave(self, device: SharedDevice) -> None:
        self._out[device.name] -= 1
        self._dispatch()

    async def _next(self) -> SharedDevice:
        granted: asyncio.Future[SharedDevice] = asyncio.get_running_loop().create_future()
        self._waiting.append(granted)
        self._dispatch()
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # granted in the same breath
                self._out[granted.result().name] -= 1
                self._dispatch()
            raise

    def _dispatch(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
                continue
            device = self._free()
            if device is None:
                self._check_again_later()
                return
            self._out[device.name] += 1
            self._waiting.popleft().set_result(device)

    def _free(self) -> SharedDevice | None:
        """The device with most workers to spare; None when there is none.

        Without any worker anywhere, as many requests as there should be workers: the device's own queue then says
        whether some come back, or that none can be started.
        """
        nobody = self.capacity == 0
        spare: dict[str, int] = {}
        for device in self._devices:
            places = len(self._of(device)) if nobody else self._ready(device) * (not device.wanted_alone)
            spare[device.name] = places - self._out[device.name]
        best = max(self._devices, key=lambda device: spare[device.name])
        return best if spare[best.name] > 0 else None

    def _check_again_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_RECHECK_S, self._check_again)

    def _check_again(self) -> None:
        self._timer = None
        self._dispatch()
