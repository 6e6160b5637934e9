"""An extracted adapter is the best approximation of the difference, and its errors are told truly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_lora.adapter_tools import extract as extracting
from lit_lora.adapter_tools.budget import Budget
from lit_lora.adapter_tools.extract import Extracted, ModelWeights, extract
from lit_lora.adapter_tools.plain_lora import lora_layers
from lit_lora.adapters import load_adapter
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.formats import AdapterFiles, DiffusersFormat
from lit_lora.formats.sampling_scheduler import scheduler_changes
from tests.adapter_tools.test_merge_base import predict
from tests.adapter_tools.unet import unet_adapter

LOW_RANK = ("attn1.to_q", "conv_in", "resnets.0.conv1")


@pytest.fixture(scope="module")
def tuned(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet with changes of rank 2 in some layers, of full rank in another one, and in a norm and a bias."""
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    names = [name for name, _ in unet.named_modules() if name.endswith(LOW_RANK)]
    changes = lora_layers(unet_adapter(unet, names, r=2), "")["denoiser"]
    generator = torch.Generator().manual_seed(4)
    for name, layer in changes.items():
        unet.get_submodule(name).weight.data += layer.delta()
    for name in ("conv_out.weight", "conv_norm_out.weight", "conv_out.bias"):
        weight = unet.get_parameter(name)
        weight.data += torch.randn(weight.shape, generator=generator) / 5
    folder = tmp_path_factory.mktemp("tuned")
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    return folder / "unet"


def extracted(tuned: Path, base: Path, max_rank: int = 64, measure: Any = None, **budget: Any) -> Extracted:
    return extract(ModelWeights(str(tuned)), ModelWeights(str(base)), Budget(**budget), max_rank, measure)


def differences(tuned: Path, base: Path) -> dict[str, Tensor]:
    after, before = (UNet2DConditionModel.from_pretrained(folder).state_dict() for folder in (tuned, base))
    found = {name: after[name] - before[name] for name in after if not torch.equal(after[name], before[name])}
    return {name.removesuffix(".weight"): value for name, value in found.items() if value.ndim > 1}


def deltas(files: AdapterFiles) -> dict[str, Tensor]:
    return {name: layer.delta() for name, layer in lora_layers(files, "")["denoiser"].items()}


