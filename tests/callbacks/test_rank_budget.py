from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import AdaLoraConfig, LoraConfig, PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_lora.adapters.ranked_layer import RankedLayer, layer_ranks, ranked_layers
from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, FiniteGradients, LoraInjection, RankBudget, RunReport
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.memory.optimizer_in_backward import OptimizerInBackward
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from tests.distributed.scenarios import captured_alone
from tests.helpers import Classifier, ImageLogger, difference_in_plain_libraries, loader_of, make_batches

STEPS = 8
LARGEST = 304
"""Parameters of the largest component, of a convolution from 32 channels to 16."""


@pytest.fixture(scope="session")
def sd_folder(deep_sd_folder: Path) -> Path:
    """Budgets here are numbers of this pipeline's layers and parameters."""
    return deep_sd_folder


def module_of(base: Path, **options: Any) -> LoraDiffusion:
    torch.manual_seed(0)
    adapter = options.pop("adapter", None) or LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"])
    optimizer = options.pop("optimizer", lambda p: torch.optim.AdamW(p, lr=1e-2))
    return LoraDiffusion(StableDiffusion(str(base)), adapter, base_dtype="float32", optimizer=optimizer, **options)


def fit(
    module: LoraDiffusion, options: dict[str, Any], *callbacks: Callback, resume: Path | None = None, at: int = 0
) -> Trainer:
    options = {"max_steps": STEPS} | options | {"callbacks": list(callbacks)}
    options["enable_checkpointing"] = any(isinstance(one, AdapterCheckpoint) for one in callbacks)
    trainer = Trainer(**options)
    # Lightning does not rewind a plain list: what is left comes first, in a list as long as before.
    batches = make_batches(STEPS)
    trainer.fit(module, loader_of(batches[at:] + batches[:at]), ckpt_path=resume)
    return trainer


