from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_lora.adapters import adapter_state, inject, plain_config
from lit_lora.adapters.ranked_layer import layer_ranks, note_ranks, ranked_layers
from lit_lora.errors import UserError
from lit_lora.formats import AdapterFiles
from lit_lora.formats.peft import PeftFormat, safetensors_bytes


class Net(nn.Module):
    """Layers whose names end with the names of others, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.grouped = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.proj = nn.Linear(5, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x)).mean((2, 3))
        return self.inner["proj"](torch.tanh(self.proj(x)))


def adapted(**options: Any) -> PeftModel:
    """The net with an adapter whose B is not zero."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj", "conv"], **options)
    model = inject(Net(), config, ())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}]


def test_the_layers_whose_ranks_can_change() -> None:
    layers = ranked_layers(nn.ModuleDict({"net": adapted()}))
    assert [layer.name for layer in layers] == ["conv", "inner.proj", "proj"]
    assert layers[0].path == "net.base_model.model.conv"
    assert [layer.component_parameters for layer in layers] == [3 * 9 + 5, 6 + 4, 5 + 6]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolutions_stay_as_they_are() -> None:
    model = inject(Net(), LoraConfig(r=5, target_modules=["grouped", "conv"]), ())
    assert [layer.name for layer in ranked_layers(model)] == ["conv"]


def test_gate_gradients_are_those_of_factors_on_the_components() -> None:
    model, x = adapted(), torch.randn(2, 3, 8, 8)
    layers = ranked_layers(model)
    axes = {layer.name: torch.linalg.qr(torch.randn(layer.rank, layer.rank)).Q for layer in layers}
    for layer in layers:
        assert layer.gate_gradients(axes[layer.name]) is None
    model(x).square().sum().backward()
    for layer in layers:
        found = layer.gate_gradients(axes[layer.name])
        turned = [(axes[layer.name].T @ value.flatten(1)) for value in (layer.a.detach(), layer.a.grad)]  # type: ignore[union-attr]
        assert found is not None
        torch.testing.assert_close(found, (turned[0] * turned[1]).sum(1), rtol=1e-4, atol=1e-4)
        expected = []
        for index in range(layer.rank):
            axis, losses = axes[layer.name][:, index], []
            for factor in (1.001, 0.999):
                scaled = copy.deepcopy(model)
                ranked = next(one for one in ranked_layers(scaled) if one.name == layer.name)
                factors = torch.eye(layer.rank) + (factor - 1) * torch.outer(axis, axis)
                ranked.a.data = (factors @ ranked.a.data.flatten(1)).reshape(ranked.a.shape)
                losses.append(float(scaled(x).detach().double().square().sum()))
            expected.append((losses[0] - losses[1]) / 0.002)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-2, atol=2e-2)


