"""Gradient checkpointing: the same gradients, fewer saved activations, by block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lit_lora.errors import UserError
from lit_lora.memory.checkpointing import enable_gradient_checkpointing
from tests.helpers import tiny_unet

Case = tuple[nn.Module, dict[str, Any]]


def unet() -> Case:
    model = tiny_unet()
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    return model, inputs


def flux() -> Case:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs


def sd3() -> Case:
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([3, 700]),
    }
    return model, inputs


MODELS = [unet, flux, sd3]
SOME = {unet: ["up_blocks.*"], flux: ["single_transformer_blocks.0"], sd3: ["transformer_blocks.1"]}


def adapted(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], int]:
    """Gradients of the adapter, and the bytes saved for the backward pass, parameters apart."""
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(**inputs).sample.square().mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert len(gradients) > 0
    return gradients, sum(saved.values())


@pytest.mark.parametrize("before", [True, False], ids=["before PEFT", "after PEFT"])
@pytest.mark.parametrize("make", MODELS)
def test_the_same_gradients_with_fewer_bytes(make: Any, before: bool) -> None:
    model, inputs = make()
    results = {}
    for name, which in {"none": False, "some": SOME[make], "all": True}.items():
        candidate = copy.deepcopy(model)
        torch.manual_seed(1)
        if before:
            enable_gradient_checkpointing(candidate, which)
            candidate = adapted(candidate)
        else:
            candidate = adapted(candidate)
            enable_gradient_checkpointing(candidate, which)
        results[name] = step(candidate, inputs)
    plain, plain_bytes = results["none"]
    for name in ("some", "all"):
        for mine, theirs in zip(results[name][0], plain, strict=True):
            assert torch.equal(mine, theirs)
    assert results["all"][1] < results["some"][1] < plain_bytes


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["mid_block"], {"mid_block"}),
        (["down_blocks.0", "mid_*"], {"down_blocks.0", "mid_block"}),
        (["*.resnets.0"], {"down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"}),
        (["down_blocks.0.attentions.0.transformer_blocks.0"], {"down_blocks.0"}),
    ],
)
def test_the_matching_blocks_are_recomputed(patterns: list[str], expected: set[str]) -> None:
    model, inputs = unet()
    enable_gradient_checkpointing(model, patterns)
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            module.register_forward_pre_hook(
                lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)  # type: ignore[misc]
            )
    step(model, inputs)
    twice = {name for name, count in calls.items() if count == 2}
    assert {name for name in expected if any(block.startswith(name) for block in twice)} == expected
    assert all(any(block.startswith(name) for name in expected) for block in twice)
    if patterns == ["*.resnets.0"]:
        assert all(name.endswith("resnets.0") for name in twice)


def test_sampling_recomputes_nothing() -> None:
    model, inputs = unet()
    enable_gradient_checkpointing(model, True)
    with torch.no_grad():
        assert not model(**inputs).sample.requires_grad


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (unet, "UNet2DConditionModel; it has down_blocks.0, down_blocks.1, up_blocks.0, up_blocks.1, mid_block, and"),
        (
            flux,
            "transformer_blocks.0, transformer_blocks.1, single_transformer_blocks.0, single_transformer_blocks.1, and",
        ),
    ],
)
@pytest.mark.parametrize("pattern", ["encoder_blocks.*", "down", "conv_in"])
def test_a_pattern_that_matches_nothing(make: Any, names: str, pattern: str) -> None:
    with pytest.raises(UserError, match=rf"'{pattern.replace('*', '[*]')}' matches no block of .*{names}"):
        enable_gradient_checkpointing(make()[0], ["*", pattern])


def test_models_and_values_that_cannot() -> None:
    with pytest.raises(UserError, match="Linear does not support gradient checkpointing"):
        enable_gradient_checkpointing(nn.Linear(2, 2), True)
    with pytest.raises(UserError, match=r"write \['mid_block'\]"):
        enable_gradient_checkpointing(unet()[0], "mid_block")
