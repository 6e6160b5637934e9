"""Exponential moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.training_utils import EMAModel
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lit_lora.adapters import parameters_without_compiling, without_compiling
from lit_lora.adapters.ranked_layer import ProjectedParameter
from lit_lora.argument_types import check_types
from lit_lora.callbacks.schedule_free import schedule_free_optimizers
from lit_lora.distributed.collectives import full_tensor, shard_like
from lit_lora.errors import UserError
from lit_lora.log_mean import log_mean
from lit_lora.parameters import trainable_parameters


class AdapterEMA(Callback):
    """Keeps an exponential moving average of the trainable parameters, for any LightningModule.

    After each optimizer step ``average = decay * average + (1 - decay) * parameters``. Unlike Lightning's ``WeightAveraging``
    it copies only trainable parameters. :class:`SampleImages` draws with the average, :class:`AdapterCheckpoint` writes it as
    files, and validation logs ``val/loss_ema`` beside ``val/loss`` for modules that have ``validation_loss``, as
    :class:`~lit_lora.LoraDiffusion` has.

    Args:
        decay: Decay of the average per optimizer step. Defaults to 0.999. While ``(1 + step) / (10 + step)`` is smaller, it is
            used instead, so that the average follows the first steps quickly.

    Raises:
        UserError: If ``decay`` is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        check_types(AdapterEMA, locals())
        if not 0 <= decay < 1:
            raise UserError(f"decay must be in [0, 1), not {decay}")
        self.decay = decay
        self._average: EMAModel | None = None
        self._names: list[str] = []
        """The averaged parameters, in the average's order."""
        self._restored: dict[str, Any] | None = None
        self._step = 0
        self._followed: tuple[list[int], list[nn.Parameter]] = ([], [])
        """Ids of the parameters that the optimizers train, and with these the averaged parameters."""

    @classmethod
    def of(cls, trainer: Trainer) -> AdapterEMA | None:
        """The trainer's :class:`AdapterEMA`; None if it has none or training has not begun."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, cls) and c._average is not None), None)

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """Context in which the module has the averaged weights."""
        assert self._average is not None, "the average exists only after training has begun"
        self._follow(pl_module)
        parameters = self._parameters(pl_module)
        self._average.store(parameters)
        self._average.copy_to(parameters)
        try:
            yield
        finally:
            self._average.restore(parameters)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A checkpoint is not known yet, and without one and without a fit before there is no average either.
        if stage in ("test", "predict") or (stage != "fit" and self._average is None):
            _warn_of_last_weights(stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = trainable_parameters(pl_module)
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            raise UserError(
                "AdapterEMA needs full parameters, which DeepSpeed stage 3 shards; use stage 2 or strategy lit_lora_fsdp, or "
                "remove AdapterEMA from trainer.callbacks"
            )
        # All tensors in one call: it saves time on a GPU, takes more on a CPU, and does not go with shards.
        foreach = pl_module.device.type != "cpu" and not any(isinstance(one, DTensor) for one in parameters)
        self._average = EMAModel([], decay=self.decay, foreach=foreach)
        self._names, self._followed, self._step = [], ([], []), trainer.global_step
        self._add_trainable(pl_module)
        self._restore(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)  # some strategies load a checkpoint after on_fit_start
        if optimizer := next(schedule_free_optimizers(trainer), None):
            rank_zero_warn(
                f"AdapterEMA averages the weights at which {type(optimizer).__name__} computes gradients, not those that it has "
                f"learned, which are an average already; remove AdapterEMA from trainer.callbacks"
            )
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None and _validates_a_checkpoint(trainer):
            _warn_of_last_weights("validate")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._average is None or trainer.sanity_checking or _validates_a_checkpoint(trainer):
            return
        if not hasattr(pl_module, "validation_loss"):
            return
        with self.averaged(pl_module):
            loss, count = cast(Any, pl_module).validation_loss(batch, batch_idx)
        log_mean(pl_module, "val/loss_ema", loss, count)

    def on_ranks_pruned(
        self, trainer: Trainer, pl_module: LightningModule, changes: Sequence[ProjectedParameter]
    ) -> None:
        """Project the average as the weights were projected; :class:`RankBudget` calls this."""
        if self._average is None:
            return
        shadows = dict(zip(self._names, self._average.shadow_params, strict=True))
        changed = {id(change.parameter): change for change in changes}
        for name, parameter in parameters_without_compiling(pl_module).items():
            if name in shadows and id(parameter) in changed:
                shadows[name] = changed[id(parameter)].of(shadows[name])
        self._average.shadow_params = list(shadows.values())

    def on_adapter_replaced(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average anew with new weights; :class:`EvaInitialization` calls this."""
        if self._average is not None:
            self._average.shadow_params = [value.detach().clone() for value in self._parameters(pl_module)]

    def state_dict(self) -> dict[str, Any]:
        if self._average is None:
            return {}
        state = self._average.state_dict()
        # Stored as one vector, since each tensor costs half a kilobyte in a checkpoint.
        state["shadow_params"] = parameters_to_vector([full_tensor(value) for value in state["shadow_params"]])
        return state | {"names": self._names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _restore(self, pl_module: LightningModule) -> None:
        """Restore the average of a checkpoint, if one was loaded."""
        if self._restored is None or self._average is None:
            return
        if (saved := self._restored["decay"]) != self.decay:
            rank_zero_warn(
                f"decay of AdapterEMA is {saved} in the checkpoint and {self.decay} here, which applies from now on"
            )
        self._names = [without_compiling(name) for name in self._restored.pop("names")]
        self._followed = ([], [])
        parameters = self._parameters(pl_module)
        shadow = [torch.empty(parameter.shape) for parameter in parameters]
        vector_to_parameters(self._restored["shadow_params"].cpu(), shadow)
        parts = [shard_like(value.to(p.device), p) for value, p in zip(shadow, parameters, strict=True)]
        self._average.load_state_dict({**self._restored, "decay": self.decay, "shadow_params": parts})
        self._restored = None

    def _follow(self, pl_module: LightningModule) -> None:
        """Take the latest optimizer step into the average, which callbacks listed before this one ask for before its own hook."""
        trainer = pl_module._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:  # another trainer has made other steps
            return
        if self._average is not None and trainer.global_step != self._step:
            self._step = trainer.global_step
            # To go through all modules takes as long as a small step, so it waits until something else is trained.
            trained, parameters = _trained(trainer), self._followed[1]
            if trained != self._followed[0] or not parameters:
                self._add_trainable(pl_module)
                parameters = self._parameters(pl_module)
                self._followed = (trained, parameters)
            self._average.step(parameters)

    def _add_trainable(self, pl_module: LightningModule) -> None:
        """Begin to average parameters that have become trainable, as ``BackboneFinetuning`` makes them."""
        assert self._average is not None
        known = set(self._names)
        for name, parameter in parameters_without_compiling(pl_module).items():
            if parameter.requires_grad and name not in known:
                self._names.append(name)
                self._average.shadow_params.append(parameter.clone().detach())

    def _parameters(self, pl_module: LightningModule) -> list[nn.Parameter]:
        """The averaged parameters, also those that are frozen again."""
        named = parameters_without_compiling(pl_module)
        return [named[name] for name in self._names]


def _trained(trainer: Trainer) -> list[int]:
    """Ids of the parameters that optimizers train."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return [id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad]


def _validates_a_checkpoint(trainer: Trainer) -> bool:
    """Whether the weights are those of a checkpoint, and the average is that of the training before."""
    return trainer.state.fn == TrainerFn.VALIDATING and trainer.ckpt_path is not None


def _warn_of_last_weights(stage: str) -> None:
    rank_zero_warn(
        f"AdapterEMA: {getattr(stage, 'value', stage)} uses the weights of the last step, not their average; that is in the "
        f".ema.adapter folder beside the checkpoint, for lit-lora sample"
    )