def test_principal_axes_are_those_of_the_singular_vectors() -> None:
    for layer in ranked_layers(adapted()):
        axes = layer.principal_axes()
        torch.testing.assert_close(axes.T @ axes, torch.eye(layer.rank))
        components = layer.b.detach().flatten(1) @ axes
        norms = torch.linalg.svdvals(layer.b.detach().flatten(1))
        expected = torch.diag(torch.nn.functional.pad(norms, (0, layer.rank - len(norms))).square())
        torch.testing.assert_close(components.T @ components, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_what_stays_gives_the_output_of_components_that_were_zeroed(options: dict[str, Any]) -> None:
    model, x = adapted(**options), torch.randn(2, 3, 8, 8)
    kept = {"conv": [1, 3], "inner.proj": [0], "proj": [0, 1, 2, 3]}
    zeroed = copy.deepcopy(model)
    for layer in ranked_layers(zeroed):
        for index in set(range(4)) - set(kept[layer.name]):
            layer.b.data[:, index] = 0
    for layer in ranked_layers(model):
        layer.keep(torch.eye(4)[:, kept[layer.name]], [])
    assert layer_ranks(model) == {"conv": 2, "inner.proj": 1, "proj": 4}
    torch.testing.assert_close(model(x), zeroed(x), rtol=1e-6, atol=1e-6)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_files_give_the_same_output_in_plain_peft(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    base, x = Net(), torch.randn(2, 3, 8, 8)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj", "conv"], **options)
    model = inject(copy.deepcopy(base), config, ())
    for layer in ranked_layers(model):
        nn.init.normal_(layer.b)
    layers = ranked_layers(model)
    for layer, rank in zip(layers, (1, 3, 2), strict=True):
        layer.keep(torch.eye(4)[:, :rank], [])
    note_ranks(layers)
    PeftFormat().write(AdapterFiles(adapter_state(model), plain_config(config)), tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("options", VARIANTS)
def test_components_of_all_axes_give_the_same_output(options: dict[str, Any]) -> None:
    model, x = adapted(**options), torch.randn(2, 3, 8, 8)
    before = model(x)
    for layer in ranked_layers(model):
        layer.keep(layer.principal_axes(), [])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_optimizer_state_is_projected_with_the_weights() -> None:
    model, x = adapted(), torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    layer = ranked_layers(model)[0]
    before = copy.deepcopy(optimizer.state[layer.b])
    weights = layer.b.detach().clone()
    numel = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    axes = torch.linalg.qr(torch.randn(4, 2)).Q
    (_, of_b) = layer.keep(axes, [optimizer])
    # Of a convolution's weight, (out, r, 1, 1).
    torch.testing.assert_close(layer.b[..., 0, 0], weights[..., 0, 0] @ axes)
    assert of_b.parameter is layer.b
    state = optimizer.state[layer.b]
    torch.testing.assert_close(state["exp_avg"][..., 0, 0], before["exp_avg"][..., 0, 0] @ axes)
    # A mean of squares cannot become negative.
    torch.testing.assert_close(state["exp_avg_sq"][..., 0, 0], before["exp_avg_sq"][..., 0, 0] @ axes.square())
    assert state["step"] == before["step"]
    after = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert numel - after == 2 * 2 * layer.component_parameters
    model(x).square().sum().backward()
    optimizer.step()


def test_a_state_of_another_shape_is_an_error() -> None:
    model, x = adapted(), torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    model(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="Adafactor keeps row_var as "):
        ranked_layers(model)[1].keep(torch.eye(4)[:, :1], [optimizer])


def test_ranks_in_the_config_are_those_of_each_layer() -> None:
    model = adapted()
    layers = ranked_layers(model)
    for layer, rank in zip(layers, (1, 2, 3), strict=True):
        layer.keep(torch.eye(4)[:, :rank], [])
    note_ranks(layers)
    config = model.peft_config["default"]
    assert config.rank_pattern == {"conv": 1, "inner.proj": 2, "^proj": 3}
    assert config.alpha_pattern == {"conv": 1.5, "inner.proj": 3.0, "^proj": 4.5}


def test_ranks_that_the_config_has_are_not_written_again() -> None:
    pattern = {"proj": 2}
    model = adapted(rank_pattern=pattern)
    note_ranks(ranked_layers(model))
    assert model.peft_config["default"].rank_pattern == pattern
    ranked_layers(model)[1].keep(torch.eye(2)[:, :1], [])
    note_ranks(ranked_layers(model))
    assert model.peft_config["default"].rank_pattern == {"conv": 4, "inner.proj": 1, "^proj": 2}


def test_alpha_of_rslora_grows_with_the_root_of_the_rank() -> None:
    layer = ranked_layers(adapted(use_rslora=True))[0]
    layer.keep(torch.eye(4)[:, :1], [])
    assert layer.layer.lora_alpha["default"] == pytest.approx(6 / math.sqrt(4))


def test_other_methods_are_refused() -> None:
    with pytest.raises(UserError, match="the adapter is LoHaConfig"):
        ranked_layers(get_peft_model(Net(), LoHaConfig(r=2, target_modules=["proj"])))


def test_variants_with_further_tensors_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["proj"], kasa_config=KasaConfig())
    with pytest.raises(UserError, match="the adapter sets kasa_config"):
        ranked_layers(get_peft_model(Net(), config))


def test_bytes_of_a_file_are_known_without_writing_it(tmp_path: Path) -> None:
    state = adapter_state(adapted())
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert safetensors_bytes(state) == (tmp_path / "x.safetensors").stat().st_size
