"""The tests that need a GPU, on a pretended one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import made_once
from tests.pretended_cuda import build, command, environment, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

LEFT_OUT = "not compiled and not copied_ahead"
"""It has no compiled kernels, and takes minutes for the product by which a real one lags behind."""


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "pretended_cuda", build)


@pytest.mark.parametrize(
    ("file", "selected"),
    [
        ("test_cuda.py", f"{LEFT_OUT} and not nccl"),
        ("test_cuda.py", f"{LEFT_OUT} and nccl"),
        ("test_cuda_steps.py", ""),
    ],
    ids=["alone", "strategies", "steps"],
)
def test_what_needs_a_gpu_passes_on_a_pretended_one(file: str, selected: str, libraries: Path) -> None:
    ended = subprocess.run(
        command("pytest", "-n", "0", "-q", "-k", selected, str(Path(__file__).with_name(file))),
        cwd=Path(__file__).parents[1],
        env=environment(libraries),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout
    assert "skipped" not in ended.stdout


def test_its_own_values_and_refusals(libraries: Path) -> None:
    """Memory is counted by torch's allocator, and tensors on two devices are refused."""
    code = """
import tests.pretended_cuda.kernels, torch
there = torch.arange(12.0, device="cuda").view(3, 4)
assert (there[1:, 1] * 2).tolist() == [10.0, 18.0]
before = torch.cuda.memory_allocated()
held = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
assert torch.cuda.memory_allocated() - before == 1 << 20
layer = torch.nn.Linear(4, 4).cuda()
with torch.autocast("cuda", torch.bfloat16):
    assert layer(there).dtype == torch.bfloat16
    assert torch.nn.functional.layer_norm(there.bfloat16(), (4,)).dtype == torch.float32
for refused, words in ((lambda: layer(torch.ones(4)), "same device"), (lambda: torch.empty(1 << 40, device="cuda"), "memory")):
    try:
        refused()
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
"""
    ended = subprocess.run([sys.executable, "-c", code], env=environment(libraries), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
