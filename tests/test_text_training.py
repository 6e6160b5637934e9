"""Adapters in the text encoders: trained with the denoiser's, saved in the same files, and continued from them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftConfig
from PIL import Image
from torch import Tensor

from lit_lora import (
    AdapterCheckpoint,
    AdapterEMA,
    FromFile,
    LoraDiffusion,
    MemoryOptions,
    ParameterGroup,
    RankBudget,
    RunReport,
    UserError,
)
from lit_lora.adapters.ranked_layer import layer_ranks
from lit_lora.cli import main
from lit_lora.distributed import LitLoraFSDP
from lit_lora.families import ModelFamily, StableDiffusion
from lit_lora.formats.find import read_adapter
from lit_lora.planning.changes import _steps_in_backward
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run, Sampling
from lit_lora.profiling.rank_chart import rank_chart
from lit_lora.run_checks import check_run
from tests.formats.adapters import FAMILIES
from tests.helpers import loader_of, make_batches

ENCODERS = {
    "sd_folder": ("text_encoder",),
    "sdxl_folder": ("text_encoder", "text_encoder_2"),
    "sd3_folder": ("text_encoder", "text_encoder_2"),
    "flux_folder": ("text_encoder",),
}
DENOISER = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
TEXT = LoraConfig(r=4, lora_alpha=6)
NEAR = 1e-5


@pytest.fixture(scope="session")
def sd_folder(shallow_sd_folder: Path) -> Path:
    """Only text encoders and new tokens matter here, and each layer of the UNet takes time."""
    return shallow_sd_folder


def module_of(folder: Path, family: type[ModelFamily] = StableDiffusion, **options: Any) -> LoraDiffusion:
    torch.manual_seed(0)
    options = {"adapter": DENOISER, "text_adapter": TEXT, "base_dtype": "float32"} | options
    options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    return LoraDiffusion(family(str(folder)), **options)


def fit(module: LoraDiffusion, options: dict[str, Any], steps: int = 2, **more: Any) -> Trainer:
    trainer = Trainer(**options | {"max_steps": steps} | more)
    trainer.fit(module, loader_of(make_batches(steps)))
    return trainer


def text_parameters(module: LoraDiffusion) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if "text_encoder" in name and p.requires_grad}


def embeddings(module: LoraDiffusion) -> dict[str, Tensor]:
    module.eval()
    with torch.no_grad():
        return module.family.encode_captions(["a red seven", ""])


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained module and the folder of its adapter, for a family's fixture."""
    made: dict[str, tuple[LoraDiffusion, Path]] = {}

    def get(fixture: str) -> tuple[LoraDiffusion, Path]:
        if fixture not in made:
            module = module_of(request.getfixturevalue(fixture), FAMILIES[fixture])
            options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}
            fit(module, options | quiet)
            folder = tmp_path_factory.mktemp("trained") / fixture
            module.save_adapter(folder, formats=["kohya", "comfyui", "lycoris"])
            made[fixture] = module, folder
        return made[fixture]

    return get


@pytest.mark.parametrize("fixture", ENCODERS)
def test_gradients_reach_every_adapter_of_the_text_encoders(fixture: str, trained: Any) -> None:
    module, _ = trained(fixture)
    assert module.family.trained_encoders == ENCODERS[fixture]
    parameters = text_parameters(module)
    for encoder in ENCODERS[fixture]:
        changed = [name for name, p in parameters.items() if f".{encoder}." in name and ".lora_B." in name]
        assert changed
        assert all(bool(parameters[name].any()) for name in changed)  # they begin with zeros


def test_a_layer_that_nothing_reads_keeps_its_adapter_and_is_not_trained(trained: Any) -> None:
    """SDXL takes the hidden states before the last layer, and the pooled output of the second encoder."""
    module, folder = trained("sdxl_folder")
    last = {n: p for n, p in module.named_parameters() if "text_encoder.base_model.model.encoder.layers.1." in n}
    assert any(".lora_A." in name for name in last)
    assert not any(p.requires_grad for p in last.values())
    assert any(
        "text_model.encoder.layers.1." in name for name in read_adapter(folder).text_encoders["text_encoder"].state
    )


