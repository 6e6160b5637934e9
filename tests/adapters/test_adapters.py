from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from lit_lora.adapters import adapter_keys, check_adapter_config, check_adapter_state, inject, plain_config
from lit_lora.adapters.state import warn_of_left_out
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.helpers import diffusion_module, save_adapter

TARGETS = ("to_q", "to_k")


@pytest.fixture
def unet(sd_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")


CONFIGS = {
    "LoRA": peft.LoraConfig(r=2, lora_alpha=2),
    "convolutions": peft.LoraConfig(r=2, lora_alpha=2, target_modules=["conv1", "conv2"]),
    "DoRA": peft.LoraConfig(r=2, lora_alpha=2, use_dora=True),
    "ranks per layer": peft.LoraConfig(r=2, lora_alpha=2, rank_pattern={"to_q": 4}),
    "LoHa": peft.LoHaConfig(r=2, alpha=2),
    "LoKr": peft.LoKrConfig(r=2, alpha=2),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8),
    "IA3": peft.IA3Config(feedforward_modules=[]),
    "VeRA": peft.VeraConfig(r=2, target_modules=["attn1.to_q"]),
    "RandLora": peft.RandLoraConfig(r=2),
    "Lily": peft.LilyConfig(r=2),
    "IA3 without a list": peft.IA3Config(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_any_layer_method_goes_in_and_its_keys_restore_it(name: str, unet: UNet2DConditionModel) -> None:
    model = inject(unet, CONFIGS[name], TARGETS)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    keys = adapter_keys(model)
    assert trainable <= keys
    state = model.state_dict()
    assert keys <= state.keys()
    assert not [key for key in keys if "base_layer" in key]
    # Change what is trained, put the saved keys back: the same function of its input again.
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 16)
    saved = {key: value.clone() for key, value in state.items() if key in keys}
    with torch.no_grad():
        before = model(x, t, text).sample
        for key, parameter in model.named_parameters():
            if key in trainable:
                parameter.add_(0.5)
        assert not torch.allclose(model(x, t, text).sample, before)
        model.load_state_dict(saved, strict=False)
        torch.testing.assert_close(model(x, t, text).sample, before)


def test_targets_that_match_nothing_raise_and_say_what_there_is(unet: UNet2DConditionModel) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"q_proj.*Names that occur in this model are .*to_q"):
        inject(unet, config, TARGETS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["to_q", "to_qq"]}, "target_modules: 'to_qq' matches no layer"),
        ({"target_modules": ["to_q"], "modules_to_save": ["conv_end"]}, "modules_to_save: 'conv_end' matches no layer"),
        ({"target_modules": ["to_q"], "exclude_modules": ["mid"]}, "exclude_modules: 'mid' matches no layer"),
        (
            {"target_modules": ["to_q"], "exclude_modules": "mid.*qq"},
            r"exclude_modules: 'mid\.\*qq' matches no layer of UNet",
        ),
        (
            {"target_modules": ["to_q"], "layers_to_transform": [0, 9], "layers_pattern": "transformer_blocks"},
            "layers_to_transform: 9 is the number of no block with an adapted layer; those are 0$",
        ),
        ({"target_modules": ["to_q"], "rank_pattern": {"to_k": 4}}, "rank_pattern: 'to_k' matches none of the"),
        (
            {"target_modules": ["to_q"], "alpha_pattern": {"attn9.*": 4}},
            r"alpha_pattern: 'attn9\.\*' matches none of the",
        ),
    ],
)
def test_each_name_has_to_match(options: dict[str, Any], message: str, unet: UNet2DConditionModel) -> None:
    with pytest.raises(UserError, match=message):
        inject(unet, peft.LoraConfig(r=2, lora_alpha=2, **options), ("to_q",))


def test_names_and_patterns_that_match_go_in(unet: UNet2DConditionModel) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["attn1.to_q", "to_v"], rank_pattern={r"attn1\.to_q": 4}, modules_to_save=["conv_out"]
    )
    ranks = {value.shape[0] for name, value in inject(unet, config, ()).named_parameters() if "to_q.lora_A" in name}
    assert ranks == {4}


def test_methods_for_prompts_are_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(UserError, match="adapts prompts, not layers"):
        inject(unet, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), TARGETS)


def test_an_alpha_far_below_the_rank_warns(unet: UNet2DConditionModel) -> None:
    with pytest.warns(UserWarning, match="lora_alpha=1 is far below r=16"):
        inject(unet, peft.LoraConfig(r=16, lora_alpha=1), TARGETS)


