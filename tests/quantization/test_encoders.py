"""Text encoders that are quantized while transformers reads them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from lit_lora.distributed.node import Node
from lit_lora.errors import UserError
from lit_lora.quantization import FP8, NF4, Dense, Int8, Quantization
from lit_lora.quantization.encoders import load_encoder
from lit_lora.quantization.frozen_layer import freeze_layer, quantized_layers
from lit_lora.quantization.load import load_part
from lit_lora.quantization.weight_change import WeightChange

IDS = torch.tensor([[3, 1, 4, 1, 5, 0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 in several files."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    place = tmp_path_factory.mktemp("t5")
    T5EncoderModel(config).save_pretrained(place / "text_encoder", max_shard_size="20KB")
    assert len(list((place / "text_encoder").glob("*.safetensors"))) > 1
    return place


def load(folder: Path, quantization: Quantization | None = None, **options: Any) -> Any:
    dtype = options.pop("dtype", torch.float32)
    return load_encoder(T5EncoderModel, str(folder), "text_encoder", dtype, quantization=quantization, **options).eval()


@pytest.mark.parametrize("quantization", [Int8(), FP8(), NF4()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_that_of_quantizing_after_loading(
    quantization: Quantization, dtype: torch.dtype, folder: Path
) -> None:
    ours, theirs = load(folder, quantization, dtype=dtype), load(folder, dtype=dtype)
    for layer in [layer for layer in theirs.modules() if type(layer) is torch.nn.Linear]:
        freeze_layer(layer, quantization, layer.weight.detach(), layer.weight.dtype)
    with torch.no_grad():
        assert torch.equal(ours(IDS)[0], theirs(IDS)[0])
    assert len(quantized_layers(ours)) == len(quantized_layers(theirs)) == 14
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))


class Counting(Int8):
    """Notes how many weights in full precision are in memory when each weight is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        self.seen.append(weakref.ref(weight))
        self.alive.append(sum(one() is not None for one in self.seen))
        return super().quantize(weight)


def test_one_weight_at_a_time_is_in_full_precision(folder: Path) -> None:
    counting = Counting()
    model = load(folder, counting)
    assert counting.alive == [1] * 14
    assert all(one() is None for one in counting.seen)
    assert all(type(layer).__name__ == "FrozenLinear" for layer in quantized_layers(model))


def test_patterns_begin_with_the_name_in_the_pipeline(folder: Path) -> None:
    skipped = load(folder, Int8(skip=["text_encoder_2.*.wo"]), name="text_encoder_2")
    assert len(quantized_layers(skipped)) == 12
    assert quantized_layers(load(folder, Int8(skip=["text_encoder_2.*"]), name="text_encoder_2")) == []
    assert len(quantized_layers(load(folder, Int8(skip=["text_encoder_2.*"]), name="text_encoder"))) == 14
    assert quantized_layers(load(folder, Dense())) == []


def test_the_model_can_be_moved_and_is_not_quantized_to_transformers(folder: Path) -> None:
    model = load(folder, Int8()).to("cpu")
    assert model.dtype == torch.float32
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")


def test_weights_are_changed_before_they_are_quantized(folder: Path) -> None:
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    double = WeightChange("an adapter", lambda weight: 2 * weight)
    changes = {f"{name}.weight": double, "encoder.final_layer_norm.weight": double}
    plain, changed = load(folder, Int8()), load(folder, Int8(), changes=changes)
    assert torch.equal(changed.get_submodule(name).weight, 2 * plain.get_submodule(name).weight)
    assert torch.equal(changed.encoder.final_layer_norm.weight, 2 * plain.encoder.final_layer_norm.weight)
    assert set(changes) == {f"{name}.weight", "encoder.final_layer_norm.weight"}
    with pytest.raises(UserError, match="an adapter changes 1 of 1 weights that T5EncoderModel does not have"):
        load(folder, Int8(), changes={"nothing.weight": double})


def test_a_base_that_is_quantized_already(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"text_encoder of .* is quantized already; leave .*text_encoder_quantization out"
    ):
        load(tmp_path, Int8())


class Other(Node):
    """A process that gets what another one has read."""

    def __init__(self, sent: dict[str, Tensor]) -> None:
        super().__init__()
        self.sent = sent

    def read(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.sent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_process_that_does_not_read_gets_the_same_model(dtype: torch.dtype, folder: Path) -> None:
    quantization = NF4(skip=["text_encoder.*.k"])
    read = load(folder, quantization, dtype=dtype)
    sent = dict([*read.named_parameters(remove_duplicate=False), *read.named_buffers(remove_duplicate=False)])
    other = load_part(
        T5EncoderModel, str(folder), "text_encoder", dtype, Other(sent), load_encoder, quantization=quantization
    )
    assert {n: (v.dtype, v.shape) for n, v in other.state_dict().items()} == {
        n: (v.dtype, v.shape) for n, v in read.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(other(IDS)[0], read(IDS)[0])


def test_options_are_shown_as_they_are_written() -> None:
    assert repr(NF4(skip=["a.*"])) == "NF4(block_size=64, double_quant=True, skip=('a.*',))"
    assert repr(FP8()) == "FP8(format='e4m3fn', skip=())"
    assert repr(Dense()) == "Dense()"
