"""LoRA that trains only how the inputs reach directions in which the base's weights do little: MiCA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lit_lora.adapters.methods.lora import LoraMethod
from lit_lora.adapters.names import tuner_layers
from lit_lora.distributed.collectives import broadcast
from lit_lora.errors import UserError


class MicaMethod(LoraMethod):
    """Minor component adaptation, ``init_lora_weights: mica`` (https://arxiv.org/abs/2604.01694).

    ``B`` holds the left singular vectors of the weight with the smallest singular values and stays frozen, and ``A`` begins
    with zeros. PEFT computes them. The base does not change; the files are ordinary LoRA.
    """

    block_by_block: ClassVar[bool] = False

    def check(self, model: nn.Module, config: PeftConfig) -> None:
        if getattr(config, "use_dora", False):
            raise UserError("init_lora_weights: mica cannot be combined with use_dora; set one of them to its default")

    def injected(self, model: PeftModel) -> None:
        # Singular vectors may differ between machines.
        layers = tuner_layers(model, LoraLayer)
        own = {name: [one.weight.detach().cpu() for one in layer.lora_B.values()] for name, layer in layers}
        for name, layer in layers:
            for one, value in zip(layer.lora_B.values(), broadcast(own)[name], strict=True):
                one.weight.data.copy_(value)

    def export(
        self, model: PeftModel, state: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """LoRA that other programs load without decomposing the base's weights."""
        return state, {**config, "init_lora_weights": True}
