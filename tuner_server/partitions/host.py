"""What this process may use of the host, and how a GPU's part of it is split between measurement and building."""

from __future__ import annotations

import itertools
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCH_BOUND_US = 50.0
"""Kernels that take longer never wait for the host, however busy it is: a launch takes 3 to 10 microseconds of a core,
and there may be several for one operator. While the device works, the host is far ahead."""


def usable_cores() -> tuple[int, ...]:
    """Cores that this process may use: its affinity, cut to the control group's quota; siblings side by side."""
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (*physical_core(core), core))
    quota = _quota_cores()
    return tuple(cores if quota is None else cores[: max(1, int(quota))])


def physical_core(core: int) -> tuple[int, int]:
    """Package and physical core of a processor; processors with the same share its execution units.

    Where the kernel does not say, every processor counts as a physical core of its own.
    """
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text())
    except (OSError, ValueError):
        return 0, core


def portions(
    cores: Sequence[int], count: int, physical: Callable[[int], tuple[int, int]] = physical_core
) -> list[Sequence[int]]:
    """Divide cores into equal parts, whole physical ones if there are enough; fewer than parts are all in each.

    Args:
        cores: Siblings side by side.
        count: How many parts.
        physical: The physical core of a core.
    """
    siblings = [list(group) for _, group in itertools.groupby(cores, key=physical)]
    if len(siblings) < count:
        siblings = [[core] for core in cores]
    if len(siblings) < count:
        return [cores] * count
    groups = [siblings[index * len(siblings) // count : (index + 1) * len(siblings) // count] for index in range(count)]
    return [list(itertools.chain(*group)) for group in groups]


def _quota_cores() -> float | None:
    """Processor time that the control group grants, in cores; None when it sets no limit (kernel: cgroup-v2.rst)."""
    for group in _control_groups("cpu"):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text().strip()
                period = (group / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return None


def usable_memory_bytes() -> int:
    """Memory of the host, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group in _control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                total = min(total, int((group / name).read_text()))
            except (OSError, ValueError):
                continue
    return total


def _control_groups(controller: str) -> list[Path]:
    """Directories that may limit this process, its own group first (version 2, then version 1)."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup")
        if controllers and controller in controllers.split(","):
            root /= controller
        elif controllers:
            continue
        own = root / path.lstrip("/")
        found += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return found


def processor_model() -> str:
    """Name of the processor, e.g. ``AMD EPYC 9654 96-Core Processor``; the architecture where the kernel gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class CoreSplit:
    """Host cores of a GPU.

    Attributes:
        workers: Cores of each measurement worker; empty: all.
        rest: Cores for search and build.
        apart: Whether no physical core is in both, so that a worker launches kernels undisturbed by builds.
    """

    workers: tuple[tuple[int, ...], ...]
    rest: tuple[int, ...]
    apart: bool


def split_cores(
    cores: Sequence[int], workers: int, physical: Callable[[int], tuple[int, int]] = physical_core
) -> CoreSplit:
    """Split the host's cores between measurement workers, which launch kernels back to back, and search and build.

    Workers get whole physical cores and share these with each other: alone on the device, a worker has its physical
    core for itself. Each has a processor of its own where that leaves two thirds of them; else all workers share a
    third. With a single physical core everything shares it.

    Args:
        cores: Cores that this process may use.
        workers: Measurement workers.
        physical: The physical core of a core.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for core in sorted(cores, key=lambda core: (*physical(core), core)):
        groups.setdefault(physical(core), []).append(core)
    ordered = [core for group in groups.values() for core in group]
    if len(ordered) < 2:
        return CoreSplit(((),) * workers, tuple(ordered), False)
    each_its_own = workers <= max(1, len(ordered) // 3)
    wanted = workers if each_its_own else max(1, len(ordered) // 3)
    taken: list[int] = []
    for group in groups.values():
        if len(taken) >= wanted or len(taken) + len(group) >= len(ordered):
            break
        taken += group
    apart = len(taken) >= wanted
    if not apart:  # one physical core, or few large ones
        taken = ordered[:wanted]
    rest = tuple(sorted(set(ordered) - set(taken)))
    if not each_its_own:
        return CoreSplit((tuple(sorted(taken)),) * workers, rest, apart)
    own = [(core,) for core in taken[: workers - 1]]
    return CoreSplit((*own, tuple(taken[workers - 1 :])), rest, apart)


def quiet_below_us(split: CoreSplit, pause_builds: str) -> float:
    """Which kernels of a GPU are measured for publication with search and build stopped.

    A GPU's events disregard what the host does between them, unless the device has to wait for the next launch. That
    happens with short kernels only, and then a launch should not be slowed down by builds.

    Args:
        split: Of the host's cores.
        pause_builds: ``auto``: for short kernels, or for all where builds share the workers' physical cores;
            ``always``; ``never``.

    Returns:
        Latency in microseconds below which they are stopped.
    """
    if pause_builds == "never":
        return 0.0
    return LAUNCH_BOUND_US if pause_builds == "auto" and split.apart else math.inf
