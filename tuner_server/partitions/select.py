"""Which devices a server measures on, and how each is shared."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner_core.errors import ConflictError, TunerError, UsageError
from tuner_server.config import DeviceSettings
from tuner_server.gpu.inventory import GpuInfo, Inventory, choose_gpus, find_gpus
from tuner_server.gpu.mps import find_control
from tuner_server.gpu.target import PROBE_COMMAND
from tuner_server.partitions.cpu import CpuPartitions, parse_cores
from tuner_server.partitions.exclusive import ExclusivePartitions
from tuner_server.partitions.host import portions, usable_cores
from tuner_server.partitions.interface import PartitionProvider
from tuner_server.partitions.mps import MpsPartitions
from tuner_server.processes.spawner import Spawner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """A device to measure on: ``name`` on this server (``cpu``, ``cuda:1``), its settings, its provider, started."""

    name: str
    settings: DeviceSettings
    provider: PartitionProvider


@dataclass(frozen=True)
class _Wanted:
    """A GPU that is to be used. ``optional``: nobody named it, so it is left out when another server has it."""

    gpu: GpuInfo
    settings: DeviceSettings
    optional: bool


async def select_providers(
    devices: Sequence[DeviceSettings], data_dir: Path, spawner: Spawner, *, probe: Sequence[str] = PROBE_COMMAND
) -> tuple[list[Chosen], tuple[str, ...]]:
    """Choose by what is asked for and what the host has, and start it.

    ``auto`` means every GPU of the model that the host has most of, because a job runs on GPUs of one model, and the
    CPU where there is no GPU. GPUs of other models, and several of a model that another server uses, are named in the
    notes.

    Args:
        devices: What is asked for.
        data_dir: The MPS daemons' files go below it.
        spawner: Starts the processes that a provider needs.
        probe: Command that reads a GPU's facts.

    Returns:
        The providers, and lines for people on why they are these.

    Raises:
        UsageError: No such device, one named twice, or CPU and GPUs that would use the same cores.
        ConflictError: Another server uses it.
        TunerError: There is no such device, or it cannot be used.
    """
    on_cpu = [settings for settings in devices if settings.device.partition(":")[0] == "cpu"]
    on_gpu = [settings for settings in devices if settings not in on_cpu]
    notes: list[str] = []
    wanted: list[_Wanted] = []
    if on_gpu:
        inventory = await asyncio.to_thread(find_gpus)
        for settings in on_gpu:
            if settings.device == "auto" and not inventory.gpus:
                notes.append(f"the CPU is used: {inventory.reason}")
                on_cpu.append(replace(settings, device="cpu"))
            else:
                wanted += _wanted(inventory, settings, notes)
    _refuse_twice([one.gpu.uuid for one in wanted])
    cpus = _cpu_devices(on_cpu, spawner)
    taken = {core for one in cpus for core in one.provider.cores}
    cores = [core for core in usable_cores() if core not in taken]
    if wanted and not cores:
        raise UsageError(
            "the GPUs' workers, search and build need cores of their own beside the CPU that is measured: "
            "say which cores to measure, e.g. --device cpu:0-3"
        )
    divided = zip(wanted, portions(cores, len(wanted)), strict=True)
    opened = await asyncio.gather(
        *(_open_gpu(one, data_dir, portion, probe) for one, portion in divided), return_exceptions=True
    )
    gpus: list[Chosen] = []
    busy: list[ConflictError] = []
    failed: list[BaseException] = []
    for one, outcome in zip(wanted, opened, strict=True):
        if isinstance(outcome, ConflictError) and one.optional:
            busy.append(outcome)
        elif isinstance(outcome, BaseException):
            failed.append(outcome)
        else:
            provider, reason = outcome
            gpus.append(Chosen(f"cuda:{one.gpu.index}", one.settings, provider))
            if reason:
                notes.append(f"one exclusive worker on {one.gpu.name} (cuda:{one.gpu.index}): {reason}")
    if failed or (busy and not gpus):
        await asyncio.gather(*(one.provider.stop() for one in gpus))
        raise [*failed, *busy][0]
    notes += [f"left out: {error}" for error in busy]
    return [*gpus, *cpus], tuple(notes)


def _wanted(inventory: Inventory, settings: DeviceSettings, notes: list[str]) -> list[_Wanted]:
    """The GPUs that one entry means."""
    gpus = choose_gpus(inventory, settings.device)
    if settings.device == "auto":
        (model, _), *_ = Counter(gpu.name for gpu in gpus).most_common()
        others = [gpu for gpu in gpus if gpu.name != model]
        if others:
            named = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in others)
            notes.append(f"left out, as jobs run on GPUs of one model: {named}; name devices with --device to use them")
        gpus = tuple(gpu for gpu in gpus if gpu.name == model)
    for gpu in gpus:
        if gpu.unusable:
            raise TunerError(gpu.unusable)
    return [_Wanted(gpu, settings, optional=len(gpus) > 1) for gpu in gpus]


def _refuse_twice(uuids: Sequence[str]) -> None:
    for uuid, count in Counter(uuids).items():
        if count > 1:
            raise UsageError(f"the GPU {uuid} is named {count} times: give all of its shares in one entry (partitions)")


def _cpu_devices(entries: Sequence[DeviceSettings], spawner: Spawner) -> list[Chosen]:
    """One provider for each named set of cores.

    Raises:
        UsageError: They overlap, or are not this process's cores.
    """
    usable = usable_cores()
    taken: set[int] = set()
    chosen = []
    for settings in entries:
        named = parse_cores(settings.device)
        cores = usable if named is None else named
        if missing := sorted(set(cores) - set(usable)):
            raise UsageError(f"{settings.device}: this process may not use core {missing[0]}, only {sorted(usable)}")
        if taken & set(cores):
            raise UsageError(f"{settings.device} has cores that another device of this server has")
        taken |= set(cores)
        provider = CpuPartitions(spawner, cores, name=settings.device, oversubscribe=settings.oversubscribe)
        chosen.append(Chosen(settings.device, settings, provider))
    return chosen


async def _open_gpu(
    wanted: _Wanted, data_dir: Path, cores: Sequence[int], probe: Sequence[str]
) -> tuple[MpsPartitions | ExclusivePartitions, str]:
    """A started provider, and why it grants no shares (empty when it does)."""
    gpu, settings = wanted.gpu, wanted.settings
    external = settings.mps == "external"
    if settings.mps == "off":
        reason = "MPS is off"
    elif find_control() is None:
        reason = "nvidia-cuda-mps-control is not installed"
        if external:
            raise TunerError(f"{reason}: it is needed to use an operator's MPS daemon; or choose mps: off")
    else:
        shared = MpsPartitions(
            gpu,
            data_dir / "mps" / gpu.uuid[:12],
            external=external,
            oversubscribe=settings.oversubscribe,
            cores=cores,
            pause_builds=settings.pause_builds,
            probe=probe,
        )
        try:
            await shared.start()
            return shared, ""
        except ConflictError:
            raise
        except TunerError as error:  # installed, but refused here: in a container, say
            if external:
                raise
            reason = f"MPS does not work here ({error})"
    exclusive = ExclusivePartitions(gpu, reason, cores=cores, pause_builds=settings.pause_builds, probe=probe)
    await exclusive.start()
    return exclusive, reason
