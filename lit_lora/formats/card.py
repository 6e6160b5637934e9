"""The model card of an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.base_options import loading_lines
from lit_lora.formats.base_records import Records, base_records
from lit_lora.formats.model_spec import alpha_option, default_title
from lit_lora.formats.sampling_scheduler import scheduler_changes
from lit_lora.formats.textual_inversion import TEXTUAL_INVERSION, embedding_file

CARD = "README.md"

_FACTS = {
    "ss_steps": "steps",
    "ss_total_batch_size": "batch size",
    "modelspec.resolution": "resolution",
    "ss_optimizer": "optimizer",
    "ss_learning_rate": "learning rate",
    "ss_lr_scheduler": "schedule",
    "ss_mixed_precision": "mixed precision",
    "ss_caption_dropout_rate": "caption dropout",
    "ss_seed": "seed",
}


def model_card(adapter: AdapterFiles, files: Sequence[str], samples: Sequence[str] = ()) -> str:
    """The text of an adapter's model card: base, trigger words, how to load it, and facts about the training.

    Args:
        adapter: The adapter.
        files: Names of the files beside the card.
        samples: Paths of sample images relative to the card; defaults to none.
    """
    told = adapter.metadata
    base = adapter.main_config.get("base_model_name_or_path") or ""
    title = told.get("modelspec.title") or default_title(adapter)
    trigger = told.get("modelspec.trigger_phrase") or ", ".join(adapter.new_tokens) or None
    license_id = told.get("modelspec.license")
    tags = [tag for tag in told.get("modelspec.tags", "").split(", ") if tag]
    kind = str(adapter.main_config.get("peft_type") or TEXTUAL_INVERSION).lower().replace(" ", "_")
    data: Any = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name="diffusers",
        license=license_id,
        tags=sorted({"text-to-image", "lit_lora", kind, *tags}),
    )
    if trigger:
        data.instance_prompt = trigger  # which the hub shows beside the samples
    blocks = [f"---\n{data.to_yaml()}\n---", f"# {title}"]
    if description := told.get("modelspec.description"):
        blocks.append(description)
    blocks += [f"![sample]({sample})" for sample in samples]
    blocks.append(_facts(adapter, base, trigger))
    blocks.append(_usage(adapter, base or "the base model", files, trigger))
    if author := told.get("modelspec.author"):
        blocks.append(f"Made by {author}.")
    return str(ModelCard("\n\n".join(blocks) + "\n"))


def _facts(adapter: AdapterFiles, base: str, trigger: str | None) -> str:
    config = adapter.main_config
    rows = {"base": f"`{base}`" if base else None, "trigger words": f"`{trigger}`" if trigger else None}
    magnitudes = " with magnitudes (DoRA)" if config.get("use_dora") else ""
    rows["method"] = f"{config.get('peft_type') or TEXTUAL_INVERSION}{magnitudes}"
    rows["rank"] = _value(config, "r", "rank_pattern")
    rows["alpha"] = _value(config, alpha_option(config), "alpha_pattern")
    over = [f"`{one['name']}` with weight {one['weight']}" for one in base_records(adapter.metadata)]
    rows["made for the quantized base"] = adapter.metadata.get("lit_lora.quantized_base")
    rows["trained over"] = " and ".join(over)
    for name, part in adapter.text_encoders.items():
        rows[f"rank in {name}"] = _value(part.config, "r", "rank_pattern")
    rows |= {label: adapter.metadata.get(key) for key, label in _FACTS.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows.items() if value)])


def _value(config: Mapping[str, Any], option: str, pattern: str) -> str | None:
    value = config.get(option)
    if value is None:
        return None
    return f"{value}, other values in {len(config[pattern])} layers" if config.get(pattern) else str(value)


def _usage(adapter: AdapterFiles, base: str, files: Sequence[str], trigger: str | None) -> str:
    blocks = []
    prompt = trigger or "a prompt"
    pipeline = "DiffusionPipeline"  # which finds out what the base is
    if adapter.family is not None and not adapter.family.other_pipelines:
        pipeline = adapter.family.pipeline_class.__name__
    vae_class = "AutoencoderKL" if adapter.family is None else adapter.family.vae_class.__name__
    first, *creation = loading_lines(adapter.metadata, base, pipeline, vae_class)
    over = base_records(adapter.metadata)
    if over:
        blocks.append(_trained_over(adapter, base, over))
    loading = _token_loading(adapter)
    if "pytorch_lora_weights.safetensors" in files and (not over or _adds(adapter)):
        loading = [*_loading("pytorch_lora_weights.safetensors", over), *loading]
    if loading:
        reads_files = any("load_file(" in line for line in loading)
        lines = [
            first,
            *(["from safetensors.torch import load_file"] if reads_files else []),
            *creation,
            *loading,
            *_scheduler(adapter),
            f'image = pipeline("{prompt}").images[0]',
        ]
        blocks.append("In diffusers:\n\n```python\n" + "\n".join(lines) + "\n```")
    if "adapter_config.json" in files and not over:
        part = "unet" if adapter.family is None else adapter.family.denoiser_name
        blocks.append(
            "In PEFT:\n\n```python\n"
            + "\n".join([first, "from peft import PeftModel", *creation, ""])
            + f'PeftModel.from_pretrained(pipeline.{part}, "this folder")  # changes the {part} in place\n'
            + "".join(
                f'PeftModel.from_pretrained(pipeline.{one}, "this folder", subfolder="{one}")\n'
                for one in adapter.text_encoders
            )
            + "```"
        )
    others = {"kohya.safetensors": "A1111, Forge and sd-scripts", "comfyui.safetensors": "ComfyUI"}
    others["lycoris.safetensors"] = "ComfyUI and LyCORIS"
    blocks += [f"`{name}` is for {others[name]}." for name in files if name in others]
    return "\n\n".join(["## How to load it", *blocks])


def _loading(file: str, over: Records) -> list[str]:
    """Lines that load this adapter in diffusers, and those that it was trained over."""
    if not over:
        return [f'pipeline.load_lora_weights("this folder", weight_name="{file}")']
    names, weights = [f"base_{number}" for number, _ in enumerate(over)], [one["weight"] for one in over]
    lines = [
        f'pipeline.load_lora_weights("{one["path"]}", adapter_name="{name}")'
        for name, one in zip(names, over, strict=True)
    ]
    lines.append(f'pipeline.load_lora_weights("this folder", weight_name="{file}", adapter_name="new")')
    return [*lines, f"pipeline.set_adapters({json.dumps([*names, 'new'])}, {[*weights, 1.0]})"]


def _trained_over(adapter: AdapterFiles, base: str, over: Records) -> str:
    """What users need beside this adapter."""
    needed = "\n".join(
        f"- `{one['name']}` with weight {one['weight']}, SHA-256 of its tensors {one['sha256']}" for one in over
    )
    paths, weights = " ".join(str(one["path"]) for one in over), " ".join(str(one["weight"]) for one in over)
    merging = f"```\nlit-lora adapter merge {paths} merged_base --weights {weights} --into {base}\n```"
    how = "Load both" if _adds(adapter) else "Merge them into the base and load this adapter on the result"
    other = "Or merge them into the base, and load this adapter on the result" if _adds(adapter) else "To merge"
    return (
        f"This adapter was trained over others, which it does not contain:\n\n{needed}\n\n{how}. `lit-lora sample` does so by "
        f"itself where their files are. {other}:\n\n{merging}"
    )


def _adds(adapter: AdapterFiles) -> bool:
    """Whether the adapter adds the same to a weight whatever else has been added to it, as DoRA does not."""
    return adapter.config.get("peft_type") in ("LORA", "LOHA", "LOKR") and not adapter.config.get("use_dora")


def _scheduler(adapter: AdapterFiles) -> list[str]:
    """Lines that give a pipeline of diffusers the scheduler that the adapter was trained for, where it is not the base's."""
    changes = scheduler_changes(adapter.metadata)
    if not changes:
        return []
    name = changes.pop("_class_name", None)
    kind = "type(pipeline.scheduler)" if name is None else f"diffusers.{name}"
    options = ", ".join(f"{option}={value!r}" for option, value in changes.items())
    return [
        *([] if name is None else ["import diffusers"]),
        f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config, {options})",
    ]


def _token_loading(adapter: AdapterFiles) -> list[str]:
    """Lines that load the new tokens into a pipeline of diffusers."""
    lines: list[str] = []
    for token in adapter.new_tokens:
        assert adapter.family is not None, "only families have new tokens"
        folder, _, file = embedding_file(token).partition("/")
        if len(adapter.family.token_encoders) == 1:
            place = f'"this folder", subfolder="{folder}", weight_name="{file}"'
            lines.append(f'pipeline.load_textual_inversion({place}, token="{token}")')
            continue
        lines.append(f'embeddings = load_file("this folder/{folder}/{file}")')
        for name, key in adapter.family.token_encoders.items():
            parts = f"text_encoder=pipeline.{name}, tokenizer=pipeline.{name.replace('text_encoder', 'tokenizer')}"
            lines.append(f'pipeline.load_textual_inversion(embeddings["{key}"], token="{token}", {parts})')
    return lines


def _is_hub_id(base: str) -> bool:
    """Whether a base may be on the hub, and is no local folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
