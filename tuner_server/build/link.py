"""Objects to a shared library, with the linker itself: a compiler driver costs 20 ms more for the same result."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

_OPTIONS = ("-shared", "--strip-debug", "--build-id=none", "--no-as-needed", "-z", "noexecstack")


class LinkError(Exception):
    """No linker, or it refused."""


@functools.cache
def _command() -> tuple[str, ...]:
    if linker := shutil.which("ld"):
        return (linker, *_OPTIONS)
    if driver := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        return (driver, "-shared", "-Wl,--strip-debug", "-nostartfiles")
    raise LinkError("neither a linker (ld) nor a C compiler (cc) was found: install binutils or gcc")


def link_shared(output: str, objects: Sequence[str], options: Any = None, **_: Any) -> None:
    """Link objects; usable as ``fcompile`` of ``export_library``.

    TVM's own symbols stay undefined: the process that loads the library has them. libm is named when the linker finds
    it, and else resolved in that process as well.

    Args:
        output: Library to write.
        objects: Object files.
        options: Ignored; TVM passes compiler flags here.

    Raises:
        LinkError: With what the linker said.
    """
    for libraries in (("-lm",), ()):
        command = [*_command(), "-o", output, *objects, *libraries]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, close_fds=False, check=False)
        if done.returncode == 0:
            return
    raise LinkError(done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["the linker failed"])


link_shared.object_format = "o"  # type: ignore[attr-defined]  # what export_library asks of an fcompile
