"""Which device a server measures on, and how it is shared."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tuner_core.errors import ConflictError, TunerError
from tuner_server.gpu.inventory import choose_gpus, find_gpus
from tuner_server.gpu.mps import find_control
from tuner_server.partitions.cpu import CpuPartitions
from tuner_server.partitions.exclusive import ExclusivePartitions
from tuner_server.partitions.interface import PartitionProvider
from tuner_server.partitions.mps import MpsPartitions
from tuner_server.processes.spawner import Spawner

log = logging.getLogger(__name__)


async def select_provider(
    device: str, data_dir: Path, spawner: Spawner, *, mps: str = "auto", oversubscribe: bool = False
) -> tuple[PartitionProvider, tuple[str, ...]]:
    """Choose by what the host has.

    Args:
        device: ``auto`` (a GPU if there is a usable one, else the CPU), ``cpu``, ``cuda:INDEX`` or ``cuda:UUID``.
        data_dir: The MPS daemon's files go below it.
        spawner: Starts the processes that a provider needs.
        mps: ``auto``: an own daemon where MPS works; ``external``: the operator's; ``off``: one exclusive worker.
        oversubscribe: Allow shares that sum to more than 100.

    Returns:
        The provider, to be started, and lines for people on why it is this one.

    Raises:
        UsageError: ``device`` is not a device.
        ConflictError: Another server uses it.
        TunerError: There is no such device, or it cannot be used.
    """
    if device == "cpu":
        return CpuPartitions(spawner), ()
    inventory = await asyncio.to_thread(find_gpus)
    gpus = choose_gpus(inventory, device)
    if not gpus:
        return CpuPartitions(spawner), (f"the CPU is used: {inventory.reason}",)
    gpu, notes = gpus[0], []
    if gpu.unusable:
        raise TunerError(gpu.unusable)
    if len(gpus) > 1:
        others = ", ".join(f"--device cuda:{other.index}" for other in gpus[1:])
        notes.append(f"one server measures on one GPU; start more for the others: {others}")
    if mps == "off":
        reason = "MPS is off"
    elif find_control() is None:
        reason = "nvidia-cuda-mps-control is not installed"
        if mps == "external":
            raise TunerError(f"{reason}: it is needed to use an operator's MPS daemon; or choose mps: off")
    else:
        shared = MpsPartitions(
            gpu, data_dir / "mps" / gpu.uuid[:12], external=mps == "external", oversubscribe=oversubscribe
        )
        try:
            await shared.start()
            return shared, tuple(notes)
        except ConflictError:
            raise
        except TunerError as error:  # installed, but refused here: in a container, say
            if mps == "external":
                raise
            reason = f"MPS does not work here ({error})"
    notes.append(f"one exclusive worker on {gpu.name}: {reason}")
    return ExclusivePartitions(gpu, reason), tuple(notes)
