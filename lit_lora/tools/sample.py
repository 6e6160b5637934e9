"""``lit-lora sample``: draws images with a base model and adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lit_lora.errors import UserError, check_least, check_most
from lit_lora.prompts import MOST_SEED

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.

_LISTS = ("--adapter", "--prompts", "--scales")
"""Options that take several values without brackets."""
_NUMBERS = ("--scales",)
_EPILOG = (
    "Several adapters or scales are compared, in a grid with a row for each prompt and a column for each adapter and scale:"
    " --adapter runs/cat/lightning_logs/version_0/checkpoints/*.adapter --scales 0 0.7 1. With --combine they draw together."
)


def sample_command(arguments: list[str]) -> None:
    """Run ``lit-lora sample``."""
    from lit_lora.tools import run_tool

    options: SampleOptions = run_tool(
        SampleOptions, sample_arguments(arguments), "lit-lora sample", epilog=_EPILOG, return_instance=True
    )
    from lit_lora.tools.sampling import draw_samples

    draw_samples(options)


@dataclass(frozen=True)
class SampleOptions:
    """Draw images for prompts and write them as one grid, or as one file each.

    Args:
        adapter: File or folder of the adapter, as this program, PEFT, diffusers, kohya's scripts or ComfyUI write it; several are
            compared, each in a column of its own. Defaults to the base model alone.
        base: Folder, hub id, .safetensors file or "embedded"; defaults to the base that the adapter was trained on.
        prompts: One text, several ("a red seven" "a blue star"), or a file: .txt with a prompt in each line, or .yaml or .json
            with a list of texts and of entries with prompt, negative_prompt, seed, width, height, steps and guidance_scale.
        negative_prompt: Text to draw away from, for prompts without one; defaults to none.
        scales: Factor of the adapter's update, 0 for the base alone; several are compared, each in a column of its own, or with
            --combine one for each adapter. Defaults to 1.
        combine: Draw with all adapters together, merged into the base, instead of comparing them.
        count: Number of images for each prompt.
        out: File for the grid, with the ending .png, .jpg or .webp; or, without an ending, a folder for one file per image.
        format: Format of the files in a folder.
        seed: Seed of the first image; image i is drawn from seed + i, in each column.
        steps: Number of denoising steps.
        scheduler: Class of the scheduler in diffusers, such as DPMSolverMultistepScheduler; defaults to the base's own.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off.
        guidance_rescale: Fraction by which guided predictions are rescaled to the standard deviation of unguided ones, in
            [0, 1]; 0.7 for adapters that were trained with zero_terminal_snr.
        height: Height of the images in pixels; defaults to the model's own.
        width: Width of the images in pixels; defaults to the model's own.
        columns: Number of images in a row of the grid of one adapter.
        dtype: dtype of the base model.
        device: Device to draw on; defaults to the first GPU, or to the CPU if there is none.
        family: Model family of the base, such as StableDiffusion or my_package.MyFamily; defaults to the family for the base's
            pipeline.
        base_adapters: Files or folders of the adapters that the adapter was trained over, such as '["first.safetensors"]', where
            they are no longer where the training read them. They are merged with the weights of the training.
        revision: Branch, tag or commit of a base on the hub; defaults to that of the adapter's training, if the base is the same.
        variant: Variant of the base's weight files, such as fp16; defaults as the revision does, or to the only one there is.
        vae: Folder, hub id or .safetensors file of a VAE to use instead of the base's; defaults as the revision does.
        base_config: For a base in one file, folder or hub id of a pipeline with its configs, tokenizers and missing parts;
            defaults as the revision does.

    Raises:
        UserError: If prompts or base are missing, or an option is out of its bounds or does not fit the others.
    """

    adapter: str | list[str] | None = None
    base: str | None = None
    prompts: str | list[str] | None = None
    negative_prompt: str = ""
    scales: float | list[float] | None = None
    combine: bool = False
    count: int = 1
    out: str = "samples.png"
    format: Literal["png", "jpg", "webp"] = "png"
    seed: int = 0
    steps: int = 25
    scheduler: str | None = None
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    height: int | None = None
    width: int | None = None
    columns: int = 4
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    family: str | None = None
    base_adapters: list[str] | None = None
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    base_config: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError('give --prompts: texts such as "a red seven on white" "a blue star", or a file of prompts')
        check_least(1, count=self.count, steps=self.steps, columns=self.columns)
        check_least(0, seed=self.seed, guidance_scale=self.guidance_scale, guidance_rescale=self.guidance_rescale)
        check_most(1, guidance_rescale=self.guidance_rescale)
        check_most(MOST_SEED, seed=self.seed)
        if not (self.base or self.adapter):
            raise UserError("give --base: a folder, a hub id or 'embedded'")
        if self.scales is not None and not self.adapter:
            raise UserError("scales are factors of adapters, and there is none; give --adapter, or leave out --scales")

    @property
    def adapters(self) -> list[str]:
        """Paths of the adapters."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter or []

    @property
    def factors(self) -> list[float]:
        """Scales, of which there is at least one."""
        return [self.scales] if isinstance(self.scales, int | float) else self.scales or [1.0]


def sample_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments with a list where an option has several values, and with a value for ``--combine``.

    Args:
        arguments: Arguments of the command line.
    """
    made = list_arguments(arguments, SampleOptions, _LISTS)
    switches = [
        i for i, one in enumerate(made) if one == "--combine" and made[i + 1 : i + 2] not in (["true"], ["false"])
    ]
    return [f"{one}=true" if i in switches else one for i, one in enumerate(made)]


def list_arguments(arguments: Sequence[str], options: type[Any], lists: Collection[str]) -> list[str]:
    """Arguments in which the several values of an option are one list.

    Args:
        arguments: Arguments of the command line.
        options: Dataclass of the command's options.
        lists: The options that take several values, such as ``--prompts``.
    """
    names = {f"--{field.name}" for field in fields(options)} | {"--config", "--help", "-h"}
    made: list[str] = []
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        count = next((i for i, one in enumerate(rest) if _is_option(one, names)), len(rest)) if name in lists else 0
        values, rest = rest[:count], rest[count:]
        if len(values) > 1:
            values = [f"[{', '.join(values)}]" if name in _NUMBERS else json.dumps(values, ensure_ascii=False)]
        made += [name, *values]
    return made


def _is_option(argument: str, names: set[str]) -> bool:
    return argument.partition("=")[0] in names or re.match(r"--[a-z]", argument) is not None
