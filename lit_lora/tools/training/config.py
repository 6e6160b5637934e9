"""The config of a run, complete and with comments, that ``lit-lora fit`` repeats."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_lora.tools.training.base import Base
from lit_lora.tools.training.choices import Choice, Settings

BACKGROUND = "white"
"""Color behind transparent parts of images."""

CHECKPOINTS = 10
"""Number of times that a run saves and validates."""


def make_config(
    base: Base,
    settings: Settings,
    out: Path,
    sources: Mapping[str, Any],
    prefix: str,
    prompts: Sequence[str],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The config of a run.

    Args:
        base: Base of the run.
        settings: What was chosen.
        out: Folder of the run.
        sources: Shards to train on, by the datamodule's arguments.
        prefix: Text before each caption.
        prompts: Prompts of the images that are drawn.
        given: Values that the user gives, by config key; they win.
    """
    config = copy.deepcopy(base.template)
    every = max(1, settings.steps // CHECKPOINTS)
    trainer, model = config["trainer"], config["model"]
    trainer |= {"devices": 1, "max_steps": settings.steps, "accumulate_grad_batches": settings.accumulate}
    # Validation is counted in batches. The sanity check before the first step measures the base itself.
    trainer |= {"val_check_interval": every * settings.accumulate, "num_sanity_val_steps": -1}
    trainer |= {"log_every_n_steps": min(10, every), "default_root_dir": str(out)}
    trainer["enable_model_summary"] = False  # StepProgress tells what is trained
    trainer["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(out)}}
    validates = settings.val_samples > 0 or "val_shards" in sources
    trainer["callbacks"] = _callbacks(base, settings, out, prompts, every, validates)
    model["adapter"]["init_args"] |= {"r": settings.rank, "lora_alpha": settings.rank}
    model["optimizer"]["init_args"]["lr"] = settings.lr
    model["parameter_groups"] = [{"pattern": "*.lora_B.*", "lr_ratio": settings.lr_ratio}]
    model["lr_scheduler"]["init_args"] |= _schedule(model["lr_scheduler"]["class_path"], settings.steps)
    model["quantization"] = settings.quantization and {"class_path": f"lit_lora.quantization.{settings.quantization}"}
    names = ("gradient_checkpointing", "offload_encoders", "offload_blocks", "vae_tiling")
    model["memory"] = {"vae_slicing": True} | {name: getattr(settings, name) for name in names}
    model["memory"] |= {"offload_folder": settings.offload_folder} if settings.offload_folder else {}
    data = config["data"]["init_args"]
    data |= {"train_shards": None, **sources, "val_samples": settings.val_samples, "batch_size": settings.batch_size}
    data |= {"resolution": settings.resolution, "buckets": _buckets(settings), "chunks": {"leftovers": "pad"}}
    decoder = {"center_crop": True, "random_flip": False, "background": BACKGROUND}
    decoder |= {"captions": {"prefix": prefix}} if prefix else {}
    kind = data["decoder"].get("class_path")  # of editing pairs
    data["decoder"] = {"class_path": kind, "init_args": decoder} if kind else decoder
    set_keys(config, given)
    return config


def template_with(base: Base, given: Mapping[str, Any]) -> dict[str, Any]:
    """The shipped config of a base with values that the user gives, by config key."""
    config = copy.deepcopy(base.template)
    set_keys(config, given)
    return config


def comments_of(choices: Sequence[Choice], cached: str | None) -> dict[str, str]:
    """Comments for a config by the keys that they precede: the choices with their reasons, and what is easily mistaken.

    Args:
        choices: The choices.
        cached: The datamodule's argument whose shards are caches; None without caches.
    """
    comments = {
        "trainer.val_check_interval": "In batches, not in steps.",
        "trainer.num_sanity_val_steps": "All validation data, before the first step: the loss of the base itself.",
        "trainer.devices": "More devices see more images in a step.",
        "model.parameter_groups": "LoRA+: the matrices B begin at zero, and have to grow before A matters.",
        "data.init_args.chunks": "Batches that the images of a pass do not fill are trained on too.",
    }
    if cached is not None:
        comments[f"data.init_args.{cached}"] = "Made by lit-lora cache from the folder shards beside it."
    return comments | {
        choice.key: f"{choice.name}: {choice.value}. {choice.why[:1].upper()}{choice.why[1:]}." for choice in choices
    }


def set_keys(config: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set values at dotted paths of a config: classes first, since another class does not keep the options of the one before."""
    for key in sorted(values, key=lambda key: key.removesuffix(".class_path").count(".")):
        _set_key(config, key, values[key])


def _set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a value at a dotted path of a config; a class may also be the value of the option that it is given for."""
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(config.get(name), dict):
            config[name] = {"class_path": config[name]} if isinstance(config.get(name), str) else {}
        config = config[name]
    if isinstance(value, str) and isinstance(config.get(last), dict) and "class_path" in config[last]:
        config, last = config[last], "class_path"
    if last == "class_path" and _class_name(config.get(last)) != _class_name(value):
        config.pop("init_args", None)
    config[last] = value


def _class_name(path: object) -> str:
    """The name of a class, by which a config may call it as well as by its path."""
    return str(path).rpartition(".")[2]


def write_yaml(config: Mapping[str, Any], comments: Mapping[str, str], depth: int = 0, path: str = "") -> str:
    """YAML of a config.

    Args:
        config: The config, or a part of it.
        comments: Comments by the dotted path of the key that they precede.
        depth: Number of levels above this part.
        path: Dotted path of this part.
    """
    indent = "  " * depth
    lines = []
    for name, value in config.items():
        here = f"{path}.{name}" if path else str(name)
        lines += [f"{indent}# {line}" for line in comments.get(here, "").splitlines()]
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", write_yaml(value, comments, depth + 1, here).rstrip("\n")]
        else:
            text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=120)
            lines += [indent + line for line in text.rstrip("\n").splitlines()]
    return "\n".join(lines) + "\n"


def _callbacks(
    base: Base, settings: Settings, out: Path, prompts: Sequence[str], every: int, validates: bool
) -> list[dict[str, Any]]:
    saves: dict[str, Any] = {"save_last": True, "enable_version_counter": False}
    if validates:  # after each validation
        saves |= {"monitor": "val/loss", "filename": "best-{step}", "save_on_train_epoch_end": False}
    else:
        saves |= {"every_n_train_steps": every}
    kept = [{"class_path": "lit_lora.callbacks.AdapterCheckpoint", "init_args": saves}]
    if settings.draws:
        of_family = next(
            one for one in base.template["trainer"]["callbacks"] if one["class_path"].endswith("SampleImages")
        )
        options = of_family["init_args"] | {"prompts": list(prompts), "every_n_steps": max(1, settings.steps // 4)}
        if settings.resolution != base.size:  # what was learned is seen at the size at which it was
            options |= {"height": settings.resolution, "width": settings.resolution}
        kept.append({"class_path": "lit_lora.callbacks.SampleImages", "init_args": options})
    if validates:
        kept.append({"class_path": "lit_lora.callbacks.BaseLoss"})
        # lit-lora predict draws the validation captions.
        writes = {"output_dir": str(out / "predicted")}
        kept.append({"class_path": "lit_lora.callbacks.ImageWriter", "init_args": writes})
    return [*kept, {"class_path": "lit_lora.callbacks.RunReport"}]


def _buckets(settings: Settings) -> dict[str, Any] | None:
    return {"divisor": 64, "max_aspect_ratio": 2.0} if settings.buckets else None


def _schedule(kind: str, steps: int) -> dict[str, int]:
    """The length of the family's schedule: of a warm-up, a tenth of the steps and at most 100; of a decay, all steps."""
    return {"T_max": steps} if kind.endswith("CosineAnnealingLR") else {"total_iters": max(1, min(100, steps // 10))}
