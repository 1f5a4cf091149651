"""Load TVM once, quickly, and refuse the combinations that are known to crash."""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from types import FrameType

from tuner_core.errors import TunerError

TVM_PIN = "0.27.0.post1"
FFI_PIN = "0.1.14.post1"

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
    import tvm

    if intrinsics:
        original = inspect.stack
        inspect.stack = _stack_without_modules
        try:
            import tvm.s_tir.tensor_intrin  # noqa: F401
        finally:
            inspect.stack = original
    return TVM_PIN
