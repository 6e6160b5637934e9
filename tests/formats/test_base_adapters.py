"""A new adapter is trained over others, which are merged into the base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning.pytorch import Trainer
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel
from torch import Tensor

from lit_lora import (
    AdapterCheckpoint,
    BaseAdapter,
    EvaInitialization,
    FromFile,
    LoftqInitialization,
    LoraDiffusion,
    LoraGaInitialization,
    UserError,
)
from lit_lora.cli import main
from lit_lora.families import Flux, StableDiffusion
from lit_lora.formats import AdapterFiles, format_named, write_adapter
from lit_lora.formats.base_adapters import BaseAdapters, recorded_adapters
from lit_lora.formats.base_records import base_metadata, base_records, same_adapters, told
from lit_lora.formats.facts import training_facts
from lit_lora.formats.find import read_adapter
from lit_lora.formats.quantized_base import quantized_metadata
from lit_lora.quantization import NF4
from tests.formats.adapters import encoder_adapter, loaded, trained
from tests.helpers import loader_of, make_batches

# PEFT warns of a second adapter, which is what these tests load.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

PATTERNS = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_v": 5}}
LORA = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1"], **PATTERNS)
SECOND = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"])


def saved(config: PeftConfig, sd_folder: Path, folder: Path, *formats: str) -> AdapterFiles:
    adapter = trained(loaded(StableDiffusion, sd_folder), config)
    folder.mkdir(exist_ok=True)
    write_adapter(adapter, folder, formats)
    return adapter


def module_over(sd_folder: Path, *adapters: BaseAdapter, **options: Any) -> LoraDiffusion:
    """A module whose second adapter has values as if it had been trained."""
    family = StableDiffusion(str(sd_folder))
    options = {"adapter": SECOND, "base_dtype": "float32"} | options
    module = LoraDiffusion(family, base_adapters=adapters, **options)
    module.configure_model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


INPUTS = (
    torch.linspace(-2, 2, 512).view(2, 4, 8, 8),
    torch.tensor([10, 500]),
    torch.linspace(-1, 1, 224).view(2, 7, 16),
)


def record_of(one: BaseAdapter) -> dict[str, Any]:
    return one.record_of(read_adapter(one.path))


def output(denoiser: Any) -> Tensor:
    with torch.no_grad():
        computed: Tensor = denoiser(*INPUTS).sample
    return computed


@pytest.mark.parametrize(
    "file", ["pytorch_lora_weights.safetensors", "kohya.safetensors", "comfyui.safetensors", "lycoris.safetensors", ""]
)
def test_the_training_model_is_diffusers_with_both_adapters(file: str, sd_folder: Path, tmp_path: Path) -> None:
    saved(LORA, sd_folder, tmp_path / "first", "kohya", "comfyui", "lycoris")
    module = module_over(sd_folder, BaseAdapter(str(tmp_path / "first" / file), 0.8))
    module.save_adapter(tmp_path / "second")
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    base = output(pipeline.unet)
    for name in ("first", "second"):
        pipeline.load_lora_weights(tmp_path / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    pipeline.set_adapters(["first", "second"], [0.8, 1.0])
    here = output(module.family.denoiser)
    assert (here - output(pipeline.unet)).abs().max() <= 1e-5
    pipeline.set_adapters(["second"], [1.0])
    for other in (base, output(pipeline.unet)):
        assert (here - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_alpha=3, use_dora=True, use_rslora=True, target_modules=["to_q", "conv1"]),
        LoHaConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], rank_pattern={"to_q": 3}),
        LoKrConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], decompose_both=True),
    ],
)
def test_updates_are_pefts(config: PeftConfig, sd_folder: Path, tmp_path: Path) -> None:
    saved(config, sd_folder, tmp_path / "first")
    family = StableDiffusion(str(sd_folder))
    family.load(
        torch.float32,
        without=("vae", "text"),
        changes=BaseAdapters([BaseAdapter(str(tmp_path / "first"), 0.7)], StableDiffusion).changes(),
    )
    model = PeftModel.from_pretrained(StableDiffusionPipeline.from_pretrained(sd_folder).unet, tmp_path / "first")
    unscaled = output(model)
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.7)
    assert (output(family.denoiser) - output(model)).abs().max() <= 1e-5
    assert (output(family.denoiser) - unscaled).abs().max() > 1e-4


@pytest.mark.parametrize("quantization", [None, NF4()])
def test_rounding_of_the_update_is_told(
    quantization: NF4 | None, sd_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A quantized base differs from its files by much more, which its user has chosen."""
    saved(SECOND, sd_folder, tmp_path / "first")
    for weight, dtype, is_coarse in ((1.0, "bfloat16", False), (1e-3, "float32", False), (1e-3, "bfloat16", True)):
        module_over(
            sd_folder, BaseAdapter(str(tmp_path / "first"), weight), base_dtype=dtype, quantization=quantization
        )
        messages = [str(one.message) for one in recwarn if "rounding the base to" in str(one.message)]
        assert bool(messages) == (is_coarse and quantization is None), (weight, dtype)
    assert all(
        " of first" not in one and "the change by first; set model.base_dtype to float32" in one for one in messages
    )


