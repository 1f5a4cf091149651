"""CUDA builds on a host that may have no GPU: machine code comes out, whatever the host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner_core.compiler import cuda_build
from tuner_core.compiler.cuda_libraries import include_dirs, open_nvrtc
from tuner_core.errors import TunerError

EM_CUDA = 190  # e_machine of a cubin


def _nvrtc_missing() -> str:
    try:
        open_nvrtc()
    except TunerError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_nvrtc_missing()), reason=_nvrtc_missing() or "NVRTC is there")


def cubins(data: bytes) -> Iterator[bytes]:
    """ELF files inside a file whose machine is CUDA, the outer file not counted."""
    at = 0
    while (at := data.find(b"\x7fELF", at + 1)) >= 0:
        if int.from_bytes(data[at + 18 : at + 20], "little") == EM_CUDA:
            yield data[at:]


def sm_of(cubin: bytes) -> int:
    """Compute capability, times ten, from a cubin's ELF flags: bits 8 to 15 since ABI version 8, before that 0 to 7."""
    flags = int.from_bytes(cubin[48:52], "little")
    return (flags >> 8) & 0xFF if cubin[8] >= 8 else flags & 0xFF


BUILD = """
import sys
from pathlib import Path
from tuner_core.compiler.tvm_setup import load_tvm
load_tvm(intrinsics=True)
import tvm
import tvm.s_tir.dlight as dl
from tvm import te
from tvm.target import Target
from tuner_core.compiler.cuda_build import enable_cuda_builds
out, dtype, arch = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
print("stub", enable_cuda_builds(out.parent / "cubins"))
a, b = te.placeholder((64, 64), dtype), te.placeholder((64, 64), dtype)
k = te.reduce_axis((0, 64))
c = te.compute((64, 64), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k))
module = tvm.IRModule({"main": te.create_prim_func([a, b, c]).with_attr("global_symbol", "main")})
target = Target({"kind": "cuda", "arch": arch, "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152,
                 "thread_warp_size": 32})
with target:
    scheduled = dl.ApplyDefaultSchedule(dl.gpu.Matmul(), dl.gpu.Fallback())(module)
    for _ in range(2):
        library = tvm.build(scheduled, target=target)
library.export_library(str(out))
print("device", tvm.cuda(0).exist)
"""


def build(out: Path, dtype: str = "float32", arch: str = "sm_90") -> str:
    command = [sys.executable, "-c", BUILD, str(out), dtype, arch]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nvrtc
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_artifact_holds_a_cubin_for_the_targets_architecture_and_no_source(tmp_path: Path, dtype: str) -> None:
    said = build(tmp_path / "kernel.so", dtype)
    data = (tmp_path / "kernel.so").read_bytes()
    (cubin,) = cubins(data)
    assert sm_of(cubin) == 90
    assert b"__global__" not in data
    kept = list((tmp_path / "cubins").iterdir())
    assert len(kept) == 1  # built twice, compiled once
    assert kept[0].read_bytes() in data
    try:
        subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], check=True, stderr=-3)
    except subprocess.CalledProcessError:
        assert "stub True" in said
        assert "device False" in said  # the stub never pretends to be one
    else:
        assert "stub False" in said


SOURCE = """
#ifdef __CUDACC_RTC__
  #include <cuda/std/cstdint>
  using cuda::std::int64_t;
  #include <cuda/std/type_traits>
  namespace std {
    using cuda::std::is_same;
  }
#else
  #include <cuda.h>
#endif
%s
"""
KERNEL = 'extern "C" __global__ void f(float* x, int64_t n) { if (n) x[0] = INFINITY; }'


def test_heavy_headers_stay_only_where_the_source_uses_them() -> None:
    light = cuda_build.light_source(SOURCE % KERNEL)
    assert light is not None
    assert "cuda/std" not in light
    assert KERNEL in light
    assert cuda_build.light_source(SOURCE % "static_assert(std::is_same<int, int>::value);") is None


@needs_nvrtc
@pytest.mark.parametrize(
    "kernel",
    [
        KERNEL,
        pytest.param(
            'extern "C" __global__ void f(float* x) { if (std::is_same<int, int>::value) x[0] = 1; }',
            marks=pytest.mark.skipif(len(include_dirs()) < 2, reason="CCCL's headers are not installed"),
        ),
    ],
)
def test_both_kinds_of_source_compile(kernel: str) -> None:
    cubin = cuda_build.build_cubin(SOURCE % kernel, "sm_90", cuda_build.CubinCache())
    assert cubin.startswith(b"\x7fELF")
    assert int.from_bytes(cubin[18:20], "little") == EM_CUDA


@needs_nvrtc
def test_an_error_in_the_source_shows_the_compilers_words() -> None:
    with pytest.raises(cuda_build.nvrtc.CudaCompileError, match=r'identifier "nonsense" is undefined'):
        cuda_build.build_cubin(SOURCE % 'extern "C" __global__ void f() { nonsense(); }', "sm_90")


@needs_nvrtc
def test_an_architecture_that_nvrtc_does_not_know_is_named() -> None:
    with pytest.raises(TunerError, match=r"cannot build for sm_35; it can for sm_\d+"):
        cuda_build.build_cubin(SOURCE % KERNEL, "sm_35")


@needs_nvrtc
def test_a_kernel_with_too_many_statements_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    limited = BUILD.replace(
        "    for _ in range(2):",
        "    from tuner_core.compiler.cuda_build import SourceTooLargeError, limited_statements\n"
        "    try:\n"
        "        with limited_statements(20):\n"
        "            tvm.build(scheduled, target=target)\n"
        "    except SourceTooLargeError as error:\n"
        "        print(error)\n"
        "    for _ in range(1):",
    )
    command = [sys.executable, "-c", limited, str(tmp_path / "kernel.so"), "float32", "sm_90"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "statements after unrolling; 20 are the limit" in done.stdout
    assert len(list((tmp_path / "cubins").iterdir())) == 1  # without the limit it is built
