"""How a process says that it has got no more memory: TVM, CUDA's driver and runtime, the C++ library, Python."""

from __future__ import annotations

_MARKS = (
    "out of memory",
    "out_of_memory",  # CUDA_ERROR_OUT_OF_MEMORY
    "cudaerrormemoryallocation",
    "bad_alloc",
    "cannot allocate memory",
    "alloc failed",
    "memoryerror",
)


def says_out_of_memory(text: str) -> bool:
    """Whether an error, or the last words of a process that ended itself, mean that an allocation failed.

    Code that TVM has compiled allocates its intermediates itself, and no exception can pass through it: the process
    aborts, and what it wrote to its standard error is all that tells why.

    Args:
        text: The error's text, or the end of the process's log.
    """
    lowered = text.lower()
    return any(mark in lowered for mark in _MARKS)
