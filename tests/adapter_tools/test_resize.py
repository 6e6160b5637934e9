"""Resizing is the best approximation of each layer, and plain PEFT and diffusers load it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from lit_lora.adapter_tools.budget import Budget
from lit_lora.adapter_tools.lora_layer import LoraLayer
from lit_lora.adapter_tools.plain_lora import patterns
from lit_lora.adapter_tools.resize import Resized, resize
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles, DiffusersFormat, PeftFormat
from tests.adapter_tools.layers import adapter, config, images, layers_of, loaded
from tests.adapter_tools.unet import unet_adapter
from tests.formats.adapters import encoder_adapter


def no_size(files: AdapterFiles) -> int:
    raise AssertionError("only a budget of bytes measures files")


def resized(files: AdapterFiles, **budget: Any) -> Resized:
    return resize(files, "adapter", Budget(**budget), no_size)


def best(layer: LoraLayer, components: int) -> Tensor:
    """The truncated decomposition of the whole matrix of each group."""
    full = layer.delta().double().reshape(layer.groups, -1, layer.down[0].numel())
    left, values, right = torch.linalg.svd(full, full_matrices=False)
    return ((left[..., :components] * values[:, None, :components]) @ right[:, :components]).reshape(layer.weight_shape)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"conv": 3, "linear": 0.5}}])
def test_each_layer_is_the_best_approximation(options: dict[str, Any]) -> None:
    files = adapter(config(**options))
    done = resized(files, rank=2).adapter
    for name, layer in layers_of(done).items():
        before = layers_of(files)[name]
        assert layer.rank == 2
        torch.testing.assert_close(layer.delta().double(), best(before, 2 // before.groups), rtol=0, atol=1e-6)
    assert done.config == {**files.config, "r": 2}


def test_an_alpha_of_zero() -> None:
    layers = layers_of(resized(adapter(config(alpha_pattern={"conv": 0})), rank=2).adapter)
    assert not layers["conv"].delta().any()
    assert layers["linear"].delta().any()


def test_peft_computes_with_the_approximation() -> None:
    files = adapter(config(target_modules=["conv", "linear"], rank_pattern={"linear": 6}))
    expected = loaded(files)
    for name, layer in layers_of(files).items():
        module = expected.base_model.model.get_submodule(name)
        module.base_layer.weight.data += best(layer, 3).float()
    with expected.disable_adapter():
        torch.testing.assert_close(
            loaded(resized(files, rank=3).adapter)(images()), expected(images()), rtol=0, atol=1e-5
        )


def test_a_layer_keeps_its_bits_where_the_rank_stays() -> None:
    files = adapter(config(rank_pattern={"conv": 2, "linear": 6}))
    done = resized(files, rank=4)
    for key, value in files.state.items():
        assert torch.equal(value, done.adapter.state[key]) == (".linear." not in key)
    assert done.adapter.config["rank_pattern"] == {"^conv": 2}
    assert done.layers["conv"].kept == 1
    assert done.layers["linear"].kept < 1


def test_components_without_energy_cost_nothing() -> None:
    """An adapter of rank 2 in matrices of rank 4 becomes one of rank 2 that computes the same."""
    files = adapter(config())
    for key, value in files.state.items():
        if "lora_A" in key:
            twice, once = (slice(1, None, 2), 0) if ".grouped." in key else (slice(2, None), value[:2])
            value[twice] = once
    done = resized(files, energy=1.0)
    assert {name: one.after for name, one in done.layers.items()} == {
        "conv": 2,
        "pointwise": 2,
        "grouped": 2,
        "linear": 2,
    }
    torch.testing.assert_close(loaded(done.adapter)(images()), loaded(files)(images()), rtol=0, atol=1e-5)


def test_an_energy_share_is_kept_with_the_lowest_rank() -> None:
    files = adapter(config(r=6))
    done = resized(files, energy=0.9)
    for name, one in done.layers.items():
        layer, groups = layers_of(files)[name], layers_of(files)[name].groups
        energies = [
            float(best(layer, count).square().sum() / layer.delta().square().sum())
            for count in range(1, 1 + one.after // groups)
        ]
        assert energies[-1] >= 0.9
        assert all(energy < 0.9 for energy in energies[:-1])
        assert one.kept == pytest.approx(energies[-1], abs=1e-6)
    kept = sum(one.kept * one.energy for one in done.layers.values()) / sum(one.energy for one in done.layers.values())
    assert done.kept == pytest.approx(kept)
    assert 0.9 < kept < 1


def test_a_layer_without_an_update_gets_rank_one() -> None:
    files = adapter(config())
    files.state["base_model.model.linear.lora_B.weight"].zero_()
    one = resized(files, energy=0.9).layers["linear"]
    assert (one.after, one.kept, one.energy) == (1, 1, 0)


def test_dora_keeps_its_magnitudes() -> None:
    files = adapter(config(use_dora=True, target_modules=["conv", "linear"]))
    done = resized(files, rank=4).adapter
    assert all(torch.equal(value, done.state[key]) for key, value in files.state.items())
    done = resized(files, rank=2).adapter
    for key, value in files.state.items():
        assert torch.equal(value, done.state[key]) == key.endswith("lora_magnitude_vector")
    loaded(done)(images())


class TestSize:
    """A budget of bytes is shared among all layers, to the byte."""

    @pytest.fixture
    def files(self) -> AdapterFiles:
        return adapter(config(r=8, target_modules=["conv", "pointwise", "linear"]))

    @pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
    def test_the_file_fits_and_nothing_more_would(self, share: float, files: AdapterFiles, tmp_path: Path) -> None:
        def measure(some: AdapterFiles) -> int:
            PeftFormat().write(some, tmp_path)
            return (tmp_path / "adapter_model.safetensors").stat().st_size

        most = int(share * measure(files))
        done = resize(files, "adapter", Budget(size=most), measure)
        size = measure(done.adapter)
        steps = [one.bytes_per_step for name, one in layers_of(files).items() if done.layers[name].after < 8]
        assert most - min(steps) < size <= most
        self._check_no_exchange(files, done)

    @staticmethod
    def _check_no_exchange(files: AdapterFiles, done: Resized) -> None:
        """No kept component has less energy per byte than one left out, unless that one is too large for the rest."""
        worth = {}
        for name, layer in layers_of(files).items():
            energies = (
                torch.linalg.svdvals(layer.delta().double().reshape(len(layer.up), -1)).square() / layer.bytes_per_step
            )
            worth[name] = energies.tolist()
        kept = min(worth[name][one.after - 1] for name, one in done.layers.items() if one.after > 1)
        left = [worth[name][one.after] for name, one in done.layers.items() if one.after < 8]
        assert sorted([kept, *left])[-2] <= kept * (1 + 1e-6)

    def test_too_small(self, files: AdapterFiles) -> None:
        with pytest.raises(
            UserError, match=r"size=100 B \(100 bytes\) is too small: .* 3 layers the file has 1,234 bytes"
        ):
            resize(files, "adapter", Budget(size=100), lambda some: 1234)


def test_diffusers_loads_it(sd_folder: Path, tmp_path: Path) -> None:
    """A unet with the file of a resized adapter predicts what one with the approximated weights does."""
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    names = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "to_v", "conv1", "proj_in"))]
    files = unet_adapter(unet, names, {"conv1": 6})
    done = resized(files, energy=0.8)
    assert len({one.after for one in done.layers.values()}) > 1
    DiffusersFormat().write(done.adapter, tmp_path)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 16)
    with torch.no_grad():
        unet.load_lora_adapter(str(tmp_path), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        found = unet(*inputs).sample
        unet.unload_lora()
        for name, layer in layers_of(files).items():
            unet.get_submodule(name).weight += best(layer, done.layers[name].after).float()
        torch.testing.assert_close(found, unet(*inputs).sample, rtol=0, atol=1e-5)


def test_text_encoders_are_resized_too() -> None:
    files = replace(adapter(config()), text_encoders={"text_encoder": encoder_adapter()})
    done = resized(replace(files, state={}, config={}), rank=1)
    part = done.adapter.text_encoders["text_encoder"]
    assert part.config["r"] == 1
    assert not done.adapter.state
    assert list(done.layers) == ["text_encoder.text_model.encoder.layers.1.self_attn.out_proj"]
    both = resized(files, energy=0.7)
    assert len(both.layers) == 5
    assert both.adapter.text_encoders["text_encoder"].config["r"] in (1, 2)


@pytest.mark.parametrize(
    ("files", "budget", "message"),
    [
        (lambda: adapter(config()), {"rank": 5}, "rank=5 is above 4, the highest rank in adapter: resizing only lowers"),
        (lambda: adapter(config()), {"rank": 1}, "rank=1 is too small for grouped, a convolution of 2 groups"),
        (lambda: adapter(config()), {}, "give one of rank, energy and size.*none of them was given"),
        (lambda: adapter(config()), {"rank": 1, "energy": 0.5}, "rank=1 and energy=0.5 were given"),
        (lambda: adapter(config()), {"energy": 0.0}, "energy=0.0 is too small; it must be above 0"),
        (lambda: adapter(config()), {"energy": 1.5}, "energy=1.5 is too large"),
        (lambda: adapter(config()), {"rank": 0}, "rank=0 is too small"),
        (lambda: adapter(LoHaConfig(r=2, target_modules=["linear"])), {"rank": 1}, "it is LOHA, which has no two factors"),
        (lambda: adapter(config(bias="all")), {"rank": 1}, "bias='all'"),
    ],
)  # fmt: skip
def test_refused(files: Any, budget: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resized(files(), **budget)


def test_an_adapter_that_changes_the_base_when_it_is_loaded() -> None:
    files = adapter(config())
    with pytest.raises(UserError, match="init_lora_weights='pissa' changes the base's weights"):
        resized(replace(files, config={**files.config, "init_lora_weights": "pissa"}), rank=1)


def test_a_config_of_other_ranks() -> None:
    files = adapter(config())
    with pytest.raises(UserError, match="its config tells rank 9 for conv, and the tensors have rank 4"):
        resized(replace(files, config={**files.config, "rank_pattern": {"conv": 9}}), rank=1)


def test_many_layers_share_patterns() -> None:
    ranks = {f"blocks.{i}.layer": 1 + i % 3 for i in range(900)}
    usual, found = patterns(ranks)
    assert usual == 1
    assert list(found.values()) == [2, 3]
    for name, rank in ranks.items():
        assert found.get(get_pattern_key(list(found), name), usual) == rank
    assert get_pattern_key(list(found), "more.blocks.1.layer") == "more.blocks.1.layer"
