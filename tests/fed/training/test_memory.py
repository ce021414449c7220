"""Running out of memory is recognised on every device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fed.training.memory import is_out_of_memory


def error_of(allocate: object) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    return caught.value


def test_what_allocators_really_raise() -> None:
    assert is_out_of_memory(error_of(lambda: torch.empty(2**60, dtype=torch.uint8)))
    assert is_out_of_memory(error_of(lambda: np.empty(2**60, dtype=np.uint8)))
    assert is_out_of_memory(error_of(lambda: bytearray(2**60)))


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_by_what_they_say(error: BaseException, found: bool) -> None:
    assert is_out_of_memory(error) == found
