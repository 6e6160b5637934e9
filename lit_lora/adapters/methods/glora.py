"""GLoRA, which PEFT puts over torch's own Linear layers alone."""

from __future__ import annotations

import torch
from peft import PeftConfig
from torch import nn

from lit_lora.adapters.methods.base import AdapterMethod
from lit_lora.errors import UserError
from lit_lora.quantization.frozen_layer import FrozenLinear


class GloraMethod(AdapterMethod):
    """GLoRA (https://arxiv.org/abs/2306.07967), a change of weight, input and bias.

    PEFT reads the weight itself and refuses subclasses of ``torch.nn.Linear``, so that Linear layers of the base become these
    again; they keep their weights.
    """

    def check(self, model: nn.Module, config: PeftConfig) -> None:
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, FrozenLinear):
                continue
            if not layer.is_dense:
                raise UserError(
                    f"GLoRA reads the base's weights, and {name} has them as {type(layer.quantization).__name__}; leave "
                    f"quantization out, or use another method, such as peft.LoraConfig"
                )
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight, plain.bias = layer.get_parameter("weight"), layer.bias
            model.set_submodule(name, plain.train(layer.training))
