"""The NVIDIA GPUs of this host, asked through NVML: starts nothing on them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tuner_core.errors import TunerError, UsageError


@dataclass(frozen=True)
class GpuInfo:
    """One GPU.

    Attributes:
        index: NVML's index, in order of the PCI bus.
        uuid: ``GPU-...``; what CUDA and MPS are told, since ordinals are remapped.
        name: e.g. ``NVIDIA H200``.
        arch: e.g. ``sm_90``.
        memory_bytes: Device memory.
        compute_mode: ``default``, ``exclusive_process`` or ``prohibited``.
        mig: Whether it is split into MIG instances.
        driver_version: e.g. ``580.159.03``.
        cuda_version: Newest CUDA that the driver supports, e.g. ``13.0``.
    """

    index: int
    uuid: str
    name: str
    arch: str
    memory_bytes: int
    compute_mode: str
    mig: bool
    driver_version: str
    cuda_version: str

    @property
    def unusable(self) -> str:
        """Why no worker can run on it, in one line; empty when one can."""
        if self.compute_mode == "prohibited":
            return f"GPU {self.index} ({self.name}) is in compute mode Prohibited, which lets no process use it"
        if self.mig:
            return f"GPU {self.index} ({self.name}) is split by MIG, which is not supported yet"
        return ""


@dataclass(frozen=True)
class Inventory:
    """What was found.

    Attributes:
        gpus: Usable GPUs that this process may see.
        reason: Why there is none; empty when there is one.
    """

    gpus: tuple[GpuInfo, ...] = ()
    reason: str = ""


def find_gpus(environment: Mapping[str, str] | None = None) -> Inventory:
    """Ask NVML. A host without a GPU, a driver or NVML gives an empty inventory with the reason, never an exception.

    Args:
        environment: Where CUDA_VISIBLE_DEVICES is looked up; default: this process's.
    """
    try:
        import pynvml
    except ImportError:
        return Inventory(reason="the package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return Inventory(reason="no NVIDIA driver on this host (libnvidia-ml.so.1 was not found)")
    except pynvml.NVMLError as error:
        return Inventory(reason=f"the NVIDIA driver does not answer ({error})")
    try:
        found = tuple(_read(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        return Inventory(reason=f"the NVIDIA driver does not describe its GPUs ({error})")
    finally:
        pynvml.nvmlShutdown()
    if not found:
        return Inventory(reason="the NVIDIA driver reports no GPU")
    environment = os.environ if environment is None else environment
    visible = _visible(found, environment.get("CUDA_VISIBLE_DEVICES"))
    if not visible:
        return Inventory(reason=f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']} hides every GPU")
    usable = tuple(gpu for gpu in visible if not gpu.unusable)
    return Inventory(usable, "" if usable else visible[0].unusable)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read(index: int) -> GpuInfo:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    modes = {
        pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive_process",
        pynvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
    }
    try:
        mig = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # a GPU without MIG
        mig = False
    return GpuInfo(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        arch=f"sm_{major}{minor}",
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_mode=modes.get(pynvml.nvmlDeviceGetComputeMode(handle), "default"),
        mig=mig,
        driver_version=_text(pynvml.nvmlSystemGetDriverVersion()),
        cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}",
    )


def _visible(gpus: tuple[GpuInfo, ...], setting: str | None) -> tuple[GpuInfo, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; like CUDA, stops at the first unknown one."""
    if setting is None:
        return gpus
    chosen: list[GpuInfo] = []
    for word in (part.strip() for part in setting.split(",")):
        match = [
            gpu
            for gpu in gpus
            if word and (gpu.uuid.startswith(word) if word.startswith("GPU-") else word == str(gpu.index))
        ]
        if len(match) != 1:
            break
        chosen.append(match[0])
    return tuple(chosen)


def choose_gpus(inventory: Inventory, device: str) -> tuple[GpuInfo, ...]:
    """The GPUs that ``--device`` names.

    Args:
        inventory: What there is.
        device: ``auto`` or ``cuda``: all of them; ``cuda:INDEX`` or ``cuda:UUID`` (a unique beginning is enough): one.

    Raises:
        UsageError: It names no GPU of this host, or several.
        TunerError: A GPU is asked for and there is none.
    """
    if device in ("auto", "cuda"):
        if not inventory.gpus and device == "cuda":
            raise TunerError(f"no GPU to use: {inventory.reason}")
        return inventory.gpus
    kind, _, which = device.partition(":")
    if kind != "cuda" or not which:
        raise UsageError(f"--device wants auto, cpu, cuda:INDEX or cuda:UUID, not {device!r}")
    if not inventory.gpus:
        raise TunerError(f"no GPU to use: {inventory.reason}")
    if which.isdigit():
        match = [gpu for gpu in inventory.gpus if gpu.index == int(which)]
    else:
        match = [
            gpu
            for gpu in inventory.gpus
            if gpu.uuid.lower().removeprefix("gpu-").startswith(which.lower().removeprefix("gpu-"))
        ]
    if len(match) != 1:
        offered = ", ".join(f"cuda:{gpu.index} ({gpu.name}, {gpu.uuid})" for gpu in inventory.gpus)
        raise UsageError(
            f"{device} names {'no' if not match else 'more than one'} GPU of this host; there are: {offered}"
        )
    return (match[0],)
