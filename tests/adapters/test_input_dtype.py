from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from lit_lora.adapters import inject
from lit_lora.adapters.input_dtype import keep_input_dtype


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = (nn.Linear(16, 16) for _ in range(2))
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.to_q(x) * self.to_k(x)
        images: Tensor = self.conv(rows.mT.reshape(-1, 16, 4, 4))
        return images


def models(**options: Any) -> tuple[nn.Module, nn.Module]:
    """Two equal models with a bfloat16 base and a float32 adapter with values, the second of which keeps its inputs."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "conv"], init_lora_weights=False, **options)
    model = inject(Attention().bfloat16(), config, ())
    kept = copy.deepcopy(model)
    keep_input_dtype(kept)
    return model, kept


def gradients(model: nn.Module) -> tuple[list[Tensor], int]:
    """Output, gradients of input and adapter, and bytes of the different tensors that were saved for the backward pass."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(1)
    x = torch.randn(2, 16, 16).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(x)
    out.float().square().mean().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert x.grad is not None
    return [out, x.grad, *trained], sum(saved.values())


def test_values_are_the_same_with_less_memory() -> None:
    model, kept = models()
    expected, bytes_before = gradients(model)
    found, bytes_after = gradients(kept)
    assert len(found) == len(expected) == 8
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    # Inputs of the three layers are 2 x 16 x 16 bfloat16; q and k share theirs.
    assert bytes_after <= bytes_before - 2 * 2 * 16 * 16 * 2


@pytest.mark.parametrize("options", [{"use_dora": True}])
def test_variants_stay_as_they_are(options: dict[str, Any]) -> None:
    model, kept = models(**options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(kept)[0], gradients(model)[0], strict=True))
    assert all(getattr(layer, "cast_input_dtype_enabled", True) for layer in kept.modules())
