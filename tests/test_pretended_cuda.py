"""The tests that need a GPU, on a pretended one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import made_once
from tests.pretended_cuda import build, environment, missing

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
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-k", selected, str(Path(__file__).with_name(file))],
        cwd=Path(__file__).parents[1],
        env=environment(libraries),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout
    assert "skipped" not in ended.stdout


@pytest.mark.parametrize("segments", ["", "expandable_segments:True"], ids=["segments", "expandable segments"])
def test_its_own_values_and_refusals(segments: str, libraries: Path) -> None:
    """Memory is counted by torch's allocator, and tensors on two devices are refused."""
    code = """
import os, torch
there = torch.arange(12.0, device="cuda").view(3, 4)
assert (there[1:, 1] * 2).tolist() == [10.0, 18.0]
before = torch.cuda.memory_allocated()
held = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
assert torch.cuda.memory_allocated() - before == 1 << 20
assert {one["is_expandable"] for one in torch.cuda.memory_snapshot()} == {bool(os.environ["PYTORCH_CUDA_ALLOC_CONF"])}
large = torch.full((30_000_000,), 3, dtype=torch.uint8, device="cuda")
assert large[-1].item() == 3
unused = torch.cuda.mem_get_info()[0]
del large
torch.cuda.empty_cache()
assert torch.cuda.mem_get_info()[0] - unused >= 30_000_000
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
    own = environment(libraries) | {"PYTORCH_CUDA_ALLOC_CONF": segments}
    ended = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_without_computing_the_same_memory_is_taken(libraries: Path) -> None:
    code = """
import torch
from torch import nn
import torch.nn.functional as F

layers = [nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Flatten(2), nn.Linear(4096, 64), nn.LayerNorm(64)]
layers = nn.Sequential(*layers).cuda()
optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
for _ in range(2):
    with torch.autocast("cuda", torch.bfloat16):
        x = layers(torch.ones(8, 4, 64, 64, device="cuda")).view(8, 2, 16, 64)
        loss = F.scaled_dot_product_attention(x, x, x).float().square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
print(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), loss.isfinite().item())
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment(libraries) | {"LIT_LORA_CUDA_COMPUTES": computes},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        for computes in ("1", "0")
    ]
    assert found[0] == found[1]
    assert int(found[0].split()[0]) > 10_000_000
