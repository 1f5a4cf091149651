"""Find and load what CUDA code needs at build or run time: the driver (or a stub of it), cudart, NVRTC, headers.

They come from the system or from PyPI (``nvidia-cuda-runtime`` and its neighbours, the extra ``cuda-build``), whose
libraries lie inside ``site-packages/nvidia`` where no dynamic linker looks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.resources
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

from tuner_core.errors import TunerError

INSTALL = "pip install 'gpu-autotuner[cuda-build]'"
_DRIVER = "libcuda.so.1"
_CUDART = "libcudart.so.13"  # what the pinned TVM's libtvm_runtime_cuda.so links against
_NVRTC = ("libnvrtc.so.13", "libnvrtc.so.12")


def _packaged_roots() -> list[Path]:
    """Directories of NVIDIA's PyPI packages that have a ``lib`` or ``include`` directory, e.g. ``nvidia/cu13``."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [root for place in places for root in sorted(Path(place).iterdir()) if root.is_dir()]


def _system_roots() -> list[Path]:
    """CUDA toolkits outside Python: ``CUDA_HOME``, ``CUDA_PATH``, then the usual place."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return [Path(name) for name in named if name]


def _open(name: str, mode: int) -> ctypes.CDLL | None:
    """Load a library by its name, from the PyPI packages first (their parts fit together), then the system's."""
    candidates = [str(root / "lib" / name) for root in _packaged_roots()]
    candidates.append(name)
    candidates += [str(root / lib / name) for root in _system_roots() for lib in ("lib64", "lib")]
    for candidate in candidates:
        if os.sep in candidate and not Path(candidate).is_file():
            continue
        with contextlib.suppress(OSError):
            return ctypes.CDLL(candidate, mode=mode)
    return None


def open_nvrtc() -> ctypes.CDLL:
    """NVIDIA's run-time compiler.

    Raises:
        TunerError: It is not installed.
    """
    for name in _NVRTC:
        # NVRTC opens its built-ins by name only: have them in the process before it looks.
        for root in _packaged_roots():
            if (root / "lib" / name).is_file():
                for builtins in sorted((root / "lib").glob("libnvrtc-builtins.so.*")):
                    with contextlib.suppress(OSError):
                        ctypes.CDLL(str(builtins))
        if (library := _open(name, ctypes.RTLD_LOCAL)) is not None:
            return library
    raise TunerError(f"cannot build for CUDA: NVRTC ({_NVRTC[0]}) was not found; {INSTALL}")


def include_dirs() -> tuple[Path, ...]:
    """Directories with the CUDA headers (``cuda_fp16.h``) and CCCL (``nv/target``, ``cuda/std``); may be empty.

    All come from one installation, since headers of two versions do not mix: the first that is complete. PyPI's
    ``nvidia-cuda-runtime`` alone is not.
    """
    found = []
    for root in _packaged_roots() + _system_roots():
        include = root / "include"
        if (include / "cuda_fp16.h").is_file():
            cccl = [place for place in (include / "cccl", include) if (place / "nv" / "target").is_file()]
            complete = bool(cccl) and (include / "crt" / "host_defines.h").is_file()
            found.append((not complete, (include, *(place for place in cccl if place != include))))
    return min(found, key=lambda entry: entry[0])[1] if found else ()


def driver_present() -> bool:
    """Whether the NVIDIA driver's library is installed and loads. Loading it starts nothing on a device."""
    try:
        ctypes.CDLL(_DRIVER, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _load_driver_stub() -> None:
    """Compile and load the stub; its soname satisfies the dynamic linker's look-up of the real library.

    Raises:
        TunerError: No C compiler, or it fails.
    """
    source = importlib.resources.files("tuner_core.compiler") / "cuda_stub.c"
    with tempfile.TemporaryDirectory(prefix="cuda-stub-") as directory, importlib.resources.as_file(source) as path:
        library = Path(directory) / _DRIVER
        command = ["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{_DRIVER}", "-o", str(library), str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise TunerError("cannot build for CUDA: no C compiler (cc) on this host; install gcc or clang") from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().splitlines()[-1:] or ["no message"]
            raise TunerError(f"cannot build for CUDA: the C compiler (cc) failed: {reason[0]}") from None
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # stays mapped after its file is gone


def load_tvm_cuda_runtime(*, allow_stub: bool) -> bool:
    """Make TVM's CUDA runtime available in this process. ``import tvm`` alone misses it where cudart comes from PyPI.

    Args:
        allow_stub: On a host without a driver, load a stub in its place: for processes that only build. Never used
            where a real driver is installed.

    Returns:
        Whether the stub stands in for the driver.

    Raises:
        TunerError: Driver (and no stub allowed), cudart or a C compiler is missing.
    """
    import tvm.base
    from tvm_ffi.libinfo import load_lib_ctypes

    loaded = tvm.base._LOADED_LIBS
    if "tvm_runtime_cuda" in loaded:
        return bool(getattr(loaded["tvm_runtime_cuda"], "over_stub", False))
    stub = not driver_present()
    if stub:
        if not allow_stub:
            raise TunerError(f"the NVIDIA driver's library {_DRIVER} was not found on this host")
        _load_driver_stub()
    if _open(_CUDART, ctypes.RTLD_GLOBAL) is None:
        raise TunerError(f"the CUDA runtime ({_CUDART}) was not found; {INSTALL}")
    directory = Path(loaded["tvm_runtime"]._name).resolve().parent
    library = load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", extra_lib_paths=[directory])
    library.over_stub = stub
    loaded["tvm_runtime_cuda"] = library
    return stub
