"""Strategies, and functions for the processes of one run.

Asking for one of the names registers the strategies with Lightning. Importing the package alone, or one of its modules, does
not: processes that pack, index or check shards must not load Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_lora.lazy import lazy_names

if TYPE_CHECKING:
    from lit_lora.distributed.strategies import (
        LitLoraDeepSpeed,
        LitLoraFSDP,
        check_strategy,
        check_strategy_name,
        is_ours,
        shards_weights,
    )

__all__ = ["LitLoraDeepSpeed", "LitLoraFSDP", "check_strategy", "check_strategy_name", "is_ours", "shards_weights"]

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "lit_lora.distributed.strategies"))


def __dir__() -> list[str]:
    return __all__
