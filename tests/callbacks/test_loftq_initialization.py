from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, PeftModel

from lit_lora import BaseAdapter
from lit_lora.adapters.ranked_layer import RankedLayer, ranked_layers
from lit_lora.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    EvaInitialization,
    LoftqInitialization,
    LoraInjection,
    RankBudget,
)
from lit_lora.distributed import LitLoraDeepSpeed
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.formats.base_adapters import BaseAdapters
from lit_lora.formats.find import read_adapter
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import FP8, NF4, Int8, Quantization
from tests.helpers import Classifier, loader_of, make_batches, processes, save_adapter

STEPS = 4


class AtTheStart(Callback):
    """The layers before the first step."""

    layers: list[RankedLayer]
    products: dict[str, torch.Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.layers = ranked_layers(pl_module)
        self.products = {one.name: one.scaling * (one.b.flatten(1) @ one.a.flatten(1)).detach() for one in self.layers}


def diffusion(base: Path, quantization: Quantization | None, **options: Any) -> LoraDiffusion:
    torch.manual_seed(0)
    config = options.pop("adapter", None) or LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"])
    module = LoraDiffusion(
        StableDiffusion(str(base)), config, quantization=quantization, base_dtype="float32", **options
    )
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    return module


def fit(
    module: Any, options: dict[str, Any], folder: Path, *callbacks: Callback, at: int = 0, resume: Path | None = None
) -> None:
    checkpoints = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = options | {"max_steps": STEPS, "enable_checkpointing": True, "callbacks": [*callbacks, checkpoints]}
    made = make_batches(STEPS)
    Trainer(**options).fit(module, loader_of(made[at:] + made[:at]), ckpt_path=resume)


def quantized_pipeline(base: Path, quantization: Quantization, skipped: tuple[str, ...]) -> Any:
    """A pipeline of diffusers whose UNet has the restored weights of a quantized one."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        for name, layer in pipeline.unet.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and quantization.takes(name, skipped):
                stored = quantization.quantize(layer.weight)
                layer.weight.copy_(quantization.dequantize(stored, layer.weight.shape, torch.float32))
    return pipeline


@pytest.mark.parametrize("quantization", [NF4(block_size=16), Int8(), FP8()])
def test_the_first_values_are_the_largest_part_of_the_quantization_error(
    quantization: Quantization, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    start = AtTheStart()
    fit(diffusion(sd_folder, quantization), trainer_options, tmp_path, LoftqInitialization(), start)
    plain = StableDiffusionPipeline.from_pretrained(sd_folder).unet
    assert len(start.layers) > 10
    for layer in start.layers:
        weight = plain.get_submodule(layer.name).weight.detach()
        restored: Any = layer.layer.get_base_layer()
        error = (weight - restored.weight).flatten(1)
        remaining = (error - start.products[layer.name]).norm()
        best = torch.linalg.svdvals(error)[layer.rank :].norm()
        assert best <= remaining * 1.0001, layer.name
        assert remaining <= best * 1.05, layer.name
        assert remaining < error.norm() * 0.98, layer.name


def test_the_files_are_lora_for_the_quantized_base(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    quantization = NF4(block_size=16)
    module = diffusion(sd_folder, quantization)
    fit(module, trainer_options, tmp_path, LoftqInitialization(), AdapterEMA(0.9))
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 77, 16))
    folder = tmp_path / f"step={STEPS}.adapter"

    def pipeline() -> Any:
        return quantized_pipeline(sd_folder, quantization, module.family.always_dense)

    with torch.no_grad():
        here = module.family.denoiser(*inputs).sample
        plain = pipeline()
        without = plain.unet(*inputs).sample
        plain.load_lora_weights(folder)
        assert (here - plain.unet(*inputs).sample).abs().max() <= 1e-5
        assert (here - PeftModel.from_pretrained(pipeline().unet, folder)(*inputs).sample).abs().max() <= 1e-5
    assert (here - without).abs().max() > 1e-3
    told = "NF4(block_size=16, double_quant=True, skip=())"
    assert read_adapter(folder).metadata["lit_lora.quantized_base"] == told
    assert f"| made for the quantized base | {told} |" in (folder / "README.md").read_text()


def test_files_for_the_original_base_leave_the_first_values_out(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """They are closer to the training model on the original base, by the part of the error that the first values hold."""
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 77, 16))
    config = LoraConfig(r=12, lora_alpha=6, target_modules=r".*\.(to_\w|to_out\.0|conv\d|linear|net\.2|proj|proj_\w+)")
    distances = {}
    for kind in ("quantized", "original"):
        module, start = diffusion(sd_folder, NF4(block_size=16), adapter=config), AtTheStart()
        fit(module, trainer_options, tmp_path / kind, LoftqInitialization(files_for=kind), start)  # type: ignore[arg-type]
        folder = tmp_path / kind / f"step={STEPS}.adapter"
        with torch.no_grad():
            here = module.family.denoiser(*inputs).sample
            pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
            pipeline.load_lora_weights(folder)
            distances[kind] = float((here - pipeline.unet(*inputs).sample).norm())
        assert ("lit_lora.quantized_base" in read_adapter(folder).metadata) == (kind == "quantized")
        layer = start.layers[0]
        delta = _delta(pipeline.unet.get_submodule(layer.name))
        learned = layer.scaling * (layer.b.flatten(1) @ layer.a.flatten(1)).detach() - start.products[layer.name]
        if kind == "original":
            torch.testing.assert_close(delta, learned, rtol=1e-4, atol=1e-6)
    assert distances["original"] < 0.8 * distances["quantized"]


def _delta(layer: Any) -> torch.Tensor:
    """The update of a layer of diffusers with an adapter."""
    (name,) = layer.lora_A
    delta: torch.Tensor = layer.get_delta_weight(name).detach()
    return delta.flatten(1)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_is_exact(more: bool, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        pruning = [RankBudget(mean_rank=2, start=0.3, stop=0.8, prunings=1)] if more else []
        return [LoftqInitialization("original" if more else "quantized"), AdapterEMA(0.9), *pruning]

    whole, resumed = diffusion(sd_folder, Int8()), diffusion(sd_folder, Int8())
    fit(whole, trainer_options, tmp_path / "one", *callbacks())
    last = tmp_path / "one" / "step=1.ckpt"
    fit(resumed, trainer_options, tmp_path / "two", *callbacks(), at=1, resume=last)
    for folder in ("adapter", "ema.adapter"):
        one, two = (tmp_path / run / f"step={STEPS}.{folder}" / "adapter_model.safetensors" for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_with_adapters_merged_into_the_base(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    """The weights before quantization are the merged ones."""
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    family.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    save_adapter(family, tmp_path)
    first, start = BaseAdapter(str(tmp_path)), AtTheStart()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"])
    module = diffusion(sd_folder, NF4(block_size=16), adapter=config, base_adapters=[first])
    fit(module, trainer_options, tmp_path / "run", LoftqInitialization(), start)
    changes = BaseAdapters([first], StableDiffusion).changes()["unet"]
    plain = StableDiffusionPipeline.from_pretrained(sd_folder).unet
    for layer in start.layers:
        restored: Any = layer.layer.get_base_layer()
        merged = changes[f"{layer.name}.weight"].apply(plain.get_submodule(layer.name).weight.detach())
        error = merged - restored.weight
        assert (error - start.products[layer.name]).norm() < 0.98 * error.norm()


@pytest.mark.slow
def test_two_processes_have_the_same_adapter(sd_folder: Path, session_shards: Path, tmp_path: Path) -> None:
    processes(["-m", "tests.callbacks.loftq_script", tmp_path, sd_folder, session_shards], 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for strategy, values in first.items():
        assert all(torch.equal(value, second[strategy][name]) for name, value in values.items())
    ddp, fsdp = first["ddp"], first["lit_lora_fsdp"]
    assert ddp.keys() == fsdp.keys()
    assert all(torch.allclose(value, fsdp[name], rtol=1e-3, atol=1e-5) for name, value in ddp.items())
    assert all(value.any() for value in ddp.values())  # before the first step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": None}, "no LoRA layer has one; set model.quantization"),
        (
            {"quantization": Int8(), "adapter": LoraConfig(r=2, use_dora=True, target_modules=["to_q"])},
            "leave use_dora out",
        ),
    ],
)
def test_modules_that_cannot_be_initialized(
    options: dict[str, Any], message: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit(diffusion(sd_folder, **options), trainer_options, tmp_path, LoftqInitialization())


def test_runs_that_cannot_be_initialized(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="EvaInitialization both set the first values"):
        fit(diffusion(sd_folder, Int8()), trainer_options, tmp_path, LoftqInitialization(), EvaInitialization())
    injection = LoraInjection(LoraConfig(r=2, target_modules=["0"]), quantization=Int8())
    with pytest.raises(UserError, match="the base's files again, which Classifier does not name; use LoraDiffusion"):
        fit(Classifier(), trainer_options, tmp_path, injection, LoftqInitialization())
    fit(diffusion(sd_folder, Int8()), trainer_options, tmp_path)
    with pytest.raises(UserError, match=r"step=1\.ckpt was saved without LoftqInitialization"):
        resume = tmp_path / "step=1.ckpt"
        fit(diffusion(sd_folder, Int8()), trainer_options, tmp_path, LoftqInitialization(), resume=resume)
    fit(diffusion(sd_folder, Int8()), trainer_options, tmp_path / "two", LoftqInitialization())
    other, resume = LoftqInitialization(files_for="original"), tmp_path / "two" / "step=1.ckpt"
    with pytest.raises(UserError, match="files_for='original' of LoftqInitialization is 'quantized' in the checkpoint"):
        fit(diffusion(sd_folder, Int8()), trainer_options, tmp_path / "two", other, resume=resume)
    with pytest.raises(
        UserError, match=r"the quantization Int8\(skip=\(\)\) of the checkpoint, and this run has NF4\(block"
    ):
        fit(diffusion(sd_folder, NF4()), trainer_options, tmp_path / "two", LoftqInitialization(), resume=resume)
    trainer = Trainer(**trainer_options | {"strategy": LitLoraDeepSpeed()})
    with pytest.raises(UserError, match="after DeepSpeed has copied them"):
        LoftqInitialization().setup(trainer, diffusion(sd_folder, Int8()), "fit")
