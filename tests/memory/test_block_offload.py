"""Frozen blocks in host memory: the same gradients, at most two blocks on the device, the next one on the way."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import HRAConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from lit_lora.memory.block_offload import BlockOffload
from lit_lora.memory.checkpointing import enable_gradient_checkpointing
from lit_lora.memory.host_weights import HostWeights
from lit_lora.quantization import NF4, W8A8, Dense, Int8, Quantization
from lit_lora.quantization.frozen_layer import FrozenLayer, freeze_layer
from tests.helpers import freeze_remaining, tiny_unet

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
LORA = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)


class Copies:
    """Watches copies, and spoils weights that are read where they are not in use."""

    def __init__(self) -> None:
        self.alive: dict[int, HostWeights] = {}
        self.most = 0
        self.fetched: list[HostWeights] = []

    def watch(self, weights: HostWeights) -> None:
        self.fetched.append(weights)
        for copy_ in weights._copies:
            storage = copy_.untyped_storage()
            self.alive[storage._cdata] = weights
            weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, len(set(self.alive.values())))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    watched = Copies()
    fetch, drop = HostWeights.fetch, HostWeights.drop

    def fetch_watched(self: HostWeights, device: torch.device, stream: Any = None) -> None:
        if not self.is_on_device:
            fetch(self, device, stream)
            watched.watch(self)

    def drop_spoiled(self: HostWeights) -> None:
        if self.is_on_device:
            drop(self)
            self._show([spoiled(tensor) for tensor in self._host])

    monkeypatch.setattr(HostWeights, "fetch", fetch_watched)
    monkeypatch.setattr(HostWeights, "drop", drop_spoiled)
    return watched


def spoiled(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 77)


def make_model(config: PeftConfig = LORA, quantization: Quantization | None = None) -> nn.Module:
    torch.manual_seed(5)
    model = tiny_unet().requires_grad_(False)
    if quantization is not None:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and "time_emb" not in name:
                freeze_layer(layer, quantization, layer.weight.detach(), torch.float32)
    freeze_remaining(model)
    adapted: nn.Module = get_peft_model(model, copy.deepcopy(config))  # type: ignore[arg-type]
    return adapted


def offloaded(model: nn.Module) -> BlockOffload:
    """With a start on the device that each block has left, so that host tensors are spoiled."""
    offload = BlockOffload(model, BLOCKS, smallest_bytes=0)
    for block in offload._blocks:
        block.fetch(torch.device("cpu"))
        block.drop()
    return offload


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }


def train(model: nn.Module, steps: int = 2, between: Callable[[], Any] = lambda: None) -> list[Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):  # gradients accumulate
            model(**inputs(10 * step + part)).sample.square().mean().backward()
            between()
        optimizer.step()
    return [p.grad for p in model.parameters() if p.grad is not None] + [
        p.detach().clone() for p in model.parameters() if p.requires_grad
    ]


def assert_equal(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", [False, True, ["up_blocks.*"]], ids=["plain", "checkpointed", "partly checkpointed"])
@pytest.mark.parametrize("quantization", [Dense(), Int8(), W8A8(), NF4()], ids=lambda s: type(s).__name__)
def test_training_is_the_same(quantization: Quantization, which: bool | list[str], copies: Copies) -> None:
    expected = train(make_model(quantization=quantization))
    model = make_model(quantization=quantization)
    enable_gradient_checkpointing(model, which)
    offload = offloaded(model)
    assert_equal(train(model), expected)
    assert copies.most == 2
    offload.release()
    assert copies.alive == {}


def test_a_method_that_saves_weights_for_its_backward_pass(copies: Copies) -> None:
    config = HRAConfig(r=2, target_modules=["to_q", "conv1"], init_weights=False)
    expected = train(make_model(config))
    model = make_model(config)
    offloaded(model)
    assert_equal(train(model), expected)


def test_images_and_validation_in_between(copies: Copies) -> None:
    expected = train(make_model())
    model = make_model()
    offloaded(model)
    reference = make_model().eval()
    drawn = []

    def draw() -> None:
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                model.eval()
                drawn.append(model(**inputs(99)).sample.clone())
                model(**inputs(98))
                model.train()

    with torch.no_grad():
        first = reference(**inputs(99)).sample
    draw()
    assert torch.equal(drawn[0], first)
    assert torch.equal(drawn[1], first)
    assert_equal(train(model, between=draw), expected)
    assert copies.most == 2


def test_several_forward_passes_and_then_a_backward_pass(copies: Copies) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        (model(**inputs(0)).sample * model(**inputs(1)).sample).mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model = make_model()
    offloaded(model)
    assert_equal(gradients(model), gradients(make_model()))
    assert copies.most == 2


class Chain(nn.Module):
    """Blocks in a row, of which a pass may skip some."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.skipped: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number not in self.skipped:
                x = block(x)[0]
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.shift = nn.Parameter(torch.zeros(8))
        self.resident: list[list[int]] = []

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.norm(torch.tanh(self.linear(x)) + self.shift), None


@pytest.fixture
def chain() -> Chain:
    model = Chain()
    freeze_remaining(model)
    for block in model.blocks:
        block.linear.requires_grad_(False)  # type: ignore[union-attr]
    return model


class Uses:
    """Which blocks are on the device whenever a layer is used."""

    def __init__(self, chain: Chain, offload: BlockOffload) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        for number, block in enumerate(chain.blocks):
            layer: Any = block.linear
            layer.input_gradient = self._watch(layer.input_gradient, number, offload)
            layer.output = self._watch(layer.output, number, offload)

    def _watch(self, function: Any, number: int, offload: BlockOffload) -> Any:
        def watched(*args: Any) -> Any:
            made = function(*args)
            self.seen.append((number, [i for i, block in enumerate(offload._blocks) if block.is_on_device]))
            return made

        return watched

    def take(self) -> list[tuple[int, list[int]]]:
        seen, self.seen = self.seen, []
        return seen


