"""A limit on the memory of a run."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora.byte_sizes import parse_bytes
from lit_lora.distributed import shards_weights
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from lit_lora.planning.memory_limit import check_memory_limit


class MemoryLimit(Callback):
    """Plans the memory of a fit before anything is loaded, and refuses a run that is planned to take more than a limit.

    The error names the cheapest changes that make the run fit, as ``lit-lora plan`` does.

    Args:
        limit: Bytes that the run may take on each device, such as ``"8GB"``.

    Raises:
        UserError: If ``limit`` is no amount of bytes.
    """

    def __init__(self, limit: str) -> None:
        self.limit = limit
        self._allowed = parse_bytes("limit", limit)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, LoraDiffusion):
            raise UserError(
                f"MemoryLimit plans the runs of a LoraDiffusion, not of a {type(pl_module).__name__}; leave MemoryLimit out"
            )
        if shards_weights(trainer.strategy):
            raise UserError(
                f"MemoryLimit(limit={self.limit!r}) plans a run with a full copy of the weights on each GPU, which "
                f"{type(trainer.strategy).__name__} does not have; leave MemoryLimit out"
            )
        check_memory_limit(pl_module, trainer, self._allowed)
