"""Tensors of an adapter."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.distributed.collectives import full_tensor


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's own tensors, which may be sharded, under PEFT's names without the adapter's name."""
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), ADAPTER_NAME, save_embedding_layers=False
    )
    return state


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's full tensors on the CPU, under PEFT's names without the adapter's name.

    A collective call where the strategy shards weights: every process has to make it.
    """
    return {key: full_tensor(value).detach().cpu().contiguous() for key, value in adapter_tensors(model).items()}


def warn_of_left_out(model: PeftModel) -> None:
    """Warn of what was trained or computes in a model beside its adapter, as a callback may add it: its files do not hold that.

    Args:
        model: Adapted model, whose embeddings of new tokens have files of their own.
    """
    # Biases have no adapter's name; their values are looked for only if there are any, which takes time at every save.
    beside_adapter = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not {ADAPTER_NAME, "new_tokens"}.intersection(name.split("."))
    }
    written = {id(value) for value in adapter_tensors(model).values()} if beside_adapter else set()
    trained = [name for name, parameter in beside_adapter.items() if id(parameter) not in written]
    others = [name for name in model.active_adapters if name != ADAPTER_NAME]
    if not trained and not others:
        return
    beside = (
        f"{len(trained)} other trained tensors, the first is {trained[0]}"
        if trained
        else f"the adapter {others[0]}, which is active too"
    )
    advice = "checkpoints hold all that is trained"
    if others:
        advice += (
            f"; write {others[0]} with save_pretrained(folder, selected_adapters=[{others[0]!r}]) of the adapted model"
        )
    rank_zero_warn(f"the adapter's files hold the adapter {ADAPTER_NAME!r} alone, without {beside}; {advice}")
