from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lit_lora.errors import UserError
from lit_lora.planning.device import find_device, is_here
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.tools.training.choices import Settings
from lit_lora.tools.training.memory import (
    Fit,
    first_guess,
    first_true,
    fit_memory,
    free_memory,
    in_files,
)

SETTINGS = Settings(1024, False, 2, batch_size=4, accumulate=1, steps=100, rank=16, lr=1e-4)


def _needed(settings: Settings) -> int:
    """A memory that falls with each saving."""
    base = {None: 50, "Int8": 30, "NF4": 20}[settings.quantization] - 15 * settings.offload_blocks
    return base + settings.batch_size * (2 if settings.gradient_checkpointing else 10)


def _plan(settings: Settings) -> MemoryPlan:
    phases = {"forward": {"adapter": _needed(settings)}, "sampling": {"adapter": _needed(settings) + 9}}
    return MemoryPlan(
        "H100",
        settings.batch_size,
        phases,
        beside={},
        height=1024,
        width=1024,
        adapter_parameters=1,
        adapter_file_bytes=1,
        flops_per_step=1,
        seconds_per_step=1.0,
        host_bytes=25 * settings.offload_blocks * (settings.offload_folder is None),
    )


def _fit(memory: int, on_gpu: bool = True, start: int = 1) -> tuple[Fit, list[str]]:
    said: list[str] = []

    return fit_memory(SETTINGS, _plan, memory, on_gpu, start, said.append), said


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize(
    ("memory", "quantization", "batch", "draws"),
    [
        (1000, None, 4, True),
        (99, None, 4, True),
        (90, None, 4, False),
        (67, None, 4, True),
        (58, None, 4, False),
        (52, None, 1, False),
        (41, "Int8", 1, True),
        (31, "NF4", 1, True),
        (22, "NF4", 1, False),
        (7, "NF4", 1, False),
    ],
)
def test_the_cheapest_settings_that_fit(
    memory: int, quantization: str | None, batch: int, draws: bool, start: int
) -> None:
    (settings, plan, names), said = _fit(memory, start=start)
    assert (settings.quantization, settings.batch_size, settings.draws) == (quantization, batch, draws)
    assert settings.batch_size * settings.accumulate == 4
    assert plan.needed == _needed(settings) + 9 * draws <= memory
    assert settings.gradient_checkpointing == (memory < 90)
    assert settings.offload_blocks == ("blocks offloaded" in names) == (memory < 22)
    assert ("Int8" in names, "NF4" in names) == (quantization == "Int8", quantization == "NF4")
    assert len(said) <= 6


def test_offloading_is_for_gpus() -> None:
    assert not _fit(61, on_gpu=False)[0].settings.offload_encoders
    with pytest.raises(UserError, match=r"nothing fits into 7 B: the run needs 22 B even with .*NF4 base"):
        _fit(7, on_gpu=False)


def test_blocks_in_files() -> None:
    fit, _ = _fit(21)
    assert fit.plan.host_bytes == 25
    changed = in_files(fit, _plan, "runs/a")
    assert changed.settings == replace(fit.settings, offload_folder="runs/a")
    assert changed.plan.needed == fit.plan.needed
    assert changed.plan.host_bytes == 0


def test_the_memory_of_another_gpu_is_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 80))
    for here in (find_device("H100"), replace(find_device("H100"), name="NVIDIA H100 80GB HBM3", memory=79)):
        assert (is_here(here), free_memory(here)) == (True, 5)
    assert (is_here(find_device("RTX 3060")), free_memory(find_device("RTX 3060"))) == (False, 12_000_000_000)
    assert is_here(find_device("cpu"))
    assert free_memory(find_device("cpu")) > 1_000_000


def test_nothing_fits() -> None:
    with pytest.raises(
        UserError, match=r"nothing fits into 6 B: .* Free some memory, or take a smaller base or a lower"
    ):
        _fit(6)


@pytest.mark.parametrize("answer", [*range(8), None])
def test_the_first_that_holds(answer: int | None) -> None:
    for start in (0, 3, 7, 20):
        assert first_true(lambda number: answer is not None and number >= answer, 8, start) == answer


def test_the_rung_to_begin_with() -> None:
    assert [first_guess(int(memory), False) for memory in (80e9, 24e9, 8e9)] == [0, 1, 2]
    assert first_guess(int(8e9), True) == 0