@pytest.mark.parametrize(
    ("fixture", "file"),
    [(fixture, "pytorch_lora_weights.safetensors") for fixture in ENCODERS]
    # diffusers reads kohya's files of SD 3 not at all, and those of FLUX in the published size alone.
    + [(fixture, "kohya.safetensors") for fixture in ("sd_folder", "sdxl_folder")],
)
def test_plain_diffusers_computes_the_same(
    fixture: str, file: str, trained: Any, request: pytest.FixtureRequest
) -> None:
    module, folder = trained(fixture)
    plain: Any = DiffusionPipeline.from_pretrained(request.getfixturevalue(fixture))
    family: Any = FAMILIES[fixture](str(request.getfixturevalue(fixture)))
    family.encoders = dict(plain.components)
    family.denoiser = module.family.denoiser  # for its device and config
    family.denoiser_config = module.family.denoiser_config
    with torch.no_grad():
        before = family.encode_captions(["a red seven", ""])
        plain.load_lora_weights(folder, weight_name=file)
        after = family.encode_captions(["a red seven", ""])
    assert apart(embeddings(module), after) <= NEAR
    assert apart(before, after) > 10 * NEAR
    here = dict(module.family.pipeline().components)[family.denoiser_name].state_dict()
    there = plain.components[family.denoiser_name].state_dict()
    names = [name for name in here if ".lora_" in name]
    other = {name.replace(".default_0.", ".default."): value for name, value in there.items()}
    assert names
    assert all(torch.equal(here[name], other[name]) for name in names)


@pytest.mark.parametrize(
    "file", ["", *(f"{name}.safetensors" for name in ("pytorch_lora_weights", "kohya", "comfyui"))]
)
@pytest.mark.parametrize("fixture", ["sd_folder", "sdxl_folder"])
def test_training_goes_on_from_the_files(
    fixture: str, file: str, trained: Any, request: pytest.FixtureRequest, trainer_options: dict[str, Any]
) -> None:
    module, folder = trained(fixture)
    start = FromFile(path=str(folder / file))
    again = module_of(request.getfixturevalue(fixture), FAMILIES[fixture], adapter=start, text_adapter=None)
    again.configure_model()
    assert apart(embeddings(module), embeddings(again)) <= NEAR
    assert text_parameters(again).keys() == text_parameters(module).keys()
    fit(again, trainer_options)
    assert apart(embeddings(module), embeddings(again)) > 10 * NEAR


