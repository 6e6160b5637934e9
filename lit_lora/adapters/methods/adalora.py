"""AdaLoRA's rank allocation, which PEFT expects the training loop to call and to save."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel

from lit_lora.adapters.methods.base import AdapterMethod

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Tensors of the rank allocator, each the size of the trained weights: importance, its average and its uncertainty."""


class AdaLoraMethod(AdapterMethod):
    """AdaLoRA (Zhang et al., 2023): ``W + B diag(E) A``, where a schedule prunes entries of ``E`` with low importance.

    Importance is an average of ``|weight * gradient|`` over the steps, and ranks compete across all layers.
    """

    whole_gradients: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False
    block_by_block: ClassVar[bool] = True
    rank_field: ClassVar[str | None] = None  # init_r and target_r set it together

    def after_step(self, model: PeftModel, step: int) -> None:
        model.base_model.update_and_allocate(step)

    def state(self, model: PeftModel) -> dict[str, Any]:
        allocator = model.base_model.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in _AVERAGES}
        return averages | {"rank_pattern": allocator.peft_config.rank_pattern}

    def restore(self, model: PeftModel, state: dict[str, Any]) -> None:
        if not state:
            return
        allocator = model.base_model.rankallocator
        devices = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
        for name in _AVERAGES:
            setattr(allocator, name, {key: value.to(devices[key]) for key, value in state[name].items()})
        allocator.peft_config.rank_pattern = state["rank_pattern"]

    def state_bytes(self, model: PeftModel) -> int:
        ranked = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        return len(_AVERAGES) * sum(parameter.nbytes for parameter in ranked)
