"""Which adapters a model takes whose weights are sharded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning.pytorch.strategies import DDPStrategy
from peft import AdaLoraConfig, BOFTConfig, LoHaConfig, LoraConfig, PeftConfig

from lit_lora.adapters import check_block_by_block, check_sharded_training
from lit_lora.adapters.methods import AdapterMethod, BlockByBlockMethod
from lit_lora.distributed import LitLoraFSDP
from lit_lora.errors import UserError


class TensorwiseMethod(BlockByBlockMethod):
    elementwise = False


def test_methods_that_need_whole_gradients_are_refused_where_they_are_sharded() -> None:
    with pytest.raises(UserError, match=r"AdaLoraConfig .* LitLoraFSDP leaves .* use strategy ddp"):
        check_sharded_training(AdaLoraConfig(total_step=10), LitLoraFSDP())
    check_sharded_training(AdaLoraConfig(total_step=10), DDPStrategy())
    check_sharded_training(LoraConfig(), LitLoraFSDP())


def test_methods_that_need_full_tensors_are_refused_where_they_are_sharded(
    make_config: Callable[[type[AdapterMethod]], PeftConfig],
) -> None:
    config = make_config(TensorwiseMethod)
    check_block_by_block(config)
    check_sharded_training(config, DDPStrategy())
    with pytest.raises(UserError, match="use strategy ddp"):
        check_sharded_training(config, LitLoraFSDP())


@pytest.mark.parametrize("config", [LoraConfig(), LoHaConfig(), AdaLoraConfig(total_step=10)])
def test_methods_that_start_without_the_base_are_accepted(config: PeftConfig) -> None:
    check_block_by_block(config)


def test_other_methods_are_refused_with_a_choice() -> None:
    with pytest.raises(
        UserError, match=r"BOFTConfig is not known .* use strategy ddp, or one of LoraConfig, LoHaConfig"
    ):
        check_block_by_block(BOFTConfig())
