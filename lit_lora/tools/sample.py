"""``lit-lora sample``: draws images with a base model and an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from lit_lora.errors import UserError, check_least, check_most

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

# Nothing heavy is imported here, not even for type checking: jsonargparse would import it for --help.


def sample(
    adapter: str | None = None,
    base: str | None = None,
    prompts: str | list[str] | None = None,
    count: int = 1,
    out: str = "samples.png",
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 5.0,
    guidance_rescale: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    columns: int = 4,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    family: str | None = None,
    base_adapters: list[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    base_config: str | None = None,
) -> None:
    """Draw images for prompts and write them as one grid, or as one file each.

    Args:
        adapter: File or folder of the adapter, as this program, PEFT, diffusers, kohya's scripts or ComfyUI write it; defaults to
            the base model alone.
        base: Folder, hub id, .safetensors file or "embedded"; defaults to the base that the adapter was trained on.
        prompts: One text, or a list of texts such as '["a red seven", "a blue star"]'.
        count: Number of images for each prompt.
        out: File for the grid, with the ending .png, .jpg or .webp; or, without an ending, a folder for one PNG file per image.
        seed: Seed of the first image; image i is drawn from seed + i.
        steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off.
        guidance_rescale: Share in which guided predictions get back the standard deviation of unguided ones, in [0, 1]; 0.7 for
            adapters that were trained with zero_terminal_snr.
        height: Height of the images in pixels; defaults to the model's own.
        width: Width of the images in pixels; defaults to the model's own.
        columns: Number of images in a row of the grid.
        dtype: dtype of the base model.
        device: Device to draw on; defaults to the first GPU, or to the CPU if there is none.
        family: Model family of the base, such as StableDiffusion or my_package.MyFamily; defaults to the family for the base's
            pipeline.
        base_adapters: Files or folders of the adapters that the adapter was trained over, such as '["first.safetensors"]', where
            they are no longer where the training read them. They are merged with the weights of the training.
        revision: Branch, tag or commit of a base on the hub; defaults to that of the adapter's training, if the base is the same.
        variant: Variant of the base's weight files, such as fp16; defaults as the revision does.
        vae: Folder, hub id or .safetensors file of a VAE to use instead of the base's; defaults as the revision does.
        base_config: For a base in one file, folder or hub id of a pipeline with its configs, tokenizers and missing parts;
            defaults as the revision does.

    Raises:
        UserError: If prompts or base are missing, base, adapter or a size cannot be used, or another run draws into the folder.
    """
    if not prompts:
        raise UserError('give --prompts: one text, or a list as \'["a red seven on white", "a blue star"]\'')
    check_least(1, count=count, steps=steps, columns=columns)
    check_least(0, seed=seed, guidance_rescale=guidance_rescale)
    check_most(1, guidance_rescale=guidance_rescale)
    target = _target(out)
    texts = [text for text in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(count)]
    if not (base or adapter):
        raise UserError("give --base: a folder, a hub id or 'embedded'")

    from lit_lora.folder_lock import only_run_in
    from lit_lora.tools.drawing import make_generate

    with nullcontext() if target.suffix else only_run_in(target, "sample"):
        options: dict[str, Any] = {"family": family, "dtype": dtype, "device": device, "size": (height, width)}
        own = {"revision": revision, "variant": variant, "vae": vae, "config": base_config}
        given = {name: value for name, value in own.items() if value is not None}
        generate = make_generate(base, adapter, base_adapters=base_adapters or (), base_options=given, **options)
        seeds = [seed + i for i in range(len(texts))]
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
        options["guidance_rescale"] = guidance_rescale
        _write(generate(texts, seeds, **options), target, columns)


def _target(out: str) -> Path:
    target = Path(out)
    if target.suffix and target.suffix.lower() not in _FORMATS:
        raise UserError(
            f"out={out!r} has an ending that is not known; use {', '.join(_FORMATS)} for one file, or none for a folder"
        )
    if target.is_dir() if target.suffix else target.is_file():
        raise UserError(f"out={out!r} exists and is {'a folder' if target.suffix else 'a file'}; name another")
    return target


def _write(images: Sequence[Any], target: Path, columns: int) -> None:
    """Write images as one grid, or one by one into a folder if the target has no file ending."""
    from torchvision.transforms.v2.functional import to_pil_image

    from lit_lora.files import atomic_file
    from lit_lora.sampling import image_grid

    if target.suffix:
        with atomic_file(target) as part:
            to_pil_image(image_grid(images, columns)).save(part, format=_FORMATS[target.suffix.lower()], quality=95)
    else:
        for i, image in enumerate(images):
            with atomic_file(target / f"{i:04d}.png") as part:
                image.save(part, format="png")
    print(f"{len(images)} {'image' if len(images) == 1 else 'images'}: {target}")
