"""Metadata of single files: the model spec (github.com/Stability-AI/ModelSpec) and the keys of kohya's sd-scripts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_lora.formats.base import AdapterFiles

OF_THE_FILE = (
    *("modelspec.sai_model_spec", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
)
"""Entries that depend on the tensors or the format, so that they are written anew with each file."""

_TITLES = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
_BLOCK = 1 << 20


def spec_metadata(adapter: AdapterFiles, algorithm: str | None = None) -> dict[str, str]:
    """The entries for an adapter's file, in addition to those that the adapter has; what the adapter says itself wins.

    Args:
        adapter: Adapter of a known family.
        algorithm: Name of the method in LyCORIS; None for the LoRA of sd-scripts.
    """
    assert adapter.family is not None, "formats with these entries need it"
    config = adapter.main_config
    base = config.get("base_model_name_or_path")
    spec = adapter.family.model_spec(adapter.denoiser_config)
    architecture = spec.pop("modelspec.architecture", None)
    entries = spec | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": default_title(adapter),
        "ss_network_dim": _common(config, "r", "rank_pattern"),
        "ss_network_alpha": _common(config, alpha_option(config), "alpha_pattern"),
    }
    if architecture:
        entries["modelspec.architecture"] = f"{architecture}/lora"
    if isinstance(base, str) and base:
        entries["ss_sd_model_name"] = Path(base).name
    if algorithm is not None:
        entries["ss_network_module"] = "lycoris.kohya"
        entries["ss_network_args"] = json.dumps({"algo": algorithm})
    return {**entries, **adapter.metadata}


def default_title(adapter: AdapterFiles) -> str:
    """The title of an adapter that has none: the base's name and the method."""
    config = adapter.main_config
    method = str(config.get("peft_type") or ("textual inversion" if adapter.new_tokens else "adapter"))
    method = "DoRA" if config.get("use_dora") else _TITLES.get(method, method)
    base = config.get("base_model_name_or_path")
    return f"{Path(base).name} {method}" if isinstance(base, str) and base else method


def alpha_option(config: Mapping[str, Any]) -> str:
    """The name that a PEFT config has for alpha."""
    return "lora_alpha" if "lora_alpha" in config else "alpha"


def data_hash(*paths: Path) -> dict[str, str]:
    """The hashes of the tensors in safetensors files: SHA-256 of all bytes after the headers, in the order of the files."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as opened:
            opened.seek(8 + int.from_bytes(opened.read(8), "little"))
            while block := opened.read(_BLOCK):
                found.update(block)
    return {"modelspec.hash_sha256": f"0x{found.hexdigest()}", "sshs_model_hash": found.hexdigest()}


def _common(config: Mapping[str, Any], option: str, pattern: str) -> str:
    """The value that all layers have, or sd-scripts' word for values that differ."""
    return "Dynamic" if config.get(pattern) else str(config.get(option))