def test_several_adapters_do_not_depend_on_their_order(sd_folder: Path, tmp_path: Path) -> None:
    """DoRA's update depends on the weight, which is the base's own for each."""
    saved(LORA, sd_folder, tmp_path / "lora")
    saved(LoraConfig(r=2, use_dora=True, target_modules=["to_q"]), sd_folder, tmp_path / "dora")
    adapters = [BaseAdapter(str(tmp_path / "lora"), 0.5), BaseAdapter(str(tmp_path / "dora"))]
    found = [output(module_over(sd_folder, *some).family.denoiser) for some in (adapters, adapters[::-1], adapters[:1])]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_an_adapter_that_comes_twice_is_told(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    saved(LORA, sd_folder, folder)
    one, two = BaseAdapter(str(folder), 0.8), BaseAdapter(f"{folder}/../first/pytorch_lora_weights.safetensors", 0.5)
    with pytest.warns(UserWarning, match=r"are the same adapter, whose weights 0.8 and 0.5 add up; name it once"):
        BaseAdapters([one, two], StableDiffusion)


def test_weights_are_merged_before_they_are_quantized(sd_folder: Path, tmp_path: Path) -> None:
    saved(LORA, sd_folder, tmp_path / "first")
    first = BaseAdapter(str(tmp_path / "first"), 0.8)
    module = module_over(sd_folder, first, quantization=NF4(block_size=16))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = loaded(StableDiffusion, sd_folder).denoiser.get_submodule(name).weight
    merged = BaseAdapters([first], StableDiffusion).changes()["unet"][f"{name}.weight"].apply(weight)
    quantization = NF4(block_size=16)
    expected = quantization.dequantize(quantization.quantize(merged), merged.shape, torch.float32)
    layer = module.family.denoiser.get_base_model().get_submodule(name).get_base_layer()
    assert torch.equal(layer.weight, expected)
    assert (merged - weight).abs().max() > 0.1


def test_sharded_loading_merges_too(sd_folder: Path, tmp_path: Path) -> None:
    saved(LORA, sd_folder, tmp_path / "first")
    changes = BaseAdapters([BaseAdapter(str(tmp_path / "first"))], StableDiffusion).changes()
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32, without=("vae", "text", "denoiser"), changes=changes)
    family.load_adapted(SECOND, lambda part: None)
    whole = StableDiffusion(str(sd_folder))
    whole.load(torch.float32, without=("vae", "text"), changes=changes)
    assert torch.equal(output(family.denoiser), output(whole.denoiser))  # the new adapter begins with zeros
    assert (output(whole.denoiser) - output(loaded(StableDiffusion, sd_folder).denoiser)).abs().max() > 1e-3


def test_text_encoders_are_merged_too(sd_folder: Path, tmp_path: Path) -> None:
    adapter = replace(saved(LORA, sd_folder, tmp_path), text_encoders={"text_encoder": encoder_adapter()})
    format_named("kohya").write(adapter, tmp_path)
    format_named("diffusers").write(adapter, tmp_path)
    first = BaseAdapter(str(tmp_path / "kohya.safetensors"), 0.6)
    module = module_over(sd_folder, first)
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        base = pipeline.text_encoder(tokens).last_hidden_state
        pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="first")
        pipeline.set_adapters(["first"], [0.6])
        expected = pipeline.text_encoder(tokens).last_hidden_state
        found = module.family.encoders["text_encoder"](tokens).last_hidden_state
    assert (found - expected).abs().max() <= 1e-5
    assert (found - base).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"changes text_encoder, and the cached text embeddings are those of the base"):
        module.base_adapters.changes(left_out={"text"})
    dropped = BaseAdapters([replace(first, drop_text_encoders=True)], StableDiffusion)
    assert dropped.changes(left_out={"text"}).keys() == {"unet"}


