"""Adapters as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.distributed.collectives import full_tensor


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names without the adapter's name, whole and on the CPU; a collective call."""
    state = get_peft_model_state_dict(
        model, model.state_dict(keep_vars=True), ADAPTER_NAME, save_embedding_layers=False
    )
    return {key: full_tensor(value).detach().cpu().contiguous() for key, value in state.items()}


def save_peft_files(state: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, which ``PeftModel.from_pretrained`` reads.

    Args:
        state: What :func:`adapter_state` gave.
        config: What :func:`plain_config` gave, with the base's name.
        folder: An existing folder.
    """
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def sort_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in order: they are written in any, so the same adapter gives different bytes."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items())), **header}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the tensors begin where they began"
        opened.seek(8)
        opened.write(text.ljust(size))
