"""Which CUDA errors cost a worker, and how they read in a record."""

from __future__ import annotations

import pytest

from tuner_server.gpu.faults import context_lost, headline

LAUNCH = "CUDALaunch Error: {}\n grid=(1,1,1),  block=(32,1,1)\n// func_name=main_kernel\n// CUDA Source\n// -----"


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (LAUNCH.format("CUDA_ERROR_ILLEGAL_ADDRESS"), True),
        (LAUNCH.format("CUDA_ERROR_LAUNCH_FAILED"), True),
        (LAUNCH.format("CUDA_ERROR_MPS_CLIENT_TERMINATED"), True),
        (LAUNCH.format("CUDA_ERROR_SOMETHING_NEW"), True),
        (LAUNCH.format("CUDA_ERROR_INVALID_VALUE"), False),
        (LAUNCH.format("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"), False),
        ("CUDA Runtime Error: cudaErrorIllegalAddress: an illegal memory access was encountered", True),
        ("CUDA: an illegal memory access was encountered", True),
        ("CUDA Runtime Error: cudaErrorMemoryAllocation: out of memory", False),
        ("CUDAError: cuModuleLoadData(&module) failed with error: CUDA_ERROR_NO_BINARY_FOR_GPU", False),
        ("Check failed: argument 0 has the wrong shape", False),
    ],
)
def test_a_context_is_taken_for_lost_unless_the_error_is_known_to_spare_it(text: str, lost: bool) -> None:
    assert context_lost(text) is lost


def test_a_launch_error_is_reported_by_its_name() -> None:
    assert headline(LAUNCH.format("CUDA_ERROR_ILLEGAL_ADDRESS")) == "CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS"
    assert headline("one\ntwo") == "two"
    assert headline("") == ""
