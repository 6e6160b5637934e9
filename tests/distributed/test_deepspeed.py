"""Two processes under DeepSpeed train as one does, and leave the files that one leaves."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from lit_lora.distributed.deepspeed import LitLoraDeepSpeed
from lit_lora.errors import UserError
from tests.distributed import deepspeed_script as script
from tests.helpers import made_once, processes

pytestmark = [
    # A run that evaluates has no use for what a callback has saved.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # A run that goes on leaves the folder of the one before alone.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


class Runs:
    """What the two processes and a single one have seen and written."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model
        self.single = json.loads((folder / "single.json").read_text())
        self.ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]

    def losses(self, name: str) -> list[float]:
        """Mean over the processes."""
        if name in self.single:
            losses: list[float] = self.single[name]["losses"]
            return losses
        return [sum(both) / 2 for both in zip(*(rank[name]["losses"] for rank in self.ranks), strict=True)]

    def checkpoint(self, name: str, file: str = "after.ckpt") -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(self.folder / name / file, weights_only=True)
        return checkpoint


def run_single(folder: Path, model: str) -> None:
    found = {
        "single": script.train(model, "auto", folder / "single"),
        "single-uneven": script.train_unevenly(model, "auto", folder / "single-uneven"),
        "single-reads": script.train_reading_weights(model, "auto", folder / "single-reads"),
        "single-evaluated": script.evaluate(model, "auto", "auto", folder / "single" / "after.ckpt"),
    }
    (folder / "single.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def runs(shallow_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    def make(folder: Path) -> None:
        run_single(folder, str(shallow_sd_folder))
        processes(["-m", "tests.distributed.deepspeed_script", folder, shallow_sd_folder], 2, folder)

    return Runs(made_once(tmp_path_factory, "deepspeed", make), str(shallow_sd_folder))


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """Two checkpoints hold the same adapter, optimizer and schedule, in the same form."""
    assert one.keys() == other.keys()
    assert one["lr_schedulers"] == other["lr_schedulers"]
    [state], [other_state] = one["optimizer_states"], other["optimizer_states"]
    assert state["param_groups"] == other_state["param_groups"]
    tensors, others = flat(one["state_dict"], state["state"]), flat(other["state_dict"], other_state["state"])
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert value.dtype == torch.float32
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, others[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def flat(weights: dict[str, Any], states: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {**weights, **{f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}}


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trains_as_a_single_process(runs: Runs, stage: int) -> None:
    assert runs.losses(f"stage-{stage}") == pytest.approx(runs.losses("single"), abs=1e-5)
    assert len(runs.losses("single")) == script.STEPS
    for file in (script.WITHIN, "after.ckpt"):
        assert_same(runs.checkpoint(f"stage-{stage}", file), runs.checkpoint("single", file), tolerance=1e-5)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulates_clips_and_checkpoints_as_a_single_process(runs: Runs, stage: int) -> None:
    name = f"stage-{stage}-uneven"
    assert runs.losses(name) == pytest.approx(runs.losses("single-uneven"), abs=1e-5)
    assert_same(runs.checkpoint(name), runs.checkpoint("single-uneven"), tolerance=1e-5)
    assert runs.checkpoint(name)["global_step"] == 4


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "source"), [(stage, source) for stage, two in script.SOURCES.items() for source in two]
)
def test_goes_on_where_another_run_was(runs: Runs, stage: int, source: str) -> None:
    name = f"stage-{stage}-from-{source}"
    assert runs.losses(name) == pytest.approx(runs.losses(source)[script.RESUMED_FROM :], abs=1e-6)
    assert_same(runs.checkpoint(name), runs.checkpoint(source), tolerance=1e-6)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_single_process_goes_on(runs: Runs, tmp_path: Path, stage: int) -> None:
    resume = runs.folder / f"stage-{stage}" / script.WITHIN
    with pytest.warns(UserWarning, match=r"\(2 processes x .*\) in the checkpoint, .* \(1 process x "):
        found = script.train(runs.model, "auto", tmp_path, resume=resume)
    assert found["losses"] == pytest.approx(runs.losses(f"stage-{stage}")[script.RESUMED_FROM :], abs=1e-6)
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert_same(after, runs.checkpoint(f"stage-{stage}"), tolerance=1e-6)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_average_is_that_of_a_single_process(runs: Runs, stage: int) -> None:
    expected = runs.checkpoint("single")["callbacks"]["AdapterEMA"]["shadow_params"]
    for name in (f"stage-{stage}", {1: "stage-1-from-single", 2: "stage-2-from-stage-1"}[stage]):
        average = runs.checkpoint(name)["callbacks"]["AdapterEMA"]["shadow_params"]
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adapter_folder_has_the_checkpoint_s_values(runs: Runs, stage: int) -> None:
    folder = runs.folder / f"stage-{stage}" / script.WITHIN.replace(".ckpt", ".adapter")
    weights = runs.checkpoint(f"stage-{stage}", script.WITHIN)["state_dict"]
    saved = load_file(folder / "adapter_model.safetensors")
    # PEFT leaves the adapter's name out; one number of the module is not the adapter's.
    in_checkpoint = {key.replace(".default", ""): value for key, value in weights.items() if key != "odd"}
    assert len(saved) == len(in_checkpoint)
    for key, value in in_checkpoint.items():
        torch.testing.assert_close(saved[key.removeprefix("family.denoiser.")], value, rtol=0, atol=0)


@pytest.mark.slow
@needs_deepspeed
def test_processes_have_their_part_of_the_base(runs: Runs) -> None:
    for rank in runs.ranks:
        for name, most in (("stage-2", 1.0), ("stage-3", 0.6), ("stage-3-offload", 0.6)):
            held = rank[name]["held"]
            assert 0.4 < held["here"] / held["in all"] <= most, name


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_changes_nothing(runs: Runs, stage: int) -> None:
    name = f"stage-{stage}-offload"
    assert runs.losses(name) == pytest.approx(runs.losses(f"stage-{stage}")[: script.SHORT], abs=1e-6)
    states = runs.checkpoint(name)["optimizer_states"][0]["state"].values()
    assert all(float(state["step"]) == script.SHORT and state["exp_avg_sq"].any() for state in states)


@pytest.mark.slow
@needs_deepspeed
def test_base_in_few_bits_stays_as_it_is_stored(runs: Runs) -> None:
    mean = {}
    for quantization, stored in (("int8", "int8"), ("nf4", "uint8")):
        for stage in (2, 3):
            found = [rank[f"stage-{stage}-stored"][quantization] for rank in runs.ranks]
            assert {"frozen bfloat16", f"frozen {stored}", "trained float32"} <= set(found[0]["dtypes"])
            assert "trained bfloat16" not in found[0]["dtypes"]
            mean[stage] = [sum(losses) / 2 for losses in zip(*(f["losses"] for f in found), strict=True)]
            state = runs.checkpoint(f"stage-{stage}-stored/{quantization}")["optimizer_states"][0]["state"][0]
            assert state["exp_avg"].dtype == torch.float32
        # The first loss depends on the base alone; then rounding to bfloat16 differs with the order of sums.
        assert mean[2][0] == mean[3][0]
        assert mean[2] == pytest.approx(mean[3], abs=2e-3)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_can_read_the_base_s_weights(runs: Runs, stage: int) -> None:
    name = f"stage-{stage}-reads"
    assert runs.losses(name) == pytest.approx(runs.losses("single-reads"), abs=1e-5)
    assert_same(runs.checkpoint(name), runs.checkpoint("single-reads"), tolerance=1e-5)
    assert (runs.folder / name / "samples" / "step-000000.png").is_file()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_validates_and_draws(runs: Runs, stage: int) -> None:
    expected = runs.single["single-evaluated"]
    found = [rank[f"stage-{stage}-evaluated"] for rank in runs.ranks]
    for one in found:
        assert one["fit"] == pytest.approx(expected["fit"], abs=1e-5)
        assert one["after"] == pytest.approx(expected["after"], abs=1e-5)
        assert one["from file"] == pytest.approx(expected["from file"], abs=1e-5)
        assert one["steps"] == script.SHORT + 1  # it went on
    images = [image for one in found for image in one["images"]]
    for image, single in zip(images, expected["images"], strict=True):
        assert image == pytest.approx(single, abs=0.1)


@pytest.mark.slow
@needs_deepspeed
def test_refuses_what_would_train_otherwise(runs: Runs) -> None:
    for rank in runs.ranks:
        assert "set gradient_clip_algorithm to 'norm'" in rank["refusals"]["clip"]
        assert "use torch.optim.AdamW" in rank["refusals"]["optimizer"]


@needs_deepspeed
def test_refuses_other_precisions() -> None:
    with pytest.raises(UserError, match=r"precision='bf16-mixed'.*base_dtype"):
        Trainer(accelerator="cpu", devices=1, strategy=LitLoraDeepSpeed(), precision="bf16-mixed", logger=False)


@needs_deepspeed
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 4}, "stage must be 1, 2 or 3, not 4"),
        ({"stage": 2, "offload_parameters": True}, "needs stage=3, .* stage is 2"),
        ({"config": {"fp16": {"enabled": True}, "zero_optimization": {"stage": 3}}}, "fp16, zero_optimization.stage"),
        ({"config": "absent.json"}, "absent.json cannot be read as JSON"),
    ],
)
def test_refuses_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LitLoraDeepSpeed(**options)


@needs_deepspeed
def test_config_comes_before_the_strategy_s_own(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 7}}))
    config = LitLoraDeepSpeed(3, config=file).config
    assert config["wall_clock_breakdown"]
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 3
    file.write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        LitLoraDeepSpeed(config=file)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r'pip install "lit_lora\[deepspeed\]"'):
        LitLoraDeepSpeed()
