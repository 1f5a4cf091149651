"""Load TVM once, quickly, and refuse the combinations that are known to crash."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType
from typing import Any, cast

from tuner_core.errors import TunerError

TVM_PIN = "0.27.0.post1"
FFI_PIN = "0.1.14.post1"

_leave_torch_out = False
_checked = False  # reading the packages' metadata takes milliseconds, and this is called for every workload


def check_pins() -> None:
    """Compare the installed apache-tvm and apache-tvm-ffi with the pins, without importing them.

    A newer apache-tvm-ffi dies with SIGSEGV in ``tvm.ir.save_json``; no exception can report that.

    Raises:
        TunerError: Missing, or another version.
    """
    for package, pin in (("apache-tvm", TVM_PIN), ("apache-tvm-ffi", FFI_PIN)):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise TunerError(f"{package} is not installed: pip install {package}=={pin}") from None
        if version != pin:
            raise TunerError(f"{package} {version} is installed, but only {pin} works: pip install {package}=={pin}")


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Have TVM imported without torch, unless this process has imported that already.

    tvm_ffi imports torch where it is installed: half a gigabyte, and it asks torch for GPUs, which initialises CUDA.
    Torch is not found, as if it were not installed. None in ``sys.modules`` would be simpler, but scipy, which xgboost
    imports, takes what is there for torch.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.meta_path[:] = [cast(MetaPathFinder, _NoTorch(finder)) for finder in sys.meta_path]
    try:
        yield
    finally:
        sys.meta_path[:] = [one.finder if isinstance(one, _NoTorch) else one for one in sys.meta_path]


class _NoTorch:
    """A finder of modules that finds all but one."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec: ModuleSpec | None = None if fullname == "torch" else self.finder.find_spec(fullname, path, target)
        return spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def leave_torch_out() -> None:
    """Let :func:`load_tvm` use :func:`without_torch` from now on: for programs that hand TVM no torch tensors."""
    global _leave_torch_out
    _leave_torch_out = True


def _stack_without_modules(context: int = 1) -> list[inspect.FrameInfo]:
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames


def load_tvm(*, intrinsics: bool = False) -> str:
    """Import TVM.

    Args:
        intrinsics: Also import the schedule intrinsics that a TuneContext or a build needs. Their 496 ``T.prim_func``
            decorators each call ``inspect.stack()``, which looks for the module of every frame: 20 s. A stack without
            module look-ups serves them as well, in 1 s.

    Returns:
        TVM's version, as pip knows it.

    Raises:
        TunerError: TVM is missing or not at the pinned version.
    """
    global _checked
    if not _checked:
        check_pins()
        _checked = True
    with without_torch() if _leave_torch_out and "tvm" not in sys.modules else contextlib.nullcontext():
        import tvm
    if intrinsics:
        original = inspect.stack
        inspect.stack = _stack_without_modules
        try:
            import tvm.s_tir.tensor_intrin  # noqa: F401
        finally:
            inspect.stack = original
    return TVM_PIN