def test_text_encoders_alone(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = module_of(sd_folder, adapter=None)
    options = trainer_options | {
        "enable_checkpointing": True,
        "callbacks": [AdapterCheckpoint(tmp_path, save_last=True)],
    }
    fit(module, options)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == text_parameters(module).keys()
    folder = tmp_path / "last.adapter"
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    module.save_adapter(folder)  # it replaces the other
    again = module_of(sd_folder, adapter=FromFile(path=str(folder)), text_adapter=None)
    again.configure_model()
    assert again.adapter is None
    assert apart(embeddings(module), embeddings(again)) == 0
    draw = ["--prompts", "a star", "--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]
    out = tmp_path / "drawn.png"
    assert main(["sample", "--adapter", str(folder), "--out", str(out), *draw]) == 0
    plan(Run(module, 2, 16, 16))


def test_resuming_is_exact(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    batches = make_batches(4)
    options = trainer_options | {"max_epochs": None, "enable_checkpointing": True, "gradient_clip_val": 0.1}

    def run(steps: int, folder: str, first: int = 0, ckpt_path: Path | None = None) -> tuple[LoraDiffusion, Path]:
        module = module_of(
            sd_folder,
            text_adapter=LoraConfig(r=4, lora_dropout=0.2),
            parameter_groups=[ParameterGroup("text_encoder.*", lr_ratio=0.1)],
            caption_dropout=0.3,
        )
        checkpoint = AdapterCheckpoint(tmp_path / folder, save_last=True)
        trainer = Trainer(**options, max_steps=steps, callbacks=[checkpoint, AdapterEMA()])
        trainer.fit(module, loader_of(batches[first:] + batches[:first]), ckpt_path=ckpt_path)
        assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-3, 1e-2]
        return module, Path(checkpoint.last_model_path)

    whole, path = run(4, "whole")
    _, part = run(2, "parts")
    resumed, resumed_path = run(4, "parts", 2, part)
    one, other = text_parameters(whole), text_parameters(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for kind in (".adapter", ".ema.adapter"):
        first, second = (read_adapter(one.with_suffix("").with_name(f"last{kind}")) for one in (path, resumed_path))
        for name, value in first.text_encoders["text_encoder"].state.items():
            assert torch.equal(value, second.text_encoders["text_encoder"].state[name])
    saved = torch.load(path, weights_only=True)
    assert {name for name in saved["state_dict"] if "text_encoder" in name} == one.keys()


def test_a_checkpoint_of_another_text_adapter_is_refused(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    options = trainer_options | {
        "enable_checkpointing": True,
        "callbacks": [AdapterCheckpoint(tmp_path, save_last=True)],
    }
    fit(module_of(sd_folder), options)
    other = module_of(sd_folder, text_adapter=LoraConfig(r=4, lora_alpha=9))
    callbacks = [AdapterCheckpoint(tmp_path / "other")]
    with pytest.raises(UserError, match=r"lora_alpha is 9, in the checkpoint 6"):
        Trainer(**options | {"callbacks": callbacks, "max_steps": 4}).fit(
            other, loader_of(make_batches(2)), ckpt_path=tmp_path / "last.ckpt"
        )


def test_dropped_captions_train_too(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_of(sd_folder, caption_dropout=1.0)
    fit(module, trainer_options)
    assert all(bool(p.any()) for name, p in text_parameters(module).items() if ".lora_B." in name)


def test_a_group_can_keep_the_text_encoders_as_they_are(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_of(sd_folder, parameter_groups=[ParameterGroup("text_encoder.*", lr=0.0)])
    fit(module, trainer_options)
    assert not any(bool(p.any()) for name, p in text_parameters(module).items() if ".lora_B." in name)


def test_dropout_of_adapters_is_on_and_that_of_the_encoder_off(sd_folder: Path) -> None:
    module = module_of(sd_folder, text_adapter=LoraConfig(r=4, lora_dropout=0.5))
    module.configure_model()
    module.train()
    modes = {type(layer).__name__: layer.training for layer in module.family.encoders["text_encoder"].modules()}
    assert modes["Dropout"]
    assert not modes["CLIPAttention"]
    module.eval()
    assert not any(layer.training for layer in module.family.encoders["text_encoder"].modules())


def test_half_precision_and_offload(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_of(sd_folder, base_dtype="bfloat16", memory=MemoryOptions(offload_encoders=True))
    with pytest.raises(UserError, match="offload_encoders"):  # there is nothing to move on the CPU
        fit(module, trainer_options)
    module = module_of(sd_folder, base_dtype="bfloat16")
    fit(module, trainer_options)
    parameters = text_parameters(module)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert all(bool(p.any()) for p in parameters.values())
    assert module.family.frozen_encoding_models() == [module.family.vae]  # what offload_encoders moves
    frozen = [p for p in module.family.encoders["text_encoder"].parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("config", [LoHaConfig(r=2, alpha=2), AdaLoraConfig(init_r=3, target_r=1, total_step=9)])
def test_other_methods(config: PeftConfig, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    options = {"tinit": 1, "tfinal": 1} if isinstance(config, AdaLoraConfig) else {}
    vars(config).update(options)
    module = module_of(sd_folder, text_adapter=config)
    with pytest.warns(UserWarning, match="follows the trainer's") if options else nullcontext():
        fit(module, trainer_options, steps=5)
    module.save_adapter(tmp_path / "adapter")
    again = module_of(sd_folder, adapter=FromFile(path=str(tmp_path / "adapter")), text_adapter=None)
    again.configure_model()
    assert apart(embeddings(module), embeddings(again)) <= NEAR
    assert apart(embeddings(module), embeddings(_base(sd_folder))) > 10 * NEAR
    if options:  # the schedule has ended with a mean rank of target_r; a layer without any keeps one in the file
        ranks = [
            len(v)
            for k, v in read_adapter(tmp_path / "adapter").text_encoders["text_encoder"].state.items()
            if "_A" in k
        ]
        assert 8 == len(ranks) <= sum(ranks) < 12


def _base(folder: Path) -> LoraDiffusion:
    module = module_of(folder)
    module.configure_model()
    return module


def test_ranks_are_pruned_in_all_parts(
    sdxl_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charts: list[Any] = []
    monkeypatch.setattr(
        "lit_lora.callbacks.rank_budget.rank_chart", lambda *args: charts.append(args) or rank_chart(*args)
    )
    family = FAMILIES["sdxl_folder"]
    module = module_of(sdxl_folder, family, adapter=LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]))
    callbacks = [RankBudget(mean_rank=2, start=0.2, stop=0.6, prunings=2), RunReport(output_dir=str(tmp_path))]
    fit(module, trainer_options, steps=5, callbacks=callbacks, logger=TensorBoardLogger(tmp_path))
    ranks = layer_ranks(module)
    assert charts[-1][0].keys() == ranks.keys()
    assert {name.partition(".")[0] for name in ranks} == {"denoiser", *ENCODERS["sdxl_folder"]}
    assert sum(ranks.values()) == 2 * len(ranks)
    assert json.loads((tmp_path / "report.json").read_text())["adapter_ranks"] == ranks
    module.save_adapter(tmp_path / "adapter")
    again = module_of(sdxl_folder, family, adapter=FromFile(path=str(tmp_path / "adapter")), text_adapter=None)
    again.configure_model()
    assert layer_ranks(again) == ranks
    assert apart(embeddings(module), embeddings(again)) <= NEAR


def test_samples_are_those_of_the_training_model(trained: Any, tmp_path: Path) -> None:
    module, folder = trained("sd_folder")
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 5.0}
    [ours] = module.generate(["a red seven"], [0], **options)
    draw = ["--prompts", "a red seven", "--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]
    assert main(["sample", "--adapter", str(folder), "--out", str(tmp_path / "drawn"), *draw]) == 0
    with Image.open(tmp_path / "drawn" / "0000.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()
    without = _base(Path(module.family.pretrained_model_name_or_path))
    without.family.denoiser.load_state_dict(module.family.denoiser.state_dict())
    [frozen] = without.generate(["a red seven"], [0], **options)
    assert frozen.tobytes() != ours.tobytes()


class TextCache(LightningDataModule):
    cached = frozenset({"text"})
    train_shards = "shards/cache"


def test_cached_text_is_refused_early(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, session_shards: Path
) -> None:
    module = module_of(sd_folder)
    with pytest.raises(UserError, match=r"model.text_adapter trains text encoders, .* cache \(shards/cache\)"):
        Trainer(**trainer_options).fit(module, datamodule=TextCache())
    assert not module.family.encoders  # nothing was loaded
    with pytest.raises(UserError, match=r"model.text_adapter trains text encoders"):
        plan(Run(module, 2, 16, 16, cached=frozenset({"text", "latents"})))
    batches = [{**make_batches(1)[0], "text_embeddings": {}}]
    with pytest.raises(UserError, match=r"has text_embeddings, .* text_encoder of StableDiffusion are trained"):
        Trainer(**trainer_options).fit(module, loader_of(batches))


def test_cached_latents_are_fine(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_of(sd_folder)
    module.configure_model()
    batch = make_batches(1)[0]
    mean, std = module.family.posterior(batch.pop("pixel_values"))
    batches = [{**batch, "latents_mean": mean.detach(), "latents_std": std.detach()}] * 2
    Trainer(**trainer_options | {"max_steps": 2}).fit(module, loader_of(batches))
    assert all(bool(p.any()) for p in text_parameters(module).values())


def test_what_cannot_be_trained(trained: Any, sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    _, folder = trained("sd_folder")

    class Other(StableDiffusion):
        adaptable_encoders = ()

    with pytest.raises(UserError, match=r"model.text_adapter trains text encoders, and Other names none"):
        module_of(sd_folder, Other)
    with pytest.raises(UserError, match=r"set model.adapter to FromFile"):
        module_of(sd_folder, text_adapter=FromFile(path=str(folder)))
    with pytest.raises(UserError, match=r"has adapters of text_encoder already: leave model.text_adapter out"):
        module_of(sd_folder, adapter=FromFile(path=str(folder)))
    with pytest.raises(UserError, match=r"model.adapter is null, so that nothing would be trained"):
        module_of(sd_folder, adapter=None, text_adapter=None)
    with pytest.raises(
        UserError, match=r"model.text_adapter for text_encoder: target_modules: 'to_q' matches no layer"
    ):
        module_of(sd_folder, text_adapter=LoraConfig(target_modules=["to_q"])).configure_model()
    with pytest.raises(UserError, match="no file can hold the adapter"):
        fit(
            module_of(sd_folder, adapter=None, text_adapter=LoHaConfig(r=2)),
            trainer_options | {"enable_checkpointing": True, "callbacks": [AdapterCheckpoint()]},
        )
    module = module_of(sd_folder, adapter=None)
    module.trainer = Trainer(**trainer_options | {"strategy": LitLoraFSDP()})
    with pytest.raises(UserError, match=r"model.adapter is null, and LitLoraFSDP loads the denoiser block by block"):
        check_run(module, "fit")
    dropped = module_of(sd_folder, adapter=FromFile(path=str(folder), drop_text_encoders=True), text_adapter=TEXT)
    dropped.configure_model()  # begins with new ones
    assert not any(bool(p.any()) for name, p in text_parameters(dropped).items() if ".lora_B." in name)


def test_a_plan_counts_the_text_encoders(sd_folder: Path) -> None:
    module = module_of(sd_folder)
    with_text = plan(Run(module, 2, 16, 16, sampling=Sampling()))
    without = plan(Run(module_of(sd_folder, text_adapter=None), 2, 16, 16))
    module.configure_model()
    added = sum(p.numel() for p in text_parameters(module).values())
    assert with_text.adapter_parameters == without.adapter_parameters + added
    assert with_text.adapter_file_bytes > without.adapter_file_bytes + 4 * added
    assert sum(with_text.phases["backward"].values()) > sum(without.phases["backward"].values()) + 4 * added
    assert _steps_in_backward(Run(module, 2, 16, 16))
    allocates = module_of(sd_folder, text_adapter=AdaLoraConfig(total_step=9))
    assert not _steps_in_backward(Run(allocates, 2, 16, 16))


def test_adapter_tools_keep_the_text_encoders(
    trained: Any, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, folder = trained("sd_folder")
    assert main(["adapter", "info", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {(layer["part"], layer["rank"]) for layer in told["layers"]} == {("denoiser", 2), ("text_encoder", 4)}
    assert main(["adapter", "check", str(folder), "--base", str(sd_folder)]) == 0
    assert main(["adapter", "resize", str(folder), str(tmp_path / "resized"), "--rank", "4"]) == 0
    again = module_of(sd_folder, adapter=FromFile(path=str(tmp_path / "resized")), text_adapter=None)
    again.configure_model()
    assert apart(embeddings(module), embeddings(again)) <= NEAR
    assert main(["adapter", "merge", str(folder), str(tmp_path / "merged"), "--into", str(sd_folder)]) == 0
    merged = StableDiffusion(str(tmp_path / "merged"))
    merged.load(torch.float32, without=("vae",))
    with torch.no_grad():
        assert apart(embeddings(module), merged.encode_captions(["a red seven", ""])) <= NEAR


def test_the_card_names_the_text_encoders(trained: Any) -> None:
    _, folder = trained("sdxl_folder")
    card = (folder / "README.md").read_text()
    assert "| rank in text_encoder_2 | 4 |" in card
    assert 'PeftModel.from_pretrained(pipeline.text_encoder_2, "this folder", subfolder="text_encoder_2")' in card


def test_a_config_trains_text_encoders_and_no_cache_is_made_of_them(
    sd_folder: Path, session_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "trainer": {"max_steps": 1, "logger": False, "accelerator": "cpu", "default_root_dir": str(tmp_path)}
        | {
            "callbacks": [
                {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}}
            ]
        }
        | {"enable_progress_bar": False, "enable_model_summary": False},
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(sd_folder)}},
            "adapter": None,
            "text_adapter": {
                "class_path": "peft.LoraConfig",
                "init_args": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]},
            },
            "parameter_groups": [{"pattern": "text_encoder.*", "lr_ratio": 0.1}],
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {"train_shards": str(session_shards), "batch_size": 2, "resolution": 16, "num_workers": 0},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    assert main(["fit", "--config", str(path)]) == 0, capsys.readouterr().err
    assert read_adapter(tmp_path / "last.adapter").text_encoders["text_encoder"].config["r"] == 4
    cached = ["--out", str(tmp_path / "cache"), "--data.init_args.decoder.center_crop", "true"]
    assert main(["cache", "--config", str(path), *cached]) == 2
    assert "make a cache with lit-lora cache --text false" in " ".join(capsys.readouterr().err.split())
