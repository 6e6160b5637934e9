"""Operations whose outcome is known give the same tensors as torch's own mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_lora.planning import known_calls
from lit_lora.planning.fake_module import fake_tensors

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "_KNOWN", {})


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda x: x.half() @ x.half().t(),
    "view": lambda x: x[1:, ::2].t(),
    "views of one tensor": lambda x: x.split(2),
    "unsafe view": lambda x: aten._unsafe_view(x, [6, 4]),
    "in place": lambda x: x.mul_(2),
    "several": lambda x: torch.native_layer_norm(x, [6], None, None, 1e-5),
    "other layout": lambda x: x.t().clone(),
    "scalar kinds": lambda x: (x.int() * 2, x.int() * 2.0, x.int() * True),
    "expanded": lambda x: x[:1].expand(4, 6) + 0.0,
}


def described(made: Any, x: Tensor) -> list[Any]:
    outputs = made if isinstance(made, tuple | list) else [made]
    return [
        (
            *(one.dtype, one.shape, one.stride(), one.storage_offset(), one.device, one.untyped_storage().nbytes()),
            *(one is x, one.untyped_storage()._cdata == x.untyped_storage()._cdata, torch._C._dispatch_key_set(one)),
        )
        for one in outputs
    ]


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_gives_the_same(name: str) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6)
        expected = described(CALLS[name](x), x)
    for _ in range(3):
        with fake_tensors():
            x = torch.empty(4, 6)
            assert described(CALLS[name](x), x) == expected


def test_a_known_call_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_tensors():
        x = torch.empty(4, 6)
        aten.mm(x, x.t())
        monkeypatch.setattr(FakeTensorMode, "dispatch", lambda *_: pytest.fail("called again"))
        assert aten.mm(torch.empty(4, 6), x.t()).shape == (4, 4)


def test_changes_of_an_arguments_metadata_are_made_each_time() -> None:
    with fake_tensors():
        for _ in range(2):
            x = torch.empty(4, 6)
            x.t_()
            assert x.shape == (6, 4)
            x.resize_(2, 3)
            assert x.shape == (2, 3)


def test_values_of_tensors_that_have_them_are_kept() -> None:
    with fake_tensors():
        assert [torch.tensor(value).add(0).dtype for value in (1, 1.0)] == [torch.int64, torch.float32]
        assert [torch.tensor(value).item() for value in (2, 3)] == [2, 3]


def test_gradients_have_the_shapes_of_their_parameters() -> None:
    for _ in range(2):
        with fake_tensors():
            weight = torch.nn.Parameter(torch.empty(3, 6))
            with torch.autocast("cpu", torch.bfloat16):
                output = torch.nn.functional.linear(torch.empty(4, 6), weight)
            assert output.dtype == torch.bfloat16
            output.float().square().mean().backward()
            assert weight.grad is not None
            assert (weight.grad.shape, weight.grad.dtype) == (weight.shape, torch.float32)
