"""Which last words of a process mean that it had no memory left."""

from __future__ import annotations

import pytest

from tuner_server.measure.memory import says_out_of_memory

TERMINATE = "terminate called after throwing an instance of 'tvm::ffi::Error'\n  what():  {}\n"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (TERMINATE.format("CUDA Runtime Error: cudaErrorMemoryAllocation (2): out of memory"), True),
        (TERMINATE.format("CUDAError: cuMemAlloc failed with error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (TERMINATE.format("CUDA: out of memory"), True),
        ("terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n", True),
        ("OSError: [Errno 12] Cannot allocate memory", True),
        ("MemoryError: the arguments need 12 MiB, a worker may use 1 MiB", True),
        (TERMINATE.format("CUDA: an illegal memory access was encountered"), False),
        ("double free or corruption (out)", False),
        ("", False),
    ],
)
def test_an_allocation_that_failed_is_told_from_other_ends(text: str, meant: bool) -> None:
    assert says_out_of_memory(text) is meant