def test_a_large_negative_alpha_is_not_far_below_the_rank(
    unet: UNet2DConditionModel, recwarn: pytest.WarningsRecorder
) -> None:
    inject(unet, peft.LoraConfig(r=2, lora_alpha=-4), TARGETS)
    assert not [warning for warning in recwarn if "far below" in str(warning.message)]


@pytest.mark.parametrize("config", [peft.LoraConfig(lora_alpha=0), peft.LoHaConfig(alpha=0)])
def test_an_alpha_of_zero(config: peft.PeftConfig, unet: UNet2DConditionModel) -> None:
    with pytest.raises(UserError, match="alpha=0 scales the updates to zero"):
        inject(unet, config, TARGETS)


def test_an_alpha_of_zero_in_single_layers(unet: UNet2DConditionModel) -> None:
    with pytest.raises(UserError, match=r"alpha_pattern\['to_v'\]=0 scales the updates of its layers to zero"):
        inject(unet, peft.LoraConfig(alpha_pattern={"to_q": 2, "to_v": 0}), TARGETS)


def test_initialisations_that_need_more_than_a_config(unet: UNet2DConditionModel) -> None:
    config = peft.LoraConfig(r=2)
    config.init_lora_weights = "nonsense"
    with pytest.raises(UserError, match="init_lora_weights='nonsense' is not known here"):
        inject(unet, config, TARGETS)
    for name, callback, options in (
        ("lora_ga", "LoraGaInitialization", {}),
        ("loftq", "LoftqInitialization", {"loftq_config": peft.LoftQConfig()}),
        ("eva", "EvaInitialization", {"eva_config": peft.EvaConfig()}),
    ):
        with pytest.raises(UserError, match=f"add {callback} to trainer.callbacks"):
            inject(unet, peft.LoraConfig(r=2, init_lora_weights=name, **options), TARGETS)


def test_biases_of_a_bfloat16_base_are_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(UserError, match="bias='all' trains weights of the base"):
        inject(unet.to(torch.bfloat16), peft.LoraConfig(r=2, bias="all"), TARGETS)


def test_only_what_the_files_leave_out_is_told(unet: UNet2DConditionModel) -> None:
    """Biases are in the files under the names of the base."""
    model = inject(unet, peft.LoraConfig(r=2, bias="all"), TARGETS)
    warn_of_left_out(model)
    model.get_base_model().conv_in.weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"without 1 other trained tensors, the first is \S+\.conv_in\.weight"):
        warn_of_left_out(model)


def test_whatever_is_trained_is_float32(sd_folder: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.bfloat16)
    family.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, modules_to_save=["conv_out"]))
    assert {p.dtype for p in family.denoiser.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in family.denoiser.parameters() if not p.requires_grad} == {torch.bfloat16}
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        family.denoiser(x, t, text).sample.float().mean().backward()


def test_default_targets_are_the_familys(unet: UNet2DConditionModel) -> None:
    model = inject(unet, peft.LoraConfig(r=2, lora_alpha=2), ("to_q",))
    assert all(".to_q." in key for key in adapter_keys(model))


def test_a_default_target_that_is_a_list_in_one_block_and_a_layer_in_another() -> None:
    linear = torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.ModuleDict({"to_out": torch.nn.ModuleList([linear])}),
            "b": torch.nn.ModuleDict({"to_out": torch.nn.Linear(4, 4), "to_q": torch.nn.Linear(4, 4)}),
        }
    )
    adapted: Any = inject(model, peft.LoraConfig(r=2, lora_alpha=2), ("to_out", "to_out.0", "to_q"))
    assert adapted.peft_config["default"].target_modules == {"b.to_out", "to_out.0", "to_q"}
    layers = {key.split(".lora_")[0] for key in adapter_keys(adapted)}
    assert layers == {f"base_model.model.{name}" for name in ("a.to_out.0", "b.to_out", "b.to_q")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4, "lora_alpha": 4}, r"have another shape, the first: .* in the checkpoint, \(2, "),
        ({"target_modules": ["to_q", "to_k", "to_v"]}, "tensors of the checkpoint are not in this adapter"),
        ({"target_modules": ["to_q"]}, "tensors of this adapter are not in the checkpoint"),
    ],
)
def test_another_adapters_state_is_refused(change: dict[str, Any], message: str, sd_folder: Path) -> None:
    def adapted(**options: Any) -> torch.nn.Module:
        model = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
        return inject(model, peft.LoraConfig(**({"r": 2, "lora_alpha": 2} | options)), TARGETS)

    saved = adapted(**change)
    state = {key: value for key, value in saved.state_dict().items() if key in adapter_keys(saved)}
    with pytest.raises(UserError, match=message):
        check_adapter_state(adapted(), state)
    check_adapter_state(saved, state)


