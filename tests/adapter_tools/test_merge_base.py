"""A merged base computes what base and adapter compute, and its other files stay."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, UNet2DConditionModel
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lit_lora.adapter_tools import merge_base as merging
from lit_lora.adapter_tools.base_model import BaseModel, find_weights
from lit_lora.adapter_tools.merge_base import merge_base
from lit_lora.adapter_tools.plain_lora import lora_layers
from lit_lora.adapters import adapter_state, inject, load_adapter, plain_config
from lit_lora.errors import UserError
from lit_lora.families import Flux, StableDiffusion
from lit_lora.formats import AdapterFiles
from lit_lora.formats.base_records import base_metadata
from lit_lora.formats.text_encoders import for_encoder
from tests.adapter_tools.layers import adapter as adapter_of_layers
from tests.adapter_tools.layers import base, config
from tests.formats.adapters import encoder_adapter
from tests.helpers import tiny_unet

UNET_LAYERS = ["to_q", "to_v", "conv1", "proj_in", "conv_in"]
FLUX_LAYERS = ["attn.to_q", "ff.net.2", "proj_mlp", "proj_out"]
CONFIGS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(r=3, lora_alpha=5, target_modules=UNET_LAYERS, rank_pattern={"conv1": 2}),
    "rsLoRA": LoraConfig(r=4, lora_alpha=5, target_modules=UNET_LAYERS, use_rslora=True),
    "DoRA": LoraConfig(r=2, lora_alpha=5, target_modules=UNET_LAYERS, use_dora=True),
    "LoHa": LoHaConfig(r=2, alpha=3, target_modules=UNET_LAYERS),
    "modules_to_save": LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]),
}


def random_adapter(model: nn.Module, config: PeftConfig, **options: Any) -> AdapterFiles:
    """An adapter of the model with random values; the model is changed."""
    adapted = inject(model, config, ())
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    return AdapterFiles(adapter_state(adapted), plain_config(config), **options)


def predict(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([7]), torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        return unet(*inputs).sample


def predict_flux(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 32, generator=generator),
            pooled_projections=torch.randn(1, 16, generator=generator),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([1.0]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_the_unet_of_a_pipeline(name: str, sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    adapter = random_adapter(unet, CONFIGS[name])
    merged = merge_base(adapter, "adapter", BaseModel(str(sd_folder)), tmp_path)
    expected = predict(unet)
    plain = predict(UNet2DConditionModel.from_pretrained(sd_folder / "unet"))
    assert (expected - plain).abs().max() > 1e-2
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(pipeline.unet), expected, rtol=0, atol=1e-5)
    assert merged.files == 1
    assert merged.layers["denoiser"] >= len({key.split(".lora_")[0] for key in adapter.state if ".lora_" in key})
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (sd_folder / part).iterdir():
            assert (tmp_path / part / file.name).read_bytes() == file.read_bytes()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_of_lora_in_a_layer_without_one_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    adapter = random_adapter(unet, LoraConfig(r=2, target_modules=["to_q"], lora_bias=True))
    with pytest.raises(UserError, match=r"PEFT cannot merge adapter \(LORA\): .*the base layer has no bias"):
        merge_base(adapter, "adapter", BaseModel(str(sd_folder)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_keep_their_tensors_and_dtype(dtype: torch.dtype, flux_folder: Path, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(flux_folder / "transformer").to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    adapter = random_adapter(model.float(), LoraConfig(r=3, lora_alpha=6, target_modules=FLUX_LAYERS))
    merged = merge_base(adapter, "adapter", BaseModel(str(base)), out)
    assert merged.files == len(list(base.glob("*.safetensors"))) > 3
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()}
    changed = {key.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for key in adapter.state}
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(out / file.name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert after[key].dtype == dtype
            assert torch.equal(value, after[key]) == (key not in changed)
    if dtype == torch.float32:
        found = FluxTransformer2DModel.from_pretrained(out)
        torch.testing.assert_close(predict_flux(found), predict_flux(model), rtol=0, atol=1e-5)


def test_only_the_index_of_the_written_files_is_copied(sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    unet.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    adapter = random_adapter(UNet2DConditionModel.from_pretrained(sd_folder / "unet"), CONFIGS["LoRA"])
    unet.half().save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="100KB")
    for variant in (None, "fp16"):
        out = tmp_path / f"out-{variant}"
        out.mkdir()
        merge_base(adapter, "adapter", BaseModel(str(tmp_path / "base"), variant=variant), out)
        infix = f".{variant}" if variant else ""
        assert [file.name for file in out.glob("*.index*")] == [
            f"diffusion_pytorch_model.safetensors.index{infix}.json"
        ]


def test_an_index_that_lists_one_file(sd_folder: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(sd_folder / "unet", base)
    out.mkdir()
    name = "diffusion_pytorch_model-00001-of-00001.safetensors"
    file = (base / "diffusion_pytorch_model.safetensors").rename(base / name)
    listed = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), name)}
    (base / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listed))
    unet = UNet2DConditionModel.from_pretrained(base)
    adapter = random_adapter(unet, CONFIGS["LoRA"])
    merge_base(adapter, "adapter", BaseModel(str(base)), out)
    found = UNet2DConditionModel.from_pretrained(out)
    torch.testing.assert_close(predict(found), predict(unet), rtol=0, atol=1e-5)


def test_what_rounding_leaves_of_the_change(sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet").bfloat16()
    unet.save_pretrained(tmp_path / "base")
    adapter = random_adapter(unet.float(), CONFIGS["LoRA"])
    small = {key: value * 0.02 if "lora_B" in key else value for key, value in adapter.state.items()}
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    assert merge_base(adapter, "adapter", BaseModel(str(tmp_path / "base")), tmp_path / "large").rounding.share < 0.1
    with pytest.warns(UserWarning, match=r"adds an error of (\d+)% to the adapter's change") as told:
        merged = merge_base(
            replace(adapter, state=small), "adapter", BaseModel(str(tmp_path / "base")), tmp_path / "small"
        )
    before, after = (load_file(find_weights(tmp_path / name)[0]) for name in ("base", "small"))
    errors = changes = 0.0
    for name, one in lora_layers(replace(adapter, state=small), "adapter")["denoiser"].items():
        delta = one.delta()
        errors += float((after[f"{name}.weight"].float() - before[f"{name}.weight"].float() - delta).square().sum())
        changes += float(delta.square().sum())
    assert merged.rounding.share == pytest.approx((errors / changes) ** 0.5, rel=1e-3)
    assert f"{merged.rounding.share:.0%}" in str(told[0].message)


def test_rounding_is_counted_and_added_once_where_peft_merges(sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet").bfloat16()
    unet.save_pretrained(tmp_path / "base")
    adapter = random_adapter(unet.float(), CONFIGS["LoHa"])
    small = {key: value * 0.02 if "hada_w1_b" in key else value for key, value in adapter.state.items()}
    adapter = replace(adapter, state=small)
    (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match=r"adds an error of (\d+)% to the adapter's change"):
        merged = merge_base(adapter, "adapter", BaseModel(str(tmp_path / "base")), tmp_path / "out")
    before, after = (load_file(find_weights(tmp_path / name)[0]) for name in ("base", "out"))
    errors = changes = 0.0
    for path, layer in unet.named_modules():
        if hasattr(layer, "hada_w1_a"):
            name, old = f"{path.removeprefix('base_model.model.')}.weight", layer.get_base_layer().weight.float()
            delta = layer.get_delta_weight("default").detach() * 0.02
            torch.testing.assert_close(after[name].float(), old + delta, rtol=2**-8, atol=1e-6)
            errors += float((after[name].float() - before[name].float() - delta).square().sum())
            changes += float(delta.square().sum())
    assert merged.rounding.share == pytest.approx((errors / changes) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("config", [CONFIGS["modules_to_save"], LoraConfig(r=2, target_modules=["to_q"], bias="all")])
def test_rounding_of_weights_that_the_adapter_replaces(config: PeftConfig, tmp_path: Path) -> None:
    unet = tiny_unet().bfloat16()
    unet.save_pretrained(tmp_path / "base")
    before = {name: value.float().clone() for name, value in unet.state_dict().items()}
    files = random_adapter(unet.float(), copy.deepcopy(config))
    # Of the adapter, only what it replaces changes something.
    small = {key: value * ("lora_B" not in key) for key, value in files.state.items()}
    for key, value in small.items():
        if (name := key.removeprefix("base_model.model.").replace(".base_layer.", ".")) in before:
            small[key] = before[name] + (value - before[name]) * 0.002
    (tmp_path / "out").mkdir()
    base = BaseModel(str(tmp_path / "base"))
    with pytest.warns(UserWarning, match=r"adds an error of (\d+)% to the adapter's change"):
        merged = merge_base(replace(files, state=small), "adapter", base, tmp_path / "out")
    after = load_file(find_weights(tmp_path / "out")[0])
    wanted = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): one for key, one in small.items()}
    names = wanted.keys() & before.keys()
    errors = sum(float((after[name].float() - wanted[name]).square().sum()) for name in names)
    changes = sum(float((wanted[name] - before[name]).square().sum()) for name in names)
    assert merged.rounding.share == pytest.approx((errors / changes) ** 0.5, rel=1e-3)

    tiny_unet().half().save_pretrained(tmp_path / "half")
    large = {key: value if "lora" in key else value + 1e5 for key, value in small.items()}
    with pytest.raises(UserError, match=r"conv_\w+\.\w+ would reach 1\d+.*, and float16 holds at most 65504"):
        merge_base(replace(files, state=large), "adapter", BaseModel(str(tmp_path / "half")), tmp_path / "out")


@pytest.mark.parametrize("denoiser_only", [False, True])
def test_the_scheduler_of_the_training(denoiser_only: bool, sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "_class_name": "DDIMScheduler"}
    adapter = random_adapter(unet, CONFIGS["LoRA"], metadata={"lit_lora.scheduler": json.dumps(changes)})
    base = BaseModel(str(sd_folder))
    if denoiser_only:
        with pytest.warns(UserWarning, match="needs a scheduler with .*v_prediction.*, and no scheduler is written"):
            merge_base(adapter, "adapter", base, tmp_path, denoiser_only)
        return
    merge_base(adapter, "adapter", base, tmp_path)
    scheduler: Any = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.rescale_betas_zero_snr
    before = json.loads((sd_folder / "scheduler" / "scheduler_config.json").read_text())
    after = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert after == before | changes


def test_a_base_in_half_precision_that_would_overflow(sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    unet.half().save_pretrained(tmp_path / "base")
    adapter = random_adapter(unet.float(), CONFIGS["LoRA"])
    key = "base_model.model.conv_in.lora_B.weight"
    state = {**adapter.state, key: 1e7 * adapter.state[key]}
    (tmp_path / "out").mkdir()
    message = r"conv_in.weight in diffusion_pytorch_model.safetensors would reach \S+, and float16 holds at most 65504"
    with pytest.raises(UserError, match=message):
        merge_base(replace(adapter, state=state), "adapter", BaseModel(str(tmp_path / "base")), tmp_path / "out")


def test_a_loaded_model_keeps_its_widest_dtype(sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet").half()
    adapter = random_adapter(UNet2DConditionModel.from_pretrained(sd_folder / "unet"), CONFIGS["LoHa"])
    unet.time_embedding.float()
    unet.save_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    merge_base(adapter, "adapter", BaseModel(str(tmp_path / "base")), tmp_path / "out")
    before, after = (load_file(find_weights(tmp_path / name)[0]) for name in ("base", "out"))
    name = "time_embedding.linear_1.weight"
    assert torch.equal(before[name], after[name])


def test_other_bases_of_the_training(sd_folder: Path, tmp_path: Path) -> None:
    unet, base = UNet2DConditionModel.from_pretrained(sd_folder / "unet"), BaseModel(str(sd_folder))
    adapter = random_adapter(unet, CONFIGS["LoRA"], metadata={"lit_lora.quantized_base": "NF4(block_size=64)"})
    with pytest.raises(UserError, match=r"made for the base quantized by NF4\(block_size=64\).* would come twice"):
        merge_base(adapter, "adapter", base, tmp_path)
    over = base_metadata([{"name": "first", "path": "x/first", "sha256": "0" * 64, "weight": 0.8}])
    on_this = {**adapter.config, "base_model_name_or_path": str(sd_folder / ".." / sd_folder.name)}
    with pytest.raises(UserError, match=r"lacks: .* merge x/first merged_base --weights 0.8 --into"):
        merge_base(replace(adapter, metadata=over, config=on_this), "adapter", base, tmp_path)
    assert not [*tmp_path.iterdir()]
    with pytest.warns(UserWarning, match="the result is right only if these are merged into .* already"):
        merge_base(replace(adapter, metadata=over), "adapter", base, tmp_path)


def test_text_encoders(sd_folder: Path, tmp_path: Path) -> None:
    adapter = AdapterFiles({}, {}, text_encoders={"text_encoder": encoder_adapter()})
    merge_base(adapter, "adapter", BaseModel(str(sd_folder)), tmp_path)
    encoder = DiffusionPipeline.from_pretrained(sd_folder).text_encoder
    part = for_encoder(adapter.text_encoders["text_encoder"], encoder)
    ids = torch.tensor([[3, 4, 5]])
    found = DiffusionPipeline.from_pretrained(tmp_path).text_encoder(ids)[0]
    plain = encoder(ids)[0]
    load_adapter(encoder, part.config, part.state, "adapter")
    torch.testing.assert_close(found, encoder(ids)[0], rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / unet).read_bytes() == (sd_folder / unet).read_bytes()


def test_the_denoiser_alone(sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    adapter = random_adapter(unet, CONFIGS["LoRA"])
    merge_base(adapter, "adapter", BaseModel(str(sd_folder)), tmp_path, denoiser_only=True)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    found = UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(found), predict(unet), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="also changes text_encoder; write the whole pipeline"):
        both = replace(adapter, text_encoders={"text_encoder": encoder_adapter()})
        merge_base(both, "adapter", BaseModel(str(sd_folder)), tmp_path, denoiser_only=True)


def test_a_variant(sd_folder: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    unet.half().save_pretrained(base, variant="fp16")
    adapter = random_adapter(unet.float(), CONFIGS["LoRA"])
    merge_base(adapter, "adapter", BaseModel(str(base)), out)
    assert {value.dtype for value in load_file(out / "diffusion_pytorch_model.fp16.safetensors").values()} == {
        torch.float16
    }
    with pytest.raises(UserError, match=r"has no weights as safetensors of the variant bf16; it holds "):
        merge_base(adapter, "adapter", BaseModel(str(base), variant="bf16"), out)


class TestRefused:
    @pytest.fixture
    def adapter(self, sd_folder: Path) -> AdapterFiles:
        unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
        return random_adapter(unet, CONFIGS["LoRA"], family=StableDiffusion)

    @staticmethod
    def refuse(message: str, adapter: AdapterFiles, base: Path, out: Path) -> None:
        with pytest.raises(UserError, match=message):
            merge_base(adapter, "adapter", BaseModel(str(base)), out)

    def test_another_family(self, adapter: AdapterFiles, flux_folder: Path, tmp_path: Path) -> None:
        self.refuse(r"an adapter of StableDiffusion, and .* is a Flux \(FluxPipeline\)", adapter, flux_folder, tmp_path)

    def test_layers_that_the_base_has_not(self, adapter: AdapterFiles, flux_folder: Path, tmp_path: Path) -> None:
        self.refuse(
            r"adapts \d+ of \d+ layers that .* does not have, the first is conv_in; name the base",
            replace(adapter, family=Flux),
            flux_folder,
            tmp_path,
        )

    def test_other_shapes(self, adapter: AdapterFiles, sd_folder: Path, tmp_path: Path) -> None:
        key = next(key for key in adapter.state if key.endswith("conv_in.lora_A.weight"))
        state = {**adapter.state, key: torch.randn(3, 9, 3, 3)}
        changed = replace(adapter, state=state)
        self.refuse(
            r"conv_in has a weight of the shape \(16, 4, 3, 3\) in .*changes \(16, 9, 3, 3\)",
            changed,
            sd_folder,
            tmp_path,
        )

    def test_half_a_base(self, adapter: AdapterFiles, sd_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(sd_folder, tmp_path / "base")
        file = find_weights(tmp_path / "base" / "unet")[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        self.refuse(f"cannot read {file}: .*copy or download it again", adapter, tmp_path / "base", tmp_path / "out")

    def test_a_missing_shard(self, tmp_path: Path, adapter: AdapterFiles, sd_folder: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
        unet.save_pretrained(tmp_path / "base", max_shard_size="200KB")
        gone = sorted((tmp_path / "base").glob("*.safetensors"))[1]
        gone.unlink()
        self.refuse(f"lists {gone.name}, which is missing", adapter, tmp_path / "base", tmp_path / "out")

    def test_neither_pipeline_nor_model(self, tmp_path: Path, adapter: AdapterFiles) -> None:
        self.refuse("is neither a pipeline nor a model: it has no model_index.json", adapter, tmp_path, tmp_path)
        (tmp_path / "config.json").write_text("{}")
        encoders = {"text_encoder": encoder_adapter()}
        changed = replace(adapter, text_encoders=encoders)
        self.refuse(
            "is a single model, and the adapter also changes text_encoder",
            changed,
            tmp_path,
            tmp_path,
        )

    def test_a_missing_part(self, sd_folder: Path, tmp_path: Path) -> None:
        adapter = AdapterFiles({}, {}, text_encoders={"text_encoder_2": encoder_adapter()})
        self.refuse("has no text_encoder_2, which the adapter changes; it has", adapter, sd_folder, tmp_path)

    def test_quantized_weights(self, adapter: AdapterFiles, sd_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(sd_folder / "unet", tmp_path / "base")
        file = find_weights(tmp_path / "base")[0]
        tensors = load_file(file)
        tensors["conv_in.weight"] = tensors["conv_in.weight"].char()
        save_file(tensors, file)
        self.refuse(
            "conv_in.weight in .* is I8, not a float: a quantized model", adapter, tmp_path / "base", tmp_path / "out"
        )

    def test_a_method_without_merging_in_little_memory(
        self, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
        adapter = random_adapter(unet, IA3Config(target_modules=["to_q"], feedforward_modules=[]))
        monkeypatch.setattr(merging, "available_memory", lambda: 1000)
        self.refuse(
            r"because it is IA3, .*takes up to \d+.* of memory, and 1.0 kB are free", adapter, sd_folder, tmp_path
        )
        encoders = {"text_encoder": replace(encoder_adapter(), config={"peft_type": "LOHA"})}
        monkeypatch.undo()
        changed = AdapterFiles({}, {}, text_encoders=encoders)
        self.refuse(
            "changes text_encoder, and it is LOHA.*; only LoRA and DoRA are merged into text encoders",
            changed,
            sd_folder,
            tmp_path,
        )


def test_a_grouped_convolution(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"_class_name": "Layers"}))
    with pytest.raises(UserError, match="LoRA of a grouped convolution reaches all inputs"):
        merge_base(adapter_of_layers(config()), "adapter", BaseModel(str(tmp_path / "base")), tmp_path / "out")
