"""Merging adapters into one, whose outputs are those of the weighted sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig

from lit_lora.adapter_tools.merge import merge
from lit_lora.adapter_tools.named_adapter import NamedAdapter
from lit_lora.errors import UserError
from lit_lora.families import Flux, StableDiffusion
from lit_lora.formats import AdapterFiles, write_adapter
from lit_lora.formats.find import read_adapter
from tests.adapter_tools.layers import adapter, base, config, images, layers_of, loaded
from tests.formats.adapters import encoder_adapter

ONE = adapter(config(), seed=1)
TWO = adapter(
    config(r=2, lora_alpha=8, use_rslora=True, rank_pattern={"linear": 3}, target_modules=["linear", "conv"]), seed=2
)


def merged(*sources: AdapterFiles, weights: tuple[float, ...] = (0.7, -0.3), **options: Any) -> AdapterFiles:
    named = [
        NamedAdapter(f"adapter {i}", one, weight) for i, (one, weight) in enumerate(zip(sources, weights, strict=True))
    ]
    return merge(named, **options)


def deltas(files: AdapterFiles) -> dict[str, torch.Tensor]:
    return {name: layer.delta() for name, layer in layers_of(files).items()}


def weighted_sum(name: str) -> torch.Tensor:
    one, two = deltas(ONE)[name], deltas(TWO).get(name)
    return 0.7 * one if two is None else 0.7 * one - 0.3 * two


def test_the_exact_sum_of_different_ranks_alphas_and_layers() -> None:
    done = merged(ONE, TWO)
    layers = layers_of(done)
    # The linear layer has 8 inputs, and the rank of the sum could be 7.
    assert {name: layer.rank for name, layer in layers.items()} == {
        "conv": 6,
        "grouped": 4,
        "linear": 7,
        "pointwise": 4,
    }
    for name, layer in layers.items():
        assert layer.scale == 1
        torch.testing.assert_close(layer.delta(), weighted_sum(name), rtol=0, atol=1e-6)


def test_plain_peft_computes_with_the_sum() -> None:
    sources = [adapter(config(target_modules=["conv", "linear", "pointwise"]), seed=1), TWO]
    done = merged(*sources)
    expected = base()
    for files, weight in zip(sources, (0.7, -0.3), strict=True):
        for name, delta in deltas(files).items():
            expected.get_submodule(name).weight.data += weight * delta
    torch.testing.assert_close(loaded(done)(images()), expected(images()), rtol=0, atol=1e-5)


def test_a_rank_gives_the_best_approximation_of_the_sum() -> None:
    done = merged(ONE, TWO, rank=3)
    for name, layer in layers_of(done).items():
        full = weighted_sum(name).double().reshape(layer.groups, -1, layer.down[0].numel())
        left, values, right = torch.linalg.svd(full, full_matrices=False)
        count = min(3 // layer.groups, values.shape[-1])
        best = (left[..., :count] * values[:, None, :count]) @ right[:, :count]
        assert layer.rank == count * layer.groups
        torch.testing.assert_close(layer.delta().double(), best.reshape(layer.weight_shape), rtol=0, atol=1e-6)


def test_ranks_never_exceed_the_layer() -> None:
    wide = [adapter(config(r=6, target_modules=["linear"]), seed=seed) for seed in (1, 2)]
    layer = layers_of(merged(*wide))["linear"]
    assert layer.rank == 8  # of 8 inputs
    torch.testing.assert_close(layer.delta(), 0.7 * deltas(wide[0])["linear"] - 0.3 * deltas(wide[1])["linear"])


def test_an_adapter_alone_is_scaled() -> None:
    done = merged(ONE, weights=(0.5,))
    for name, delta in deltas(done).items():
        torch.testing.assert_close(delta, 0.5 * deltas(ONE)[name], rtol=0, atol=1e-7)


def test_the_widest_dtype_wins_unless_one_is_named() -> None:
    half = replace(ONE, state={key: value.bfloat16() for key, value in ONE.state.items()})
    assert {value.dtype for value in merged(half, half).state.values()} == {torch.bfloat16}
    mixed = merged(half, TWO)
    assert mixed.state["base_model.model.linear.lora_A.weight"].dtype == torch.float32
    expected = 0.7 * deltas(half)["linear"] - 0.3 * deltas(TWO)["linear"]
    torch.testing.assert_close(deltas(mixed)["linear"], expected, rtol=0, atol=1e-6)
    assert {value.dtype for value in merged(half, TWO, dtype=torch.float16).state.values()} == {torch.float16}


def test_values_beyond_the_range_of_the_dtype() -> None:
    with pytest.raises(
        UserError, match=r"lora_B of conv would reach \S+, and float16 holds at most 65504; use bfloat16"
    ):
        merged(ONE, TWO, weights=(1e6, 1), dtype=torch.float16)
    with pytest.raises(UserError, match=r"lora_B of conv would reach \S+ at most, which float16 rounds to zero"):
        merged(ONE, TWO, weights=(1e-9, 1e-9), dtype=torch.float16)
    zero = merged(ONE, TWO, weights=(0, 0), dtype=torch.float16)
    assert not any(delta.any() for delta in deltas(zero).values())


def test_the_result_is_a_file_of_the_common_base(tmp_path: Path) -> None:
    encoder = {"text_encoder": encoder_adapter()}
    told = {"ss_steps": "4", "modelspec.title": "x"}
    sources = (replace(ONE, metadata=told, family=StableDiffusion), replace(TWO, metadata={**told, "ss_steps": "5"}))
    done = merged(sources[0], replace(sources[1], text_encoders=encoder))
    assert (done.family, done.metadata) == (StableDiffusion, {"modelspec.title": "x"})
    assert done.config["base_model_name_or_path"] == "a base"
    write_adapter(done, tmp_path)
    read = read_adapter(tmp_path)
    layer = "base_model.model.text_model.encoder.layers.1.self_attn.out_proj"
    part, before = read.text_encoders["text_encoder"], encoder["text_encoder"]
    delta = part.state[f"{layer}.lora_B.weight"] @ part.state[f"{layer}.lora_A.weight"]
    full = before.state[f"{layer}.lora_B.weight"] @ before.state[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(delta, -0.3 * full / 2)


def with_base(files: AdapterFiles, name: str | None, family: Any = None) -> AdapterFiles:
    return replace(files, config={**files.config, "base_model_name_or_path": name}, family=family)


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (ONE, with_base(TWO, "another"), "says that its base is 'a base', and adapter 1 'another'; .*name it with --base"),
        (with_base(ONE, "x", StableDiffusion), with_base(TWO, "x", Flux), "adapter of StableDiffusion and adapter 1 of Flux"),
        (ONE, with_base(TWO, None), "adapter 1 tells neither its base nor its family"),
        (ONE, adapter(LoHaConfig(r=2, target_modules=["linear"])), "adapter 1 cannot be used here: it is LOHA"),
        (ONE, adapter(config(use_dora=True, target_modules=["linear"])), "adapter 1 is DoRA, whose magnitudes"),
    ],
)  # fmt: skip
def test_what_does_not_add_up(one: AdapterFiles, two: AdapterFiles, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merged(one, two)


def of_layer(layer: str, width: int, **options: Any) -> AdapterFiles:
    tensors = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(width, 2)}
    state = {f"base_model.model.{layer}.{name}": value for name, value in tensors.items()}
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [layer]}
    return AdapterFiles(state, plain, **options)


def test_layers_of_other_families() -> None:
    sd = of_layer("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 8, family=StableDiffusion)
    flux = of_layer("single_transformer_blocks.0.proj_mlp", 8)
    joint = of_layer("transformer_blocks.0.attn.to_q", 8)
    pixart = of_layer("transformer_blocks.0.attn1.to_q", 8)
    with pytest.raises(UserError, match=r"adapter 1 is an adapter of .*Flux.*, not of StableDiffusion"):
        merged(sd, flux, base="embedded")
    with pytest.raises(UserError, match=r"adapter 0 of .*Flux.* and adapter 1 of PixArtSigma.* of different families"):
        merged(flux, pixart, base="one")
    merged(flux, joint, base="one")  # FLUX.1 has both


def test_bases_that_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    paths = str(tmp_path / "base"), str(tmp_path / "x" / ".." / "base")
    (tmp_path / "x").mkdir()
    merged(with_base(ONE, paths[0]), with_base(TWO, paths[1]))
    merged(with_base(ONE, None, Flux), with_base(TWO, "told", Flux))
    done = merged(ONE, with_base(TWO, "another"), base="the same")
    assert done.config["base_model_name_or_path"] == "the same"


def test_layers_of_other_shapes() -> None:
    other = {
        key: torch.randn(4, 9) if key.endswith("linear.lora_A.weight") else value for key, value in ONE.state.items()
    }
    with pytest.raises(
        UserError, match=r"linear has an update of the shape \(10, 8\) with 1 groups in the first and \(10, 9\)"
    ):
        merged(ONE, replace(ONE, state=other))


def test_a_rank_above_the_sum() -> None:
    with pytest.raises(UserError, match="rank=9 is above 7, the highest sum of the adapters' ranks"):
        merged(ONE, TWO, rank=9)
    with pytest.raises(UserError, match="the weight nan of adapter 0 is not finite"):
        merged(ONE, weights=(float("nan"),))


def test_the_weight_of_new_tokens_is_told() -> None:
    rows = {"<cat>": {"text_encoder": torch.ones(1, 4)}}
    with pytest.warns(
        UserWarning, match="new tokens <cat> of adapter 0 are kept as they are: the weight 0.7 is that of its"
    ):
        done = merged(replace(ONE, new_tokens=rows), TWO)
    assert torch.equal(done.new_tokens["<cat>"]["text_encoder"], torch.ones(1, 4))
