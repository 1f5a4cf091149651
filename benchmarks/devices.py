"""The one GPU of a benchmark, where a host has several or a part of the host was given to this process."""

from __future__ import annotations

import os
import sys

from tuner_core.errors import TunerError
from tuner_server.gpu.inventory import choose_gpus, find_gpus


def use_only(device: str) -> str:
    """What ``--device`` names; every other GPU is hidden from this process and those that it starts.

    So whatever a benchmark runs beside ``tuner-server`` (stock TVM, the final measurement) runs on the same GPU.

    Args:
        device: ``cuda``: the first GPU that CUDA_VISIBLE_DEVICES leaves; ``cuda:INDEX`` (NVML's) or ``cuda:UUID``; or
            any other device of ``tuner-server``, which is returned as it is.

    Returns:
        ``cuda:UUID`` for a GPU. The program ends where there is no such GPU.
    """
    if device.partition(":")[0] != "cuda":
        return device
    try:
        gpu = choose_gpus(find_gpus(), device)[0]
    except TunerError as error:
        sys.exit(f"error: {error}")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid
    return f"cuda:{gpu.uuid}"
