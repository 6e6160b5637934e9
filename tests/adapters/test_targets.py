"""Presets of target_modules in diffusion models, language models and vision models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torchvision
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from lit_lora.adapters import inject
from lit_lora.adapters.targets import preset_targets
from lit_lora.errors import UserError
from lit_lora.families import Flux, StableDiffusion3
from lit_lora.lightning_cli import build_cli
from tests.helpers import tiny_unet

LANGUAGE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        in_channels=4,
    )


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=0))


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **LANGUAGE))


def bert() -> nn.Module:
    return BertModel(BertConfig(intermediate_size=32, **LANGUAGE))


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32)


def endings(names: Iterable[str]) -> set[str]:
    """Names below the numbered block or layer."""
    return {re.split(r"(?:blocks|layers|layer|h|encoder_layer_)[._]?\d+\.", name)[-1] for name in names}


UNET_ATTENTION = {f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}
FEED_FORWARD = {"ff.net.0.proj", "ff.net.2"}


@pytest.mark.parametrize(
    ("model", "preset", "expected"),
    [
        (tiny_unet, "attention", UNET_ATTENTION),
        (tiny_unet, "mlp", FEED_FORWARD),
        (tiny_unet, "attention+mlp", UNET_ATTENTION | FEED_FORWARD),
        (sd3, "attention", set(StableDiffusion3.default_targets)),
        (sd3, "mlp", {*FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2"}),
        (flux, "attention+mlp", {*Flux.default_targets, "proj_mlp", "proj_out"}),
        (gpt2, "attention", {"attn.c_attn", "attn.c_proj"}),
        (gpt2, "mlp", {"mlp.c_fc", "mlp.c_proj"}),
        (gpt2, "all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (opt, "mlp", {"fc1", "fc2"}),
        (bert, "attention", {f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")}),
        (bert, "mlp", {"intermediate.dense", "output.dense"}),
        (vision_transformer, "attention+mlp", {"self_attention", "mlp.0", "mlp.3"}),
        (vision_transformer, "all-linear", {"mlp.0", "mlp.3", "heads.head"}),
    ],
)
def test_a_preset_is_the_layers_of_its_kind(model: Callable[[], nn.Module], preset: str, expected: set[str]) -> None:
    assert endings(preset_targets(preset, model())) == expected


def test_convolutions_of_a_unet_and_of_a_resnet() -> None:
    for model in (tiny_unet(), torchvision.models.resnet18()):
        convolutions = {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
        targets = preset_targets("conv", model)
        found = {name for name, _ in model.named_modules() if _matches(targets, name)}
        assert found == convolutions
        assert len(found) > 10


def _matches(targets: set[str] | str, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or name.endswith(tuple(f".{target}" for target in targets))


def test_a_name_that_ends_another_name_does_not_match_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Conv2d(4, 4, 1)})

    model = Model()
    adapted = inject(model, peft.LoraConfig(r=2, target_modules="all-linear"), ())
    assert {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name} == {
        "base_model.model.proj"
    }


def adapted_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def test_presets_with_blocks_ranks_and_alphas() -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules="attention+mlp",
        exclude_modules=r"(?!up_blocks\.).*",
        rank_pattern={r"ff\.net\.2": 4},
        alpha_pattern={"to_q": 8},
    )
    adapted = inject(tiny_unet(), config, ())
    names = adapted_names(adapted)
    assert names
    assert all(name.startswith("up_blocks.") for name in names)
    assert endings(names) == UNET_ATTENTION | FEED_FORWARD
    ranks = {
        name.rpartition(".")[2]: layer.r["default"]
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert (ranks["2"], ranks["proj"], ranks["to_q"]) == (4, 2, 2)
    layers = [layer for name, layer in adapted.named_modules() if name.endswith("to_q") and hasattr(layer, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {4.0}


def test_blocks_by_regular_expression_and_by_number() -> None:
    by_expression = peft.LoraConfig(r=2, target_modules=r"up_blocks\..*\.(to_q|to_v)")
    names = adapted_names(inject(tiny_unet(), by_expression, ()))
    assert names
    assert all(name.startswith("up_blocks.") and name.endswith(("to_q", "to_v")) for name in names)
    by_number = peft.LoraConfig(
        r=2, target_modules=["to_q"], layers_to_transform=[1], layers_pattern="single_transformer_blocks"
    )
    assert adapted_names(inject(flux(), by_number, ())) == {"single_transformer_blocks.1.attn.to_q"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("conv", "'conv' matches no layer of FluxTransformer2DModel: it has none of all convolutions"),
        ("attention+ff", "presets are attention, mlp, all-linear, conv, joined with"),
        (["attention"], "write the preset without a list: target_modules: attention"),
    ],
)
def test_what_matches_nothing_lists_the_presets(targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        inject(flux(), peft.LoraConfig(r=2, target_modules=targets), ())


def test_attention_of_torch_is_adapted_as_a_whole() -> None:
    """Its own ``out_proj`` is never called, so that an adapter in it would not train."""
    torch.manual_seed(0)
    model = inject(vision_transformer(), peft.LoraConfig(r=2, target_modules="attention"), ())
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) == 4
    assert all(gradient is not None for gradient in gradients)


def test_a_config_names_a_preset(sd_folder: Path, tmp_path: Path) -> None:
    adapter = {"class_path": "LoraConfig", "init_args": {"r": 2, "lora_alpha": 2, "target_modules": "attention+mlp"}}
    family = {
        "class_path": "StableDiffusion",
        "init_args": {"pretrained_model_name_or_path": str(sd_folder)},
    }
    data = {"class_path": "WebDatasetDataModule", "init_args": {"train_shards": str(tmp_path)}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"model": {"family": family, "adapter": adapter}, "data": data}))
    module = build_cli(["fit", "--config", str(path), "--trainer.accelerator", "cpu"], run=False).model
    module.configure_model()
    assert endings(adapted_names(module.family.denoiser)) == UNET_ATTENTION | FEED_FORWARD
    module.save_adapter(tmp_path / "adapter")
    # What is saved holds no preset, so that PEFT and diffusers read it.
    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    loaded = peft.PeftModel.from_pretrained(unet, tmp_path / "adapter")
    assert endings(adapted_names(loaded)) == UNET_ATTENTION | FEED_FORWARD