def test_the_next_block_is_on_the_way(chain: Chain) -> None:
    uses = Uses(chain, BlockOffload(chain, ["Block"], smallest_bytes=0))
    x = torch.randn(2, 8).requires_grad_()
    loss = chain(x).sum()
    assert uses.take() == [(0, [0]), (1, [1]), (2, [2]), (3, [3]), (4, [4])]  # nothing is known yet
    loss.backward()
    assert uses.take() == [(4, [3, 4]), (3, [2, 3]), (2, [1, 2]), (1, [0, 1]), (0, [0])]
    for _ in range(2):
        loss = chain(x).sum()
        assert uses.take() == [(0, [0, 1]), (1, [1, 2]), (2, [2, 3]), (3, [3, 4]), (4, [3, 4])]
        loss.backward()
        assert uses.take() == [(4, [3, 4]), (3, [2, 3]), (2, [1, 2]), (1, [0, 1]), (0, [0, 1])]
    with torch.no_grad():
        for _ in range(3):
            chain(x)
    assert uses.take()[-5:] == [(0, [0, 1]), (1, [1, 2]), (2, [2, 3]), (3, [3, 4]), (4, [0, 4])]


def test_blocks_that_are_recomputed_together(chain: Chain) -> None:
    def gradient() -> Tensor:
        x = torch.arange(16.0).view(2, 8).requires_grad_()
        torch.utils.checkpoint.checkpoint(chain, x, use_reentrant=False).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    uses = Uses(chain, BlockOffload(chain, ["Block"], smallest_bytes=0))
    for _ in range(2):
        assert torch.equal(gradient(), expected)
        seen = uses.take()
        assert [number for number, _ in seen] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
        assert all(number in resident and len(resident) <= 2 for number, resident in seen)
    assert [resident for _, resident in seen[5:]] == [
        *([0, 1], [1, 2], [2, 3], [3, 4], [3, 4]),
        *([3, 4], [2, 3], [1, 2], [0, 1], [0, 1]),
    ]


def test_blocks_that_a_pass_skips(chain: Chain, copies: Copies) -> None:
    def gradients(model: Chain) -> list[Tensor]:
        x = torch.arange(16.0).view(2, 8).requires_grad_()
        result = []
        for skipped in (set(), {1}, {0, 4}, {2, 3}, set()):
            model.skipped = skipped
            model(x).square().sum().backward()
            assert x.grad is not None
            result.append(x.grad.clone())
        return result

    expected = gradients(copy.deepcopy(chain))
    offload = offloaded_chain(chain)
    assert_equal(gradients(chain), expected)
    assert copies.most == 2
    assert offload.device_bytes == 2 * 8 * 8 * 4
    assert offload.host_bytes == 5 * 8 * 8 * 4


def offloaded_chain(chain: Chain) -> BlockOffload:
    return BlockOffload(chain, ["Block"], smallest_bytes=0)


def test_the_model_moves_and_its_offloaded_weights_do_not(chain: Chain) -> None:
    before = list(chain.state_dict())
    offload = offloaded_chain(chain)
    chain(torch.randn(2, 8))
    assert any(block.is_on_device for block in offload._blocks)
    chain.to(torch.float64)
    assert not any(block.is_on_device for block in offload._blocks)
    for name, parameter in chain.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("linear.weight") else torch.float64)
    assert list(chain.state_dict()) == before


def test_a_move_says_where_the_weights_go(chain: Chain) -> None:
    offload = offloaded_chain(chain)
    chain.to("meta")  # a device that this machine has
    assert offload.device == torch.device("meta")
    for name, parameter in chain.named_parameters():
        assert parameter.is_meta != name.endswith("linear.weight")
    chain.half()
    assert offload.device == torch.device("meta")
    chain.to_empty(device="cpu")
    assert offload.device == torch.device("cpu")


def test_small_and_trained_tensors_go_with_the_model(chain: Chain) -> None:
    chain.blocks[1].linear.requires_grad_()  # type: ignore[union-attr]
    assert BlockOffload(chain, ["Block"], smallest_bytes=257).host_bytes == 0
    assert BlockOffload(chain, ["Block"], smallest_bytes=256).host_bytes == 4 * 256


def test_weights_are_asked_for_outside_a_pass(chain: Chain, copies: Copies) -> None:
    layer = chain.blocks[2].linear
    assert isinstance(layer, FrozenLayer)
    expected = layer.weight.clone()
    offload = offloaded_chain(chain)
    chain(torch.randn(2, 8))
    assert torch.equal(layer.weight, expected)
    offload.release()
    assert layer._parameters["weight"].isnan().all()  # type: ignore[union-attr]  # spoiled by the fixture
    assert torch.equal(layer.weight, expected)


def test_a_layer_that_is_used_without_its_block(chain: Chain, copies: Copies) -> None:
    """Neither pass goes through the block's own forward."""

    def gradient(model: Chain) -> Tensor:
        x = torch.arange(16.0).view(2, 8).requires_grad_()
        y = model(x)
        for number in (3, 0):
            y = model.blocks[number].linear(y)  # type: ignore[operator, union-attr]
        y.square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient(copy.deepcopy(chain))
    offloaded_chain(chain)
    assert torch.equal(gradient(chain), expected)
    assert copies.most == 2
