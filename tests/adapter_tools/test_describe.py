"""What is said about an adapter."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from peft import IA3Config, LoHaConfig, LoKrConfig, PeftModel, set_peft_model_state_dict

from lit_lora.adapter_tools.describe import describe
from lit_lora.families import StableDiffusion
from tests.adapter_tools.layers import adapter, base, config, layers_of
from tests.formats.adapters import encoder_adapter


def test_a_lora() -> None:
    files = adapter(config(use_rslora=True, rank_pattern={"conv": 2}, alpha_pattern={"linear": 3}))
    files = replace(
        files, family=StableDiffusion, metadata={"ss_steps": "4"}, text_encoders={"text_encoder": encoder_adapter()}
    )
    files.state["base_model.model.conv.lora_A.weight"] = files.state["base_model.model.conv.lora_A.weight"].bfloat16()
    facts = describe(files, "path")
    assert (facts.method, facts.family, facts.base) == ("LoRA, rsLoRA", "StableDiffusion", "a base")
    states = [*files.state.values(), *files.text_encoders["text_encoder"].state.values()]
    assert facts.parameters == sum(tensor.numel() for tensor in states) == sum(facts.dtypes.values())
    assert facts.dtypes["bfloat16"] == 2 * 6 * 3 * 3
    assert facts.metadata == {"ss_steps": "4"}
    assert [(one.part, one.name) for one in facts.layers[-2:]][-1] == (
        "text_encoder",
        "text_model.encoder.layers.1.self_attn.out_proj",
    )
    for one in facts.layers[:-1]:
        layer = layers_of(files)[one.name]
        assert (one.rank, one.alpha) == ({"conv": 2}.get(one.name, 4), {"linear": 3}.get(one.name, 6))
        assert one.norm == pytest.approx(float(layer.delta().norm()), rel=1e-5)


@pytest.mark.parametrize("conv", [False, True], ids=["flat", "Tucker"])
@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=3, alpha_pattern={"linear": 5}, target_modules=["linear", "conv"]),
        LoKrConfig(r=2, alpha=3, rank_pattern={"linear": 1}, decompose_both=True, target_modules=["linear", "conv"]),
        LoKrConfig(r=99, alpha=3, target_modules=["linear", "conv"]),  # full matrices
    ],
    ids=["LoHa", "LoKr", "full LoKr"],
)
def test_products(config: LoHaConfig | LoKrConfig, conv: bool) -> None:
    config = replace(config, use_effective_conv2d=conv)
    files = adapter(config)
    facts = describe(files, "path")
    assert facts.method == config.peft_type.value
    model = PeftModel(base(), copy.deepcopy(config))
    set_peft_model_state_dict(model, dict(files.state))
    assert [one.name for one in facts.layers] == ["conv", "linear"]
    for one in facts.layers:
        layer: Any = model.get_base_model().get_submodule(one.name)
        assert (one.rank, one.alpha) == (layer.r["default"], layer.alpha["default"])
        assert one.norm == pytest.approx(float(layer.get_delta_weight("default").detach().norm()), rel=1e-5)


def test_another_method() -> None:
    facts = describe(adapter(IA3Config(target_modules=["linear"], feedforward_modules=[])), "path")
    assert facts.method == "IA3"
    assert [(one.name, one.rank, one.parameters) for one in facts.layers] == [("linear", None, 10)]


def test_dora() -> None:
    facts = describe(adapter(config(use_dora=True, target_modules=["linear"])), "path")
    assert facts.method == "DoRA"
    assert facts.layers[0].parameters == 4 * (8 + 10) + 10
    assert facts.dtypes == {"float32": 4 * 18 + 10}