def test_the_files_say_what_they_were_trained_over(sd_folder: Path, tmp_path: Path) -> None:
    saved(LORA, sd_folder, tmp_path / "first")
    first = BaseAdapter(str(tmp_path / "first"), 0.8)
    module = module_over(sd_folder, first)
    module.save_adapter(tmp_path / "second", ["kohya"])
    for file in ("", "pytorch_lora_weights.safetensors", "kohya.safetensors"):
        assert base_records(read_adapter(tmp_path / "second" / file).metadata) == [record_of(first)]
    card = (tmp_path / "second" / "README.md").read_text()
    assert "| trained over | `first` with weight 0.8 |" in card
    assert f"SHA-256 of its tensors {record_of(first)['sha256']}" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("this folder", str(tmp_path / "second"))
    code = "\n".join(line for line in code.splitlines() if "images" not in line)
    names: dict[str, Any] = {}
    exec(code, names)  # as a user would
    assert (output(module.family.denoiser) - output(names["pipeline"].unet)).abs().max() <= 1e-5
    plain = module_over(sd_folder)
    plain.save_adapter(tmp_path / "plain")
    assert "trained over" not in (tmp_path / "plain" / "README.md").read_text()
    dora = module_over(sd_folder, first, adapter=LoraConfig(r=2, use_dora=True, target_modules=["to_q"]))
    dora.save_adapter(tmp_path / "dora")
    card = (tmp_path / "dora" / "README.md").read_text()
    assert "Merge them into the base and load this adapter on the result" in card
    assert "load_lora_weights" not in card


def test_the_command_in_the_card_gives_the_base_of_the_training(sd_folder: Path, tmp_path: Path) -> None:
    saved(LORA, sd_folder, tmp_path / "first")
    module = module_over(sd_folder, BaseAdapter(str(tmp_path / "first"), 0.8))
    module.save_adapter(tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("lit-lora adapter merge"))
    arguments = command.replace("merged_base", str(tmp_path / "merged")).split()[1:]
    assert main(arguments) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    pipeline.load_lora_weights(tmp_path / "second")
    assert (output(module.family.denoiser) - output(pipeline.unet)).abs().max() <= 1e-5


