"""A share of a GPU for processes that know nothing of this service: a CUDA MPS daemon of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tuner_server.gpu.inventory import find_gpus
from tuner_server.gpu.mps import find_control


@contextmanager
def share_of_gpu(sm_percent: int) -> Iterator[Mapping[str, str]]:
    """Environment of processes that shall get a share of the first GPU; nothing is started for all of it.

    Args:
        sm_percent: The share.
    """
    if sm_percent == 100:
        yield {}
        return
    control = find_control()
    if control is None:
        sys.exit("error: nvidia-cuda-mps-control is not installed, so there are no shares of a GPU")
    with tempfile.TemporaryDirectory(prefix="tuner-share-") as folder:
        (pipe, log) = (Path(folder) / name for name in ("pipe", "log"))
        pipe.mkdir()
        log.mkdir()
        environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(log),
            "CUDA_VISIBLE_DEVICES": find_gpus().gpus[0].uuid,  # the daemon numbers devices anew
        }
        subprocess.run([control, "-d"], env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)
        try:
            yield {**environment, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(sm_percent)}
        finally:
            subprocess.run(
                [control], env={**os.environ, **environment}, input=b"quit\n", stdout=subprocess.DEVNULL, check=False
            )
