"""Kernels that a worker launches itself compute what their function says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import kernels
from tests.integration.test_kernel_files import DYNAMIC, SWAPPED, UNUSED, scripted
from tuner_server.gpu.inventory import GpuInfo

RUN = """
import json, sys
from pathlib import Path
import numpy as np
from tuner_core.compiler.cuda_libraries import load_tvm_cuda_runtime
from tuner_core.compiler.tvm_setup import load_tvm
load_tvm()
load_tvm_cuda_runtime(allow_stub=False)
import tvm
from tuner_server.measure.loaded import load_operator
device = tvm.cuda(0)
rng = np.random.default_rng(0)
arrays = [rng.standard_normal(size).astype("float32") for size in json.loads(sys.argv[2])]
tensors = [tvm.runtime.tensor(array, device) for array in arrays]
operator = load_operator(Path(sys.argv[1]))
operator(*tensors)
device.sync()
once = tensors[-1].numpy()
(seconds,) = operator.times(tensors, device, 10, 1)
np.savez(sys.argv[3], once, tensors[-1].numpy(), seconds, *arrays)
"""


@pytest.mark.parametrize(
    ("text", "sizes"), [(SWAPPED, (256, 1024, 1024)), (UNUSED, (256, 256, 256)), (DYNAMIC, (256, 256))]
)
def test_a_kernels_file_computes_what_its_function_says(
    gpu: GpuInfo, short_dir: Path, text: str, sizes: tuple[int, ...]
) -> None:
    import numpy as np
    from tvm.target import Target

    from tuner_server.build.compile import compile_module, prepare_for_target

    folder = short_dir / f"kernel-{len(text)}"
    folder.mkdir()
    module = scripted(text)
    target = Target({**json.loads(kernels.H200_TARGET), "arch": gpu.arch})
    prepare_for_target(target)
    path = compile_module(module, target, folder / "built.so")
    assert path.suffix == ".kernel"
    command = [sys.executable, "-c", RUN, str(path), json.dumps(sizes), str(folder / "out.npz")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "out.npz") as out:
        once, timed, seconds, *arrays = (out[name] for name in out.files)
    a, b = arrays[:2]
    expected = {SWAPPED: b * np.tile(a, len(b) // len(a)), UNUSED: a, DYNAMIC: a[::-1]}[text]
    assert np.array_equal(once, expected) and np.array_equal(timed, expected) and seconds > 0
