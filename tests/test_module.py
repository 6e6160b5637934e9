from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from peft import LoraConfig

from lit_lora.adapters import adapter_keys
from lit_lora.callbacks import SampleImages
from lit_lora.caption_dropout import drop_captions
from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily, StableDiffusion, StableDiffusionXL
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from lit_lora.objectives import DDPM, MinSNR, OffsetNoise, PseudoHuber
from lit_lora.sampling import SamplingOptions
from tests.helpers import loader_of, make_batches


def module_for(folder: Path, **options: Any) -> LoraDiffusion:
    options = {"base_dtype": "float32"} | options
    return LoraDiffusion(StableDiffusion(str(folder)), LoraConfig(r=2, lora_alpha=2), **options)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item())


def fit(module: LoraDiffusion, batches: list[dict[str, Any]], options: dict[str, Any], **more: Any) -> Losses:
    losses = Losses()
    options = options | {"max_steps": len(batches)} | more
    options["callbacks"] = [losses, *options.get("callbacks", [])]
    Trainer(**options).fit(module, loader_of(batches))
    return losses


def test_the_base_stays_as_it_was(sd_module: LoraDiffusion, sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    fit(sd_module, make_batches(2), trainer_options)
    fresh = StableDiffusion(str(sd_folder))
    fresh.load(torch.float32)
    trained = dict(sd_module.family.denoiser.get_base_model().named_parameters())
    for name, value in fresh.denoiser.named_parameters():
        ours = trained.get(name)
        if ours is None:  # an adapted layer keeps its weight one level down
            head, _, last = name.rpartition(".")
            ours = trained[f"{head}.base_layer.{last}"]
        assert torch.equal(ours, value)
    for name, value in fresh.vae.named_parameters():
        assert torch.equal(dict(sd_module.family.vae.named_parameters())[name], value)


def test_precision_is_split(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_for(sd_folder, base_dtype="bfloat16")
    fit(module, make_batches(2), trainer_options)
    for parameter in module.family.denoiser.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    state = module.optimizers().state_dict()["state"]  # type: ignore[union-attr]
    assert {value["exp_avg"].dtype for value in state.values()} == {torch.float32}


def test_the_optimizer_has_the_adapter_alone(sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    fit(sd_module, make_batches(1), trainer_options)
    given = {id(p) for group in sd_module.optimizers().param_groups for p in group["params"]}  # type: ignore[union-attr]
    assert given == {id(p) for name, p in sd_module.named_parameters() if "lora_" in name}


def test_clipping_works(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    free = fit(module_for(sd_folder), make_batches(1), trainer_options)
    bound = free.norms[0] / 3
    clipped_norms: list[float] = []

    class After(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            clipped_norms.append(torch.nn.utils.get_total_norm(gradients).item())

    torch.manual_seed(0)
    fit(module_for(sd_folder), make_batches(1), trainer_options, gradient_clip_val=bound, callbacks=[After()])
    assert clipped_norms == [pytest.approx(bound, rel=1e-3)]


def test_gradient_checkpointing_changes_no_loss(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = module_for(sd_folder, memory=MemoryOptions(gradient_checkpointing=checkpointing))
        losses.append(fit(module, make_batches(3), trainer_options).losses)
        assert module.family.denoiser.get_base_model().is_gradient_checkpointing == checkpointing
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_slot_with_weight_zero_does_not_count(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    def trained(batch: dict[str, Any]) -> torch.Tensor:
        torch.manual_seed(0)
        module = module_for(sd_folder, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        fit(module, [batch], trainer_options)
        return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])

    batch = make_batches(1)[0]
    spoiled = {**batch, "weight": torch.tensor([1.0, 0.0]), "pixel_values": batch["pixel_values"].clone()}
    other = {**spoiled, "pixel_values": spoiled["pixel_values"].clone()}
    other["pixel_values"][1] = 0
    assert torch.equal(trained(spoiled), trained(other))
    assert not torch.equal(trained(spoiled), trained(batch))


def test_caption_dropout_follows_the_slots(sd_folder: Path) -> None:
    module = module_for(sd_folder, caption_dropout=0.5)
    batch = {"caption": ["x"] * 400}
    dropped = drop_captions(batch, Draws(0, range(400)), module.caption_dropout)["caption"]
    assert 150 < dropped.count("") < 250
    assert set(dropped) == {"", "x"}
    assert (
        drop_captions({"caption": ["x"] * 200}, Draws(0, range(200, 400)), module.caption_dropout)["caption"]
        == dropped[200:]
    )


def test_validation_loss_is_the_same_in_every_run_and_weighted(
    sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    def validate(batches: list[dict[str, Any]], **options: Any) -> float:
        torch.manual_seed(0)
        module = module_for(sd_folder, **options)
        return Trainer(**trainer_options).validate(module, loader_of(batches), verbose=False)[0]["val/loss"]

    batches = make_batches(3)
    plain = validate(batches)
    assert plain == validate(
        batches,
        seed=9,
        objective=DDPM(weighting=MinSNR(), noise=[OffsetNoise()], criterion=PseudoHuber()),
        caption_dropout=1.0,
    )
    # Splitting into other batches, with a padded one at the end, gives the same mean over the same samples.
    halves = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(2)]
    padding = {**halves[0], "weight": torch.zeros(1)}
    assert validate([*halves, padding]) == pytest.approx(plain, rel=1e-5)


def test_a_denoiser_may_keep_what_it_computes_in_validation(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Qwen-Image's and Z-Image's tables of positions; training saves them for its backward pass."""
    tables: list[torch.Tensor] = []
    denoise = sd_module.family.denoise

    def with_table(noisy: torch.Tensor, *args: Any) -> torch.Tensor:
        assert torch.is_grad_enabled() == sd_module.training
        if not tables:
            tables.append(torch.full_like(noisy, 2))
        return denoise(noisy, *args) * tables[0]

    monkeypatch.setattr(sd_module.family, "denoise", with_table)
    trainer = Trainer(**trainer_options, max_steps=1)
    trainer.validate(sd_module, loader_of(make_batches(1)), verbose=False)
    trainer.fit(sd_module, loader_of(make_batches(1)))
    assert trainer.global_step == 1
    assert len(tables) == 1


def test_the_loss_is_masked_in_training_alone(sd_module: LoraDiffusion) -> None:
    sd_module.configure_model()
    (batch,) = make_batches(1)
    mask = torch.zeros(2, 1, *batch["pixel_values"].shape[-2:], dtype=torch.uint8)
    mask[1] = 255
    draws = Draws(0, range(2))
    plain, _ = sd_module.losses(batch, draws)
    masked, _ = sd_module.losses({**batch, "loss_mask": mask}, draws)
    assert masked[0] == 0
    assert masked[1] == plain[1] != 0
    sd_module.eval()
    assert torch.equal(sd_module.losses({**batch, "loss_mask": mask}, draws)[0], sd_module.losses(batch, draws)[0])


def test_accumulating_equals_one_larger_batch(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    def trained(batches: list[dict[str, Any]], **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        module = module_for(sd_folder, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        fit(module, batches, trainer_options, max_steps=1, **options)
        return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])

    small = make_batches(2)
    joined = {
        key: torch.cat([b[key] for b in small]) if torch.is_tensor(small[0][key]) else small[0][key] + small[1][key]
        for key in small[0]
    }
    torch.testing.assert_close(trained(small, accumulate_grad_batches=2), trained([joined]), rtol=1e-4, atol=1e-6)


def test_batches_without_numbers_get_them_here(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    """A datamodule of somebody else's gives only images and captions."""
    bare = [{key: batch[key] for key in ("pixel_values", "caption")} for batch in make_batches(3)]
    size = len(bare[0]["caption"])
    firsts = [i << 20 for i in range(3)]  # of a loader that does not tell its batch size
    numbered = [batch | {"slot": [*range(i, i + size)]} for i, batch in zip(firsts, bare, strict=True)]
    torch.manual_seed(0)
    ours = fit(module_for(sd_folder), numbered, trainer_options).losses
    torch.manual_seed(0)
    theirs = fit(module_for(sd_folder), bare, trainer_options).losses
    assert ours == theirs
    assert len(set(ours)) == 3


def test_learning_rate_schedules_step_with_the_optimizer(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_for(
        sd_folder,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
    )
    fit(module, make_batches(3), trainer_options)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(1.0)  # type: ignore[union-attr]


def test_predict_draws_the_captions(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_for(sd_folder, sampling=SamplingOptions(num_inference_steps=2))
    [images] = Trainer(**trainer_options).predict(module, loader_of(make_batches(1)))  # type: ignore[misc]
    assert [image.size for image in images] == [(16, 16)] * 2


class CachedBatches(LightningDataModule):
    """What batches become when their latents, and with ``text`` their captions' embeddings, are cached."""

    def __init__(self, folder: Path, family_class: type[ModelFamily], count: int, text: bool = True) -> None:
        super().__init__()
        family = family_class(str(folder))
        family.load(torch.float32, without={"denoiser"})
        self.cached = {"latents", "text"} if text else {"latents"}
        self.batches = []
        with torch.no_grad():
            for batch in make_batches(count):
                pixel_values = batch.pop("pixel_values")
                batch["latents_mean"], batch["latents_std"] = family.posterior(pixel_values)
                batch["target_size"] = torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))
                if text:
                    batch["text_embeddings"] = family.encode_captions(batch["caption"])
                    empty = family.encode_captions([""])
                    batch["empty_text_embeddings"] = {name: value[0] for name, value in empty.items()}
                self.batches.append(batch)

    def train_dataloader(self) -> Any:
        return loader_of(self.batches)

    predict_dataloader = train_dataloader


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(
    ("family_class", "fixture"), [(StableDiffusion, "sd_folder"), (StableDiffusionXL, "sdxl_folder")]
)
def test_training_from_a_cache_is_the_same_training(
    family_class: type[ModelFamily],
    fixture: str,
    text: bool,
    request: pytest.FixtureRequest,
    trainer_options: dict[str, Any],
) -> None:
    folder = request.getfixturevalue(fixture)

    def losses_of(data: Any) -> tuple[list[float], set[str]]:
        torch.manual_seed(0)
        module = LoraDiffusion(family_class(str(folder)), LoraConfig(r=2), base_dtype="float32", caption_dropout=0.5)
        losses = Losses()
        Trainer(**trainer_options, max_steps=4, callbacks=[losses]).fit(module, data)
        return losses.losses, {name for name, _ in module.family.named_children()}

    expected, parts = losses_of(loader_of(make_batches(4)))
    assert "vae" in parts
    cached, parts = losses_of(CachedBatches(folder, family_class, 4, text))
    assert cached == pytest.approx(expected, rel=1e-5)
    assert "vae" not in parts
    assert ("text_encoder" in parts) != text


def test_cached_captions_are_dropped_like_others(sd_folder: Path) -> None:
    module = module_for(sd_folder, caption_dropout=0.5)
    draws = Draws(0, range(8))
    plain = drop_captions({"caption": ["x"] * 8}, draws, module.caption_dropout)["caption"]
    empty = {"hidden": torch.zeros(3, 2), "pooled": torch.zeros(())}
    embeddings = {"hidden": torch.ones(8, 3, 2), "pooled": torch.ones(8)}
    batch = {"caption": ["x"] * 8, "text_embeddings": embeddings, "empty_text_embeddings": empty}
    dropped = drop_captions(batch, draws, module.caption_dropout)["text_embeddings"]
    kept = torch.tensor([float(caption == "x") for caption in plain])
    assert 0 < kept.sum() < 8
    assert torch.equal(dropped["hidden"], kept.view(8, 1, 1).expand(8, 3, 2))
    assert torch.equal(dropped["pooled"], kept)


def test_images_while_training_from_a_cache(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def trained(callbacks: list[Callback]) -> tuple[list[float], LoraDiffusion]:
        torch.manual_seed(0)
        module = module_for(sd_folder)
        module.adapter.lora_dropout = 0.5  # type: ignore[attr-defined]
        losses = Losses()
        options = trainer_options | {"max_steps": 3, "callbacks": [losses, *callbacks]}
        Trainer(**options).fit(module, CachedBatches(sd_folder, StableDiffusion, 3))
        return losses.losses, module

    losses, module = trained([SampleImages(["a star"], every_n_steps=2, num_inference_steps=2)])
    names = sorted(path.name for path in tmp_path.glob("samples/*.png"))
    assert names == ["step-000000.png", "step-000002.png", "step-000003.png"]
    assert {name for name, _ in module.family.named_children()} == {"denoiser"}
    assert losses == trained([])[0]
    # The same image as from a module that has all of its parts.
    image = module.generate(["a star"], [0], num_inference_steps=2, guidance_scale=5.0)[0]
    module._trainer = None
    module.configure_model()
    assert "vae" in dict(module.family.named_children())
    assert image.tobytes() == module.generate(["a star"], [0], num_inference_steps=2, guidance_scale=5.0)[0].tobytes()


def test_nothing_is_drawn_or_saved_before_there_is_something(sd_folder: Path, tmp_path: Path) -> None:
    module = module_for(sd_folder)
    for call in (lambda: module.generate(["a star"]), lambda: module.save_adapter(tmp_path / "adapter")):
        with pytest.raises(
            UserError, match=r"yet: call (generate|save_adapter) after trainer\.fit, in the same process"
        ):
            call()
    assert not list(tmp_path.iterdir())


def test_images_without_seeds_begin_with_the_modules_seed(sd_folder: Path) -> None:
    module = module_for(sd_folder, seed=5)
    module.configure_model()
    drawn = module.generate(["a star", "a star"], num_inference_steps=2)
    again = module.generate(["a star", "a star"], [5, 6], num_inference_steps=2)
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in again]


def test_predict_from_a_cache(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    def drawn(data: Any) -> list[bytes]:
        torch.manual_seed(0)
        module = module_for(sd_folder, sampling=SamplingOptions(num_inference_steps=2))
        [images] = Trainer(**trainer_options).predict(module, data)  # type: ignore[misc]
        return [image.tobytes() for image in images]

    assert drawn(CachedBatches(sd_folder, StableDiffusion, 1)) == drawn(loader_of(make_batches(1)))


def test_an_unloaded_copy_has_the_options_and_nothing_of_the_run(
    sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    module = module_for(sd_folder, memory=MemoryOptions(gradient_checkpointing=True))
    fit(module, make_batches(1), trainer_options)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    copy = module.unloaded()
    assert copy.memory == module.memory
    assert copy.adapter == module.adapter
    assert copy.adapter is not module.adapter
    assert copy.objective is not module.objective
    assert copy._trainer is None
    assert not copy._configured
    copy.family = StableDiffusion(str(sd_folder))
    copy.configure_model()
    assert copy._configured
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_run_without_the_cache_after_one_with_it(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_for(sd_folder)
    Trainer(**trainer_options, max_steps=1).fit(module, CachedBatches(sd_folder, StableDiffusion, 1))
    adapter = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    Trainer(**trainer_options).validate(module, loader_of(make_batches(1)), verbose=False)
    assert {"vae", "text_encoder"} <= {name for name, _ in module.family.named_children()}
    assert all(
        torch.equal(a, p) for a, p in zip(adapter, (p for p in module.parameters() if p.requires_grad), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_dropout": 1.5}, r"caption_dropout=1.5 is not a probability; it must lie in \[0, 1\]"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str, sd_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        module_for(sd_folder, **options)


def test_precisions_that_would_cast_the_adapter_are_refused(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="'bf16-true' would cast the adapter"):
        fit(sd_module, make_batches(1), trainer_options, precision="bf16-true")


def test_float16_needs_a_scaled_loss(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"set trainer\.precision to '16-mixed'"):
        fit(module_for(sd_folder, base_dtype="float16"), make_batches(1), trainer_options)


def test_somebody_elses_mixed_precision_works(sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    seen = []
    original = sd_module.family.denoise

    def denoise(*arguments: Any) -> torch.Tensor:
        prediction = original(*arguments)
        seen.append(prediction.dtype)
        return prediction

    sd_module.family.denoise = denoise  # type: ignore[method-assign]
    fit(sd_module, make_batches(1), trainer_options, precision="bf16-mixed")
    assert seen == [torch.bfloat16]


def test_saving_replaces_the_folder_as_a_whole(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    fit(sd_module, make_batches(1), trainer_options)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        sd_module.save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    sd_module.save_adapter(str(tmp_path / "adapter"))
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == names


class AddsAdapter(Callback):
    """Adds a second adapter, which trains too or is frozen."""

    def __init__(self, trains: bool) -> None:
        self.trains = trains

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LoraDiffusion)
        denoiser = pl_module.family.denoiser
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of a second adapter
            denoiser.add_adapter("style", LoraConfig(r=2, target_modules=["to_k"]))
        denoiser.base_model.set_adapter(["default", "style"])
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad = ".default." in name or (self.trains and ".style." in name)


@pytest.mark.parametrize(
    ("trains", "found"),
    [(True, r"without \d+ other trained tensors, the first is \S+\.style\."), (False, "without the adapter style")],
)
def test_files_tell_that_they_lack_a_second_adapter(
    trains: bool, found: str, sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    fit(sd_module, make_batches(1), trainer_options, callbacks=[AddsAdapter(trains)])
    with pytest.warns(UserWarning, match=found):
        sd_module.save_adapter(tmp_path / "adapter")


class TestMemoryKeys:
    """Each memory option trains the same adapter, or is refused with what to do."""

    def _trained(
        self, folder: Path, trainer_options: dict[str, Any], memory: MemoryOptions = MemoryOptions(), **clipping: Any
    ) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = module_for(folder, memory=memory)
        Trainer(max_steps=3, **clipping, **trainer_options).fit(module, loader_of(make_batches(3)))
        keys = adapter_keys(module)
        return {key: value for key, value in module.state_dict().items() if key in keys}

    @pytest.mark.parametrize(
        "options",
        [
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": ["down_blocks.*", "up_blocks.1"]},
            {"vae_slicing": True},
            {"optimizer_in_backward": True},
        ],
        ids=str,
    )
    def test_trains_the_same(self, options: dict[str, Any], sd_folder: Path, trainer_options: dict[str, Any]) -> None:
        expected = self._trained(sd_folder, trainer_options)
        for key, value in self._trained(sd_folder, trainer_options, MemoryOptions(**options)).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)

    def test_optimizer_in_backward_clips_by_value(self, sd_folder: Path, trainer_options: dict[str, Any]) -> None:
        clipping = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
        expected = self._trained(sd_folder, trainer_options, **clipping)
        found = self._trained(sd_folder, trainer_options, MemoryOptions(optimizer_in_backward=True), **clipping)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())

    def test_optimizer_in_backward_refuses_the_norm(self, sd_folder: Path, trainer_options: dict[str, Any]) -> None:
        with pytest.raises(
            UserError, match=r"gradient_clip_val=1.0 clips by the norm .* set gradient_clip_algorithm to"
        ):
            self._trained(sd_folder, trainer_options, MemoryOptions(optimizer_in_backward=True), gradient_clip_val=1.0)

    @pytest.mark.parametrize("key", ["offload_encoders", "offload_blocks", "offload_activations"])
    def test_the_host_cannot_move_to_itself(self, key: str, sd_folder: Path, trainer_options: dict[str, Any]) -> None:
        with pytest.raises(
            UserError, match=rf"memory\.{key} moves memory from a GPU to the host, .* set memory\.{key} to false"
        ):
            self._trained(sd_folder, trainer_options, MemoryOptions(**{key: True}))

    @pytest.mark.parametrize(
        ("options", "convolutions", "message"),
        [
            ({}, "plain", "has no effect without memory.offload_blocks; set that to true"),
            ({"offload_blocks": True}, "channels_last", "would copy weights from memory.offload_folder into memory"),
        ],
    )
    def test_a_folder_for_blocks_that_would_not_be_used(
        self, options: dict[str, Any], convolutions: Any, message: str, sd_folder: Path, trainer_options: dict[str, Any]
    ) -> None:
        memory = MemoryOptions(offload_folder="frozen", **options)
        module = module_for(sd_folder, memory=memory, convolutions=convolutions)
        with pytest.raises(UserError, match=message):
            Trainer(max_steps=1, **trainer_options).fit(module, loader_of(make_batches(1)))

    def test_blocks_that_do_not_exist(self, sd_folder: Path, trainer_options: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"'down' matches no block .* it has down_blocks.0"):
            self._trained(sd_folder, trainer_options, MemoryOptions(gradient_checkpointing=["down"]))
