"""What strategies are refused, and what the error says."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry

from lit_lora.distributed import (
    LitLoraDeepSpeed,
    LitLoraFSDP,
    check_strategy,
    check_strategy_name,
    shards_weights,
)
from lit_lora.distributed.check import check_elementwise, check_ranks
from lit_lora.distributed.collectives import time_limit
from lit_lora.errors import UserError
from tests.distributed.scenarios import STRATEGIES


@pytest.mark.parametrize("made", [FSDPStrategy, ModelParallelStrategy])
def test_stock_strategies_are_refused_with_the_replacement(made: Any) -> None:
    with pytest.raises(UserError, match="use strategy lit_lora_fsdp"):
        check_strategy(made())


def test_numbers_of_processes_and_nodes_that_a_run_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    of_torchrun = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    check_ranks(of_torchrun)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(
        UserError, match=r"this is process 2 of a run with 2, whose numbers are 0 to 1: .*RANK and WORLD_SIZE"
    ):
        check_ranks(of_torchrun)
    by_hand = DDPStrategy(cluster_environment=LightningEnvironment())
    with pytest.raises(UserError, match=r"this is node 1 of a run with 1, .*trainer.num_nodes"):
        check_ranks(by_hand)
    by_hand.num_nodes = 2
    check_ranks(by_hand)


def test_optimizers_that_cannot_step_shards_are_refused() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    check_elementwise(torch.optim.AdamW(weights))
    with pytest.raises(UserError, match=r"Muon is not known to update each element by itself, .* or strategy ddp"):
        check_elementwise(torch.optim.Muon(weights))
    rprop = torch.optim.Rprop(weights)
    check_elementwise(rprop)
    with pytest.raises(UserError, match="Rprop uses an operation that torch does not have for sharded tensors"):
        check_elementwise(rprop, tensors=True)


@pytest.mark.parametrize(("name", "told"), [("dpp", "did you mean ddp?"), ("fdsp", "; the strategies are auto, ddp, ")])
def test_an_unknown_name_is_told_with_those_that_work(name: str, told: str) -> None:
    with pytest.raises(UserError, match=f"strategy='{name}' is not known; ") as error:
        check_strategy_name(name)
    assert told in str(error.value)
    assert "deepspeed_stage_2_offload" not in str(error.value)


def test_names_are_known_to_lightning() -> None:
    assert {name for name in STRATEGIES.values() if name != "ddp"} <= set(StrategyRegistry.available_strategies())


@pytest.mark.parametrize("made", [LitLoraFSDP, LitLoraDeepSpeed])
def test_the_time_limit_is_that_of_other_strategies(made: Any) -> None:
    if made is LitLoraDeepSpeed:
        pytest.importorskip("deepspeed")
    assert time_limit(made()) == time_limit(DDPStrategy())
    assert time_limit(made(timeout=timedelta(seconds=7))) == timedelta(seconds=7)


def test_sizes_of_shards() -> None:
    with pytest.raises(UserError, match="shard_size=0 is too small"):
        LitLoraFSDP(shard_size=0)
    assert shards_weights(LitLoraFSDP())
    assert not shards_weights(ModelParallelStrategy())


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload"])
def test_the_command_line_names_the_replacement(
    strategy: str, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_lora.cli import main

    arguments = ["fit", "--config", "configs/sd15.yaml", f"--trainer.strategy={strategy}"]
    assert main(arguments) == 2
    assert "lit_lora_fsdp" in capsys.readouterr().err
