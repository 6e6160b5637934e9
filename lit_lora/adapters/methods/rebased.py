"""LoRA that starts from parts of the base's weights: PiSSA and OLoRA."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lit_lora.adapters.methods.lora import Factors, LoraMethod, rebase
from lit_lora.adapters.names import tuner_layers
from lit_lora.distributed.collectives import broadcast
from lit_lora.errors import UserError
from lit_lora.quantization.frozen_layer import quantized_layers


def is_rebased(initialization: object) -> bool:
    """Whether this ``init_lora_weights`` takes the adapter's first values out of the base's weights."""
    return isinstance(initialization, str) and (
        initialization.lower() == "olora"
        or initialization == "pissa"
        or (initialization.startswith("pissa_niter_") and initialization[12:].isdecimal())
    )


class RebasedLoraMethod(LoraMethod):
    """LoRA with ``init_lora_weights`` PiSSA (Meng et al., 2024) or OLoRA (Büyükakyüz, 2024).

    The first values ``B0 A0`` are the largest part of the weight, and the base keeps the rest, ``W - scaling B0 A0``.
    """

    block_by_block: ClassVar[bool] = False

    def check(self, model: nn.Module, config: PeftConfig) -> None:
        quantised = quantized_layers(model)
        if quantised:
            raise UserError(
                f"init_lora_weights of PiSSA and OLoRA moves a part of the base's weights into the adapter, and {len(quantised)} "
                f"layers are stored as {type(quantised[0].quantization).__name__}; leave model.quantization out, or set "
                f"init_lora_weights to true"
            )
        if getattr(config, "use_dora", False):
            raise UserError(
                "init_lora_weights of PiSSA and OLoRA cannot be combined with use_dora, whose magnitudes would be those of the "
                "changed base; set one of them to its default"
            )

    def injected(self, model: PeftModel) -> None:
        own = _factors(model)
        model.__dict__["initial_lora"] = own  # PEFT has taken them out
        rebase(model, broadcast(own))
        for name, layer in tuner_layers(model, LoraLayer):
            for weight, value in zip(_weights(layer), model.initial_lora[name], strict=True):
                weight.data.copy_(value)


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
    return down.weight, up.weight


def _factors(model: PeftModel) -> Factors:
    found: Factors = {}
    for name, layer in tuner_layers(model, LoraLayer):
        a, b = _weights(layer)
        found[name] = (a.detach().float().cpu().clone(), b.detach().float().cpu().clone())
    return found