def test_the_state_of_the_module_is_gathered_once(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = inject(unet, peft.LoraConfig(r=2), TARGETS)
    state = {key: value for key, value in model.state_dict().items() if key in adapter_keys(model)}
    gathered = Mock(side_effect=model.state_dict)
    monkeypatch.setattr(model, "state_dict", gathered)
    check_adapter_state(model, state)
    assert gathered.call_count == 1


def test_an_adapter_for_a_model_without_one_is_refused(unet: UNet2DConditionModel) -> None:
    saved = inject(UNet2DConditionModel.from_config(unet.config), peft.LoraConfig(r=2), TARGETS)
    state = {key: value for key, value in saved.state_dict().items() if key in adapter_keys(saved)}
    with pytest.raises(
        UserError, match="UNet2DConditionModel does not have, which has no adapter; add the callback LoraInj"
    ):
        check_adapter_state(unet, state)


def test_another_alpha_is_refused_and_another_dropout_is_not() -> None:
    here = plain_config(peft.LoraConfig(r=4, lora_alpha=8))
    check_adapter_config(here, plain_config(peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5)))
    with pytest.raises(UserError, match="lora_alpha is 8, in the checkpoint 4"):
        check_adapter_config(here, plain_config(peft.LoraConfig(r=4, lora_alpha=4)))


def test_the_same_adapter_is_the_same_bytes(sd_folder: Path, tmp_path: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    family.add_adapter(CONFIGS["LoRA"])
    written = set()
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_adapter(family, folder)
        written.add(tuple(path.read_bytes() for path in sorted(folder.iterdir())))
    assert len(written) == 1


@pytest.mark.parametrize(
    "config",
    [
        peft.XLoraConfig(hidden_size=8, adapters={"1": "nowhere"}),
        peft.PolyConfig(),
        peft.TrainableTokensConfig(token_indices=[1]),
        peft.AdaptionPromptConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_methods_for_language_models_are_refused(config: peft.PeftConfig, unet: UNet2DConditionModel) -> None:
    with pytest.raises(
        UserError, match=f"{type(config).__name__} needs a language model; use a method that adapts layers"
    ):
        inject(unet, config, TARGETS)


def test_a_method_that_cannot_adapt_the_layers_is_one_error(unet: UNet2DConditionModel) -> None:
    with pytest.raises(
        UserError, match=r"C3AConfig does not fit UNet2DConditionModel: .*block size(.|\n)*target_modules is"
    ):
        inject(unet, peft.C3AConfig(block_size=256), TARGETS)


def test_a_base_with_nan_is_told_as_the_base(sd_folder: Path, tmp_path: Path) -> None:
    """DoRA takes its magnitudes from the base, PiSSA its factors."""
    bad = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

    def damaged(config: peft.PeftConfig) -> LoraDiffusion:
        module = diffusion_module(sd_folder, config)
        module.family.load(torch.float32)
        module.family.denoiser.get_submodule(bad).weight.data[0, 0] = float("nan")
        module.configure_model()
        return module

    found = rf"replace the base's files: 1 frozen tensors hold NaN or Inf, the first is \S*{bad}"
    with pytest.raises(UserError, match=f"tensors of the adapter hold NaN or Inf.*; {found}"):
        damaged(peft.LoraConfig(r=2, use_dora=True, target_modules=["to_q"])).save_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"UNet2DConditionModel cannot be adapted: {found}"):
        damaged(peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["to_q"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_files_load_in_plain_peft_and_plain_diffusers(name: str, sd_folder: Path, tmp_path: Path) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    family.add_adapter(CONFIGS[name])
    with torch.no_grad():
        for parameter in family.denoiser.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    save_adapter(family, tmp_path)

    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 16)
    family.denoiser.eval()
    with torch.no_grad():
        expected = family.denoiser(x, t, text).sample
        base = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
        assert not torch.allclose(base(x, t, text).sample, expected, atol=1e-3)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(loaded(x, t, text).sample, expected)
        lora_file = tmp_path / "pytorch_lora_weights.safetensors"
        assert lora_file.exists() == isinstance(CONFIGS[name], peft.LoraConfig)
        if lora_file.exists():
            pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
            pipeline.load_lora_weights(tmp_path)
            torch.testing.assert_close(pipeline.unet(x, t, text).sample, expected)
            with safe_open(lora_file, "pt") as file:
                assert str(sd_folder) in file.metadata()["lora_adapter_metadata"]
