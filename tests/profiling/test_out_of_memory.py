from __future__ import annotations

import pytest
import torch

from lit_lora.profiling.out_of_memory import is_out_of_memory


def _caused_by(cause: BaseException) -> BaseException:
    error = ValueError("a batch could not be made")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (_caused_by(MemoryError()), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("not enough memory"), False),
        (None, False),
    ],
)
def test_errors_of_exhausted_memory(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