def test_the_scheduler_of_the_training_stays(tuned: Path, sd_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(sd_folder, own, ignore=shutil.ignore_patterns("unet"))
    shutil.copytree(tuned, own / "unet")
    file = own / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}))
    assert extracted(own, sd_folder, rank=1).adapter.metadata == {}  # another sampler
    file.write_text(json.dumps(config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    metadata = extracted(own, sd_folder, rank=1).adapter.metadata
    assert scheduler_changes(metadata) == {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("exact", [512, 4], ids=["exact", "randomized"])
def test_a_rank(exact: int, tuned: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extracting, "_EXACT", exact)
    found = extracted(tuned, sd_folder, rank=2)
    expected = differences(tuned, sd_folder / "unet")
    assert found.errors.keys() == expected.keys()
    assert "conv_out" in expected
    for name, delta in deltas(found.adapter).items():
        full = expected[name]
        error = float((full - delta).norm() / full.norm())
        assert found.errors[name] == pytest.approx(error, abs=2e-3 if error < 1e-2 else 1e-5)
        left, values, right = torch.linalg.svd(full.flatten(1).double(), full_matrices=False)
        best = ((left[:, :2] * values[:2]) @ right[:2]).reshape(full.shape)
        torch.testing.assert_close(delta.double(), best, rtol=0, atol=1e-5)
        assert (error > 0.1) == (name == "conv_out")
    assert sorted(found.left_out) == ["conv_norm_out.weight", "conv_out.bias"]
    assert found.unchanged > 10


def test_what_else_has_changed(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "tuned")
    for part, names in (("unet", ("conv_in.weight",)), ("text_encoder", 2), ("vae", ())):
        (file,) = (tmp_path / "tuned" / part).glob("*.safetensors")
        weights = load_file(file)
        chosen = sorted(weights)[:names] if isinstance(names, int) else names
        save_file({name: value + 1 if name in chosen else value for name, value in weights.items()}, file)
    count = len(load_file(next((sd_folder / "text_encoder").glob("*.safetensors"))))
    found = extracted(tmp_path / "tuned", sd_folder, rank=2)
    assert found.other_parts == {"text_encoder": f"2 of {count} weights are changed"}
    assert extracted(tmp_path / "tuned" / "unet", sd_folder, rank=2).other_parts == {}
    next((tmp_path / "tuned" / "vae").glob("*.safetensors")).unlink()
    assert "cannot be compared" in extracted(tmp_path / "tuned", sd_folder, rank=2).other_parts["vae"]


@pytest.mark.parametrize("name", ["conv_in.weight", "conv_out.bias"])
def test_values_that_are_not_finite(name: str, tuned: Path, sd_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    unet.get_parameter(name).data.view(-1)[0] = torch.nan
    unet.save_pretrained(tmp_path)
    for models in ((tmp_path, sd_folder), (tuned, tmp_path)):
        with pytest.raises(UserError, match=f"1 tensors of the model {tmp_path} hold NaN or Inf, the first is {name}"):
            extracted(*models, rank=2)


def test_the_tuned_model_comes_back(tuned: Path, sd_folder: Path, tmp_path: Path) -> None:
    """With all energy in the adapter, and norm and bias set by hand, diffusers predicts what the tuned model does."""
    found = extracted(tuned, sd_folder, energy=1.0)
    assert found.ranks["conv_in"] == 2
    assert found.ranks["conv_out"] == 4  # of 4 outputs
    assert (found.adapter.family, found.adapter.config["base_model_name_or_path"]) == (StableDiffusion, str(sd_folder))
    DiffusersFormat().write(found.adapter, tmp_path)
    expected = UNet2DConditionModel.from_pretrained(tuned)
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    for name in found.left_out:
        unet.get_parameter(name).data.copy_(expected.get_parameter(name).data)
    unet.load_lora_adapter(str(tmp_path), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(predict(unet), predict(expected), rtol=0, atol=1e-5)


def test_plain_peft_loads_it(tuned: Path, sd_folder: Path) -> None:
    found = extracted(tuned, sd_folder, rank=4)
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    load_adapter(unet, found.adapter.config, found.adapter.state, "extracted")
    for name, delta in differences(tuned, sd_folder / "unet").items():
        torch.testing.assert_close(unet.get_submodule(name).get_delta_weight("default"), delta, rtol=0, atol=1e-5)


def test_an_energy_share_up_to_a_rank(tuned: Path, sd_folder: Path) -> None:
    found = extracted(tuned, sd_folder, energy=0.7)
    for name, full in differences(tuned, sd_folder / "unet").items():
        energies = torch.linalg.svdvals(full.flatten(1).double()).square()
        kept = (energies.cumsum(0) / energies.sum()).tolist()
        assert kept[found.ranks[name] - 1] >= 0.7
        assert found.ranks[name] == 1 or kept[found.ranks[name] - 2] < 0.7
    assert max(extracted(tuned, sd_folder, energy=1.0, max_rank=1).ranks.values()) == 1


def test_a_size(tuned: Path, sd_folder: Path, tmp_path: Path) -> None:
    def measure(files: AdapterFiles) -> int:
        DiffusersFormat().write(files, tmp_path)
        return (tmp_path / "pytorch_lora_weights.safetensors").stat().st_size

    found = extracted(tuned, sd_folder, size=20_000, measure=measure)
    assert 18_000 < measure(found.adapter) <= 20_000
    expected = differences(tuned, sd_folder / "unet")
    for name, delta in deltas(found.adapter).items():
        error = float((expected[name] - delta).norm() / expected[name].norm())
        assert found.errors[name] == pytest.approx(error, abs=2e-3 if error < 1e-2 else 1e-4)
    with pytest.raises(UserError, match=r"size=2.0 kB .* is too small"):
        extracted(tuned, sd_folder, size=2_000, measure=measure)


def test_files_beside_a_config(tuned: Path, sd_folder: Path, tmp_path: Path) -> None:
    file = sd_folder / "unet" / "diffusion_pytorch_model.safetensors"
    found = extracted(tuned, file, rank=1)
    assert found.adapter.config["base_model_name_or_path"] == str(file)
    shutil.copy(file, tmp_path / "alone.safetensors")
    assert extracted(tuned, tmp_path / "alone.safetensors", rank=1).ranks == found.ranks
    with pytest.raises(UserError, match=r"neither .*alone.* nor .*alone.* has a config.json beside it"):
        extracted(tmp_path / "alone.safetensors", tmp_path / "alone.safetensors", rank=1)


def test_half_precision_stays(tuned: Path, sd_folder: Path, tmp_path: Path) -> None:
    UNet2DConditionModel.from_pretrained(tuned).bfloat16().save_pretrained(tmp_path)
    found = extracted(tmp_path, sd_folder, rank=1)
    assert {value.dtype for value in found.adapter.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (lambda tuned, base, flux: (base, base), "have equal weights in all layers"),
        (lambda tuned, base, flux: (flux, base), r"has \d+ weights that the model does not have.*from_single_file"),
    ],
)
def test_other_models(
    paths: Callable[..., tuple[Path, Path]], message: str, tuned: Path, sd_folder: Path, flux_folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        extracted(*paths(tuned, sd_folder, flux_folder), rank=1)


def test_a_rank_above_every_layer(tuned: Path, sd_folder: Path) -> None:
    shapes = UNet2DConditionModel.from_pretrained(sd_folder / "unet").state_dict()
    most = max(min(len(weight), weight[0].numel()) for name, weight in shapes.items() if weight.ndim > 1)
    with pytest.raises(UserError, match=rf"rank={most + 1} is above {most}, the highest .*; give at most {most}$"):
        extracted(tuned, sd_folder, rank=most + 1)
    assert max(extracted(tuned, sd_folder, rank=most).ranks.values()) <= most


def test_other_shapes_and_missing_weights(tuned: Path, sd_folder: Path, tmp_path: Path) -> None:

    weights = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({**weights, "conv_in.weight": torch.zeros(16, 5, 3, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match=r"conv_in.weight has the shape \(16, 5, 3, 3\) in .*and \(16, 4, 3, 3\) in"):
        extracted(tmp_path / "shape.safetensors", sd_folder, rank=1)
    del weights["conv_in.weight"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"1 weights are only in one of .*such as conv_in.weight"):
        extracted(tmp_path / "less.safetensors", sd_folder, rank=1)
    half = tmp_path / "half.safetensors"
    half.write_bytes((tmp_path / "less.safetensors").read_bytes()[:50_000])
    with pytest.raises(UserError, match=f"cannot read {half}"):
        extracted(half, sd_folder, rank=1)