def parameters_of(module: LoraDiffusion) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_mean_rank_is_reached_and_layers_differ(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_of(sd_folder)
    fit(module, trainer_options, RankBudget(mean_rank=2))
    ranks = layer_ranks(module)
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1


@pytest.mark.parametrize("budget", [{"share": 0.5}, {"parameters": 4000}])
def test_parameters_stay_below_the_budget(
    budget: dict[str, Any], sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    module = module_of(sd_folder)
    module.configure_model()
    first = parameters_of(module)
    fit(module, trainer_options, RankBudget(**budget))
    bound = budget.get("parameters", first / 2)
    assert bound < first
    assert bound - LARGEST < parameters_of(module) <= bound


@pytest.mark.parametrize(
    ("size", "options"),
    # What PiSSA's files leave out of the base has a rank of its own, which pruning does not change.
    [
        (34_000, {"use_dora": True, "target_modules": ["to_q", "to_v", "conv1"]}),
        (44_000, {"init_lora_weights": "pissa", "target_modules": "attention"}),
    ],
    ids=["DoRA", "PiSSA"],
)
def test_the_file_is_as_small_as_asked_for(
    size: int, options: dict[str, Any], sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = module_of(sd_folder, adapter=LoraConfig(r=4, **options))
    fit(module, trainer_options, RankBudget(file_size=size))
    module.save_adapter(tmp_path / "adapter")
    assert size - 4096 - 4 * LARGEST < (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size <= size


def test_the_schedule_falls_cubically_between_start_and_stop(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    seen: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            ranks = layer_ranks(pl_module).values()
            seen.append(sum(ranks) / len(ranks))

    fit(module_of(sd_folder), trainer_options, RankBudget(mean_rank=1, start=0.25, stop=0.75, prunings=3), Watch())
    # From 4 to 1 in three prunings, at steps 2, 4 and 6: 1 + 3 * (1 - n / 3) ** 3.
    expected = [4, 1 + 3 * 8 / 27, 1 + 3 * 8 / 27, 1 + 3 / 27, 1 + 3 / 27, 1, 1, 1]
    assert seen == pytest.approx(expected, abs=1 / 24)  # one rank of the 24 layers


def test_components_without_which_the_loss_would_not_change_go_first(
    sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    module = module_of(sd_folder)
    module.configure_model()
    layers = ranked_layers(module)
    for layer in layers:  # two of the four components cannot change the output, nor be trained to
        torch.nn.init.normal_(layer.b, std=0.1)
        layer.a.data[[0, 2]] = 0
        layer.b.data[:, [0, 2]] = 0
    before = {layer.path: _update(layer) for layer in layers}
    module.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    fit(module, trainer_options, RankBudget(mean_rank=2, min_rank=2, stop=0.3))
    for layer in ranked_layers(module):
        assert layer.rank == 2
        torch.testing.assert_close(_update(layer), before[layer.path])


def _update(layer: RankedLayer) -> torch.Tensor:
    """``B A``."""
    return layer.b.detach().flatten(1) @ layer.a.detach().flatten(1)


def test_what_the_layer_has_learned_in_one_direction_is_one_component(
    sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    """However it is spread over the components that were trained."""
    module = module_of(sd_folder)
    module.configure_model()
    layers = ranked_layers(module)
    for layer in layers:
        direction, mixture = torch.randn(layer.b.shape[0]), torch.randn(layer.b.shape[1])
        layer.b.data = torch.outer(direction, mixture).reshape(layer.b.shape) / 10
    before = {layer.path: _update(layer) for layer in layers}
    module.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    fit(module, trainer_options, RankBudget(mean_rank=1, stop=0.3))
    for layer in ranked_layers(module):
        assert layer.rank == 1
        torch.testing.assert_close(_update(layer), before[layer.path], rtol=1e-4, atol=1e-5)


def test_memory_of_weights_and_optimizer_becomes_free(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    module = module_of(sd_folder)
    module.configure_model()
    first = parameters_of(module)
    trainer = fit(module, trainer_options, RankBudget(share=0.4))
    state = [v for one in trainer.optimizers[0].state.values() for v in one.values() if v.numel() > 1]
    # Not views of larger tensors.
    held = sum(value.untyped_storage().nbytes() for value in state)
    weights = sum(p.untyped_storage().nbytes() for p in module.parameters() if p.requires_grad)
    assert weights == 4 * parameters_of(module) <= 0.4 * 4 * first
    assert held == 2 * weights


def test_gradients_that_are_freed_while_they_are_computed_score_the_same(
    sd_folder: Path, trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.module.OptimizerInBackward", partial(OptimizerInBackward, bucket_bytes=1000))
    weights = []
    for in_backward in (False, True):
        module = module_of(sd_folder, memory=MemoryOptions(optimizer_in_backward=in_backward))
        budget = RankBudget(mean_rank=1.5, prunings=3)
        fit(module, trainer_options, budget)
        assert not budget._hooks
        weights.append([parameter for parameter in module.parameters() if parameter.requires_grad])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


# torch's own, when it compiles.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_serve_all_ranks(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    config: Any = torch.compiler.config
    torch._dynamo.reset()
    graphs: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    ranks = []
    for compiled in (True, False):
        module = module_of(
            sd_folder, adapter=LoraConfig(r=5, target_modules=["to_q", "to_v", "conv1"]), compile_blocks=compiled
        )
        with captured_alone(), config.patch(dynamic_sources=""):
            fit(module, trainer_options, RankBudget(mean_rank=3, prunings=3, min_rank=2), Counts())
        ranks.append(layer_ranks(module))
    assert ranks[0] == ranks[1]
    assert len(set(ranks[0].values())) > 1
    assert len(set(graphs)) == 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_resuming_at_any_step_is_exact(
    at: int, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    def callbacks(folder: str) -> list[Callback]:
        checkpoints = AdapterCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return [RankBudget(mean_rank=1.5, start=0.2, stop=0.8, prunings=4), AdapterEMA(0.9), checkpoints]

    whole, resumed = module_of(sd_folder), module_of(sd_folder)
    first, again = callbacks("one"), callbacks("two")
    fit(whole, trainer_options, *first)
    fit(resumed, trainer_options, *again, resume=tmp_path / "one" / f"step={at}.ckpt", at=at)
    assert layer_ranks(whole) == layer_ranks(resumed)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    one, two = first[1].state_dict(), again[1].state_dict()
    assert torch.equal(one["shadow_params"], two["shadow_params"])
    assert (tmp_path / "one" / f"step={STEPS}.adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "two" / f"step={STEPS}.adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_an_optimizer_that_cannot_be_pruned_is_refused_after_the_first_step(
    sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    module = module_of(sd_folder, optimizer=lambda p: torch.optim.Adafactor(p))
    with pytest.raises(UserError, match=r"Adafactor keeps row_var as .* so that RankBudget cannot prune it"):
        fit(module, trainer_options, RankBudget(mean_rank=2, start=0.8, stop=0.9))
    assert module.trainer.global_step == 1


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_longer_run_keeps_the_schedule_of_its_checkpoint(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoints = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    budget = {"mean_rank": 2, "start": 0.25, "stop": 0.5, "prunings": 2}
    fit(module_of(sd_folder), trainer_options, RankBudget(**budget), checkpoints)  # type: ignore[arg-type]
    module, again = module_of(sd_folder), RankBudget(**budget)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"made for 8 optimizer steps and has begun; the 5 of this run do not change"):
        fit(module, trainer_options | {"max_steps": 5}, again, resume=tmp_path / "step=2.ckpt", at=2)
    ranks = layer_ranks(module)
    assert sum(ranks.values()) == 2 * len(ranks)  # at step 4 of 8, not at half of 5


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_schedule_that_has_not_begun_is_that_of_the_longer_run(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    def budget() -> RankBudget:
        return RankBudget(mean_rank=2, start=0.5, stop=0.75, prunings=2)

    checkpoints = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module_of(sd_folder), trainer_options | {"max_steps": 4}, budget(), checkpoints)  # would prune at 2 and 3
    whole, resumed = module_of(sd_folder), module_of(sd_folder)
    fit(whole, trainer_options, budget())
    fit(resumed, trainer_options, budget(), resume=tmp_path / "step=1.ckpt", at=1)
    assert layer_ranks(whole) == layer_ranks(resumed)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_files_draw_the_same_images_in_plain_diffusers(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = module_of(sd_folder)
    fit(module, trainer_options, RankBudget(mean_rank=1.5))
    module.save_adapter(tmp_path / "adapter")
    in_diffusers, in_peft, from_base = difference_in_plain_libraries(
        module.family.denoiser, sd_folder, tmp_path / "adapter"
    )
    assert in_diffusers <= 1e-5
    assert in_peft <= 1e-5
    assert from_base > 1e-3


class Spoils(Callback):
    """Makes the gradients of some steps NaN."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step in self.steps:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)


@pytest.mark.filterwarnings("ignore:optimizer step .* is skipped")
def test_gradients_that_are_not_finite_do_not_spoil_the_scores(
    sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    budget = RankBudget(mean_rank=2, start=0.9, stop=1.0, prunings=1)
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            if (scores := budget.state_dict()["scores"]) is not None:
                seen.append(scores)

    module = module_of(sd_folder, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    fit(module, trainer_options, Spoils(5), FiniteGradients(), budget, Watch())
    assert [bool(one.isfinite().all()) for one in seen] == [True] * 4  # steps 4 to 7
    assert torch.equal(seen[0], seen[1])


@pytest.mark.filterwarnings("ignore:optimizer step .* is skipped")
def test_a_pruning_waits_for_a_step_that_can_be_scored(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    """Else it would remove any components."""
    seen: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(sum(layer_ranks(pl_module).values()))

    budget = RankBudget(mean_rank=2, start=0.25, stop=0.5, prunings=2)  # at steps 2 and 4
    module = module_of(sd_folder, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    # The adapter itself must stay finite: the optimizer does not step with these gradients.
    fit(module, trainer_options, Spoils(2, 3), FiniteGradients(patience=5), budget, Watch())
    assert seen[1] == seen[2] == seen[3]
    assert seen[4] == 2 * len(layer_ranks(module))


def test_a_run_that_ends_before_the_budget_is_reached_says_so(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    with pytest.warns(UserWarning, match=r"ended at step 3, and RankBudget reaches its budget at step 5 of 8"):
        fit(module_of(sd_folder), trainer_options, Stops(), RankBudget(mean_rank=2))


def test_metrics_and_a_chart(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    """In TensorBoard, and in loggers with a method for images."""
    logger, other = TensorBoardLogger(tmp_path), ImageLogger(tmp_path)
    module = module_of(sd_folder)
    options = trainer_options | {"logger": [logger, other], "log_every_n_steps": 1}
    fit(module, options, RankBudget(mean_rank=2, prunings=2))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    means = [event.value for event in events.Scalars("ranks/mean")]
    assert (means[0], means[-1]) == (pytest.approx(4, abs=2), 2)
    assert [event.value for event in events.Scalars("ranks/parameters")][-1] == parameters_of(module)
    assert [event.step for event in events.Images("ranks")] == [step for _, _, step in other.images]
    assert len(other.images) == 2
    assert {name for name, *_ in other.images} == {"ranks"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs exactly one of mean_rank, parameters, share, file_size, not none of them"),
        ({"mean_rank": 2, "share": 0.5}, "not mean_rank=2 and share=0.5"),
        ({"share": 1.5}, r"share=1.5 must lie between 0 and 1"),
        ({"mean_rank": 0.5}, "mean_rank=0.5 is too small"),
        ({"mean_rank": 2, "start": 0.6, "stop": 0.5}, "0 <= start < stop <= 1"),
        ({"mean_rank": 2, "prunings": 0}, "prunings=0 is too small"),
        ({"file_size": "big"}, "file_size='big' is not a byte size"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankBudget(**options)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (
            {"parameters": 100},
            {},
            r"budget of 100 parameters is below [\d,]+, what min_rank=1 in each of the \d+ layers",
        ),
        (
            {"file_size": "1kB"},
            {},
            r"file_size of 1,000 bytes is below [\d,]+, what min_rank=1 in each of the \d+ layers",
        ),
        ({"mean_rank": 4}, {}, "is not below the .* at the start"),
        (
            {"mean_rank": 2},
            {"adapter": AdaLoraConfig(total_step=8, tinit=1, tfinal=1, target_modules=["to_q"])},
            "the adapter is AdaLoraConfig",
        ),
    ],
)
def test_runs_that_cannot_be_pruned(
    budget: dict[str, Any],
    options: dict[str, Any],
    message: str,
    sd_folder: Path,
    trainer_options: dict[str, Any],
) -> None:
    with pytest.raises(UserError, match=message):
        fit(module_of(sd_folder, **options), trainer_options, RankBudget(**budget))


def test_a_run_without_an_end_is_refused(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"set trainer.max_steps or trainer.max_epochs"):
        fit(module_of(sd_folder), trainer_options | {"max_steps": -1}, RankBudget(mean_rank=2))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_that_is_resumed_after_the_last_pruning_is_refused(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoints = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(module_of(sd_folder), trainer_options | {"max_steps": 5}, checkpoints)
    told = r"prunes the last time at step 5 of 8, and this run resumes at step 5 with 96 ranks, more than its budget of 48, so"
    with pytest.raises(UserError, match=told):
        fit(
            module_of(sd_folder), trainer_options, RankBudget(mean_rank=2), checkpoints, resume=tmp_path / "step=5.ckpt"
        )


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_of_pruned_ranks_is_validated(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    trained = module_of(sd_folder)
    checkpoints = AdapterCheckpoint(tmp_path, filename="end", every_n_train_steps=STEPS)
    fit(trained, trainer_options, RankBudget(mean_rank=2), checkpoints)
    fresh = module_of(sd_folder)
    trainer = Trainer(**trainer_options | {"callbacks": [RankBudget(mean_rank=2)]})
    trainer.validate(fresh, loader_of(make_batches(1)), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert layer_ranks(fresh) == layer_ranks(trained)


def test_the_report_has_the_ranks(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = module_of(sd_folder)
    fit(module, trainer_options, RankBudget(mean_rank=2), RunReport(output_dir=str(tmp_path)))
    assert json.loads((tmp_path / "report.json").read_text())["adapter_ranks"] == layer_ranks(module)
    assert "ranks of 24 layers 1 to 4, 2 on average" in capsys.readouterr().out


def injected(folder: Path, options: dict[str, Any], resume: Path | None = None, at: int = 0) -> Classifier:
    module = Classifier()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "3"])
    checkpoints = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [LoraInjection(config), RankBudget(mean_rank=2), AdapterEMA(0.9), checkpoints]
    fit(module, options, *callbacks, resume=resume, at=at)  # type: ignore[arg-type]
    return module


def test_a_module_of_another_project(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = injected(tmp_path, trainer_options)
    assert sum(layer_ranks(module).values()) == 4
    values = torch.rand(2, 3, 16, 16)
    for folder, same in ((f"step={STEPS}.adapter", True), (f"step={STEPS}.ema.adapter", False)):
        loaded = PeftModel.from_pretrained(Classifier(), tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(loaded.net(values), module.net(values)) == same
    resumed = injected(tmp_path, trainer_options, tmp_path / "step=3.ckpt", at=3)
    for (name, a), (_, b) in zip(module.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