def test_resuming_needs_the_same_adapters(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    saved(LORA, sd_folder, tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    batches = make_batches(4)

    def fit(
        steps: int, folder: str, *adapters: BaseAdapter, resume: Path | None = None, first: int = 0
    ) -> LoraDiffusion:
        torch.manual_seed(0)
        module = LoraDiffusion(StableDiffusion(str(sd_folder)), SECOND, base_adapters=adapters, base_dtype="float32")
        checkpoint = AdapterCheckpoint(tmp_path / folder, save_last=True)
        options = trainer_options | {"max_steps": steps, "enable_checkpointing": True, "callbacks": [checkpoint]}
        Trainer(**options).fit(module, loader_of(batches[first:] + batches[:first]), ckpt_path=resume)
        return module

    whole = fit(4, "whole", BaseAdapter(str(tmp_path / "first"), 0.8))
    fit(2, "part", BaseAdapter(str(tmp_path / "first"), 0.8))
    last = tmp_path / "part" / "last.ckpt"
    for others, message in (
        ([BaseAdapter(str(tmp_path / "first"), 0.7)], r"over first \(weight 0.8, .*names first \(weight 0.7"),
        ([], r"over first \(weight 0.8, SHA-256 \w{12}, settings \w{12}\), and base_adapters names no other adapter"),
    ):
        with pytest.raises(UserError, match=message):
            fit(4, "part", *others, resume=last, first=2)
    resumed = fit(4, "part", BaseAdapter(str(tmp_path / "moved"), 0.8), resume=last, first=2)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    path = str(tmp_path / "part" / "last.adapter")
    with pytest.warns(
        UserWarning, match=r"was trained over moved \(weight 0.8, .*this training is over no other adapter"
    ):
        LoraDiffusion(StableDiffusion(str(sd_folder)), FromFile(path=path))


def test_adapters_that_cannot_be_merged(sd_folder: Path, flux_folder: Path, tmp_path: Path) -> None:
    adapter = saved(LORA, sd_folder, tmp_path / "first", "kohya")
    first = BaseAdapter(str(tmp_path / "first"))
    with pytest.raises(UserError, match=r"kohya\.safetensors is not an adapter of Flux"):
        LoraDiffusion(
            Flux(str(flux_folder)), SECOND, base_adapters=[BaseAdapter(str(tmp_path / "first" / "kohya.safetensors"))]
        )
    with pytest.raises(UserError, match=r"nowhere.* does not exist; name a"):
        LoraDiffusion(StableDiffusion(str(sd_folder)), SECOND, base_adapters=[BaseAdapter(str(tmp_path / "nowhere"))])
    (tmp_path / "with token").mkdir()
    rows = {"<cat>": {"text_encoder": torch.zeros(1, 16)}}
    write_adapter(replace(adapter, new_tokens=rows), tmp_path / "with token")
    with pytest.raises(UserError, match=r"has new tokens \(<cat>\), which cannot be merged into a base"):
        module_over(sd_folder, BaseAdapter(str(tmp_path / "with token")))
    module_over(sd_folder, BaseAdapter(str(tmp_path / "with token"), drop_text_encoders=True))
    with pytest.raises(UserError, match="an entry has no path"):
        BaseAdapter("")
    with pytest.raises(UserError, match=r"weight=0 of x is no factor; give a number such as 0\.8"):
        BaseAdapter("x", 0)

    def wrong(state: dict[str, Tensor], **config: Any) -> None:
        write_adapter(replace(adapter, state=state, config={**adapter.config, **config}), tmp_path / "first")

    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"base_model.model.{name}.lora_A.weight"
    wrong({**adapter.state, key: torch.ones(3, 5)})
    message = rf"{name} is \(16, 16\), and the adapter has lora_A\.weight \(3, 5\), lora_B\.weight \(16, 3\)"
    with pytest.raises(UserError, match=message):
        module_over(sd_folder, first)
    wrong({key.replace("down_blocks.0", "down_blocks.7"): value for key, value in adapter.state.items()})
    with pytest.raises(
        UserError, match=r"changes \d+ of 24 weights that UNet2DConditionModel does not have, the first is d"
    ):
        module_over(sd_folder, first)
    wrong({**adapter.state, "base_model.model.conv_in.bias": torch.ones(16)})
    with pytest.raises(
        UserError, match=r"holds base_model\.model\.conv_in\.bias, which is more than updates of layers"
    ):
        module_over(sd_folder, first)
    bias = key.replace("lora_A.weight", "lora_B.bias")
    wrong({**adapter.state, bias: torch.ones(16)}, lora_bias=True)
    with pytest.raises(UserError, match=r"to_q\.lora_B\.bias, which is more than updates of layers"):
        module_over(sd_folder, first)
    saved(OFTConfig(r=0, oft_block_size=8, target_modules=["to_q"]), sd_folder, tmp_path / "oft")
    with pytest.raises(UserError, match=r"of the method OFT, .*adapter merge --into, and train on the result"):
        module_over(sd_folder, BaseAdapter(str(tmp_path / "oft")))


def test_sampling_applies_them_again(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(LORA, sd_folder, tmp_path / "first")
    module = module_over(sd_folder, BaseAdapter(str(tmp_path / "first"), 0.8))
    module.save_adapter(tmp_path / "second")
    (image,) = module.generate(["a star"], [0], num_inference_steps=2, height=16, width=16)
    drawn = ["sample", "--adapter", str(tmp_path / "second"), "--prompts", "a star", "--steps", "2"]
    drawn += ["--height", "16", "--width", "16", "--device", "cpu", "--out", str(tmp_path / "out")]

    def difference() -> int:
        from PIL import Image, ImageChops

        with Image.open(tmp_path / "out" / "0000.png") as found:
            return max(high for _, high in ImageChops.difference(found.convert("RGB"), image).getextrema())  # type: ignore[misc]

    assert main(drawn) == 0
    assert difference() <= 1
    (tmp_path / "first").rename(tmp_path / "moved")
    assert main(drawn) == 2
    assert "was trained over first (weight 0.8, SHA-256" in (told := capsys.readouterr().err)
    assert "give its path with --base_adapters" in told
    assert main([*drawn, "--base_adapters", json.dumps([str(tmp_path / "moved")])]) == 0
    assert difference() <= 1
    saved(SECOND, sd_folder, tmp_path / "other")
    assert main([*drawn, "--base_adapters", json.dumps([str(tmp_path / "other")])]) == 2
    assert "other is other (weight 0.8" in capsys.readouterr().err
    assert main([*drawn, "--base_adapters", '["a", "b"]']) == 2
    assert "give one path for each adapter, not 2" in capsys.readouterr().err


def test_the_hash_is_of_all_parts(sd_folder: Path, tmp_path: Path) -> None:
    adapter = saved(LORA, sd_folder, tmp_path)
    alone = record_of(BaseAdapter(str(tmp_path)))["sha256"]
    found = []
    for factor in (1, 2):
        part = encoder_adapter()
        part = replace(part, state={key: factor * value for key, value in part.state.items()})
        write_adapter(replace(adapter, text_encoders={"text_encoder": part}), tmp_path)
        found.append(record_of(BaseAdapter(str(tmp_path)))["sha256"])
    assert len({alone, *found}) == 3
    assert record_of(BaseAdapter(str(tmp_path), drop_text_encoders=True))["sha256"] == alone


@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors", "kohya.safetensors"])
def test_another_alpha_is_another_base(file: str, sd_folder: Path, tmp_path: Path) -> None:
    records = []
    for alpha in (3, 3, 6):
        adapter = saved(LORA, sd_folder, tmp_path / "first", "kohya")
        write_adapter(replace(adapter, config={**adapter.config, "lora_alpha": alpha}), tmp_path / "first", ["kohya"])
        records.append(record_of(BaseAdapter(str(tmp_path / "first" / file))))
    assert records[0] == records[1]
    assert same_adapters(records[:1], records[1:2])
    assert not same_adapters(records[:1], records[2:])
    assert told(records[:1]) != told(records[2:])
    before = {name: value for name, value in records[0].items() if name != "settings"}  # as older files have it
    assert same_adapters([before], records[:1])


@pytest.mark.filterwarnings("ignore:base_adapters. .*are the same adapter:UserWarning")
def test_adapters_for_other_bases(sd_folder: Path, tmp_path: Path) -> None:
    adapter = saved(LORA, sd_folder, tmp_path / "first")
    first = BaseAdapter(str(tmp_path / "first"), 0.8)
    (tmp_path / "second").mkdir()
    write_adapter(replace(adapter, metadata=base_metadata([record_of(first)])), tmp_path / "second")
    second = BaseAdapter(str(tmp_path / "second"))
    with pytest.warns(UserWarning, match=r"second was trained over first \(weight 0.8, .*; name these, too"):
        BaseAdapters([second], StableDiffusion)
    BaseAdapters([second, first], StableDiffusion)
    write_adapter(replace(adapter, metadata={"lit_lora.quantized_base": "NF4(block_size=16)"}), tmp_path / "second")
    with pytest.raises(UserError, match="made for the base quantized by NF4"):
        BaseAdapters([second], StableDiffusion)
    encoders = AdapterFiles({}, {}, family=StableDiffusion, text_encoders={"text_encoder": encoder_adapter()})
    (tmp_path / "encoders").mkdir()
    write_adapter(encoders, tmp_path / "encoders")
    with pytest.raises(UserError, match="drop_text_encoders leaves nothing of it"):
        BaseAdapters([BaseAdapter(str(tmp_path / "encoders"), drop_text_encoders=True)], StableDiffusion)


def test_going_on_with_an_adapter_for_a_quantized_base(
    sd_folder: Path, tmp_path: Path, trainer_options: dict[str, Any]
) -> None:
    adapter = saved(LORA, sd_folder, tmp_path / "first")
    quantization = NF4(block_size=16)
    told = quantized_metadata(quantization)
    write_adapter(replace(adapter, metadata=told), tmp_path / "first")
    on = FromFile(path=str(tmp_path / "first"))
    family = StableDiffusion(str(sd_folder))
    with pytest.warns(UserWarning, match=r"quantized by NF4\(.*block_size=16.*\), and this training has Dense\("):
        other = LoraDiffusion(family, on)
    same = LoraDiffusion(family, on, quantization=quantization)
    for module, entry in ((same, told), (other, {})):
        module.trainer = Trainer(**trainer_options)
        assert {key: value for key, value in training_facts(module).items() if key in told} == entry
    for callback in (LoftqInitialization(), EvaInitialization(), LoraGaInitialization()):
        with pytest.raises(
            UserError, match=r"Initialization sets the first values of an adapter, and would replace those of .*first"
        ):
            callback._check_run(Trainer(**trainer_options), same)


def test_records_that_are_damaged() -> None:
    assert base_metadata([]) == {}
    assert recorded_adapters([], "x") == []
    for text in ("{", "[1]", '[{"name": "a"}]', '[{"name": "a", "path": "b", "sha256": "c", "weight": "d"}]'):
        with pytest.raises(UserError, match="is damaged"):
            base_records({"lit_lora.base_adapters": text})
