"""What a GPU says of itself, and the TVM target made from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner_core.errors import TunerError
from tuner_core.model import canonical_json

PROBE_COMMAND = (sys.executable, "-m", "tuner_server.gpu.probe")
_PROBE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class DeviceFacts:
    """Attributes of a device as a process sees them. ``sm_count`` is what an MPS share leaves of the device's SMs."""

    name: str
    arch: str
    sm_count: int
    memory_bytes: int
    max_threads_per_block: int
    max_shared_memory_per_block: int
    registers_per_block: int
    l2_cache_bytes: int
    warp_size: int


async def read_device_facts(env: Mapping[str, str], command: Sequence[str] = PROBE_COMMAND) -> DeviceFacts:
    """Ask the driver in a process of its own.

    Args:
        env: Added to this process's environment: CUDA_VISIBLE_DEVICES, and under MPS the worker's own settings.
        command: The probe; prints one JSON line.

    Raises:
        TunerError: The driver or MPS refuses, or does not answer.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), _PROBE_TIMEOUT_S)
    except TimeoutError:
        raise TunerError(f"the GPU did not answer within {_PROBE_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        reason = errors.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise TunerError(f"the GPU could not be asked: {reason[0]}") from None
    if "error" in answer:
        raise TunerError(f"the GPU cannot be used: {answer['error']}")
    return DeviceFacts(
        name=answer["name"],
        arch=f"sm_{answer['capability_major']}{answer['capability_minor']}",
        sm_count=answer["sm_count"],
        memory_bytes=answer["memory_bytes"],
        max_threads_per_block=answer["max_threads_per_block"],
        max_shared_memory_per_block=answer["max_shared_memory_per_block"],
        registers_per_block=answer["registers_per_block"],
        l2_cache_bytes=answer["l2_cache_bytes"],
        warp_size=answer["warp_size"],
    )


def cuda_target_json(facts: DeviceFacts) -> str:
    """TVM target for a device, as canonical JSON that ``Target(json.loads(...))`` accepts.

    A share has the same target as the whole device: it takes SMs away, and every attribute of a target is one of a
    single SM or of the L2, which is shared. The SM count is a key of its own in each record.
    """
    return canonical_json(
        {
            "kind": "cuda",
            "arch": facts.arch,
            "max_threads_per_block": facts.max_threads_per_block,
            "max_num_threads": facts.max_threads_per_block,
            "max_shared_memory_per_block": facts.max_shared_memory_per_block,
            "registers_per_block": facts.registers_per_block,
            "l2_cache_size_bytes": facts.l2_cache_bytes,
            "thread_warp_size": facts.warp_size,
        }
    )
