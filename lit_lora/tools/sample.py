"""``lit-lora sample``: draws images with a base model and an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_lora.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lit_lora.families import ModelFamily


def sample(
    adapter: str | None = None,
    base: str | None = None,
    prompts: str | list[str] | None = None,
    count: int = 1,
    out: str = "samples.png",
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    columns: int = 4,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    family: str | None = None,
) -> None:
    """Draw images for prompts and write them as one grid, or as one file each.

    Args:
        adapter: Folder of the adapter, with adapter_config.json; defaults to the base model alone.
        base: Folder, hub id or "embedded"; defaults to the base that the adapter was trained on.
        prompts: One text, or a list of texts such as '["a red seven", "a blue star"]'.
        count: Number of images for each prompt.
        out: PNG file for the grid, or, if the name has no ending, a folder for one PNG file per image.
        seed: Seed of the first image; image i is drawn from seed + i.
        steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off.
        height: Height of the images in pixels; defaults to the model's own.
        width: Width of the images in pixels; defaults to the model's own.
        columns: Number of images in a row of the grid.
        dtype: dtype of the base model.
        device: Device to draw on; defaults to the first GPU, or to the CPU if there is none.
        family: Model family of the base, such as StableDiffusion or my_package.MyFamily; defaults to the family for the base's
            pipeline.

    Raises:
        UserError: If prompts or base are missing, the base or the adapter cannot be loaded, or the family cannot draw images of
            this size.
    """
    if not prompts:
        raise UserError('give --prompts: one text, or a list as \'["a red seven on white", "a blue star"]\'')
    texts = [text for text in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(count)]
    config = _adapter_config(adapter)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            "give --base: a folder, a hub id or 'embedded'"
            + (" (the adapter does not name its base)" if adapter else "")
        )

    import torch

    kind = _family_class(family, base)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments = (base, adapter, getattr(torch, dtype), device)
    size = (height, width)
    generate = _from_pipeline(*arguments, config) if kind is None else _from_family(kind, *arguments, size)
    seeds = [seed + i for i in range(len(texts))]
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    _write(generate(texts, seeds, **options), Path(out), columns)


def _write(images: Sequence[Image.Image], target: Path, columns: int) -> None:
    """Write images as one grid, or one by one into a folder if the target has no file ending."""
    from torchvision.utils import save_image

    from lit_lora.files import atomic_file
    from lit_lora.sampling import image_grid

    if target.suffix:
        with atomic_file(target) as part:
            save_image(image_grid(images, columns), part, format="png")
    else:
        for i, image in enumerate(images):
            with atomic_file(target / f"{i:04d}.png") as part:
                image.save(part, format="png")
    print(f"{len(images)} images: {target}")


def _from_family(
    kind: type[ModelFamily],
    base: str,
    adapter: str | None,
    dtype: torch.dtype,
    device: str,
    size: tuple[int | None, int | None],
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of a known family and the adapter; the size is checked before weights are read."""
    from peft import PeftModel

    from lit_lora.families import check_size

    family = kind(base)
    family.read_configs()
    check_size(family, *(edge or family.default_size for edge in size))
    family.load(dtype)
    if adapter:
        PeftModel.from_pretrained(family.denoiser, adapter)  # in place
    return family.to(device).generate


def _from_pipeline(
    base: str, adapter: str | None, dtype: torch.dtype, device: str, config: Mapping[str, Any]
) -> Callable[..., list[Image.Image]]:
    """Function that draws with a base of no known family, through its diffusers pipeline, and the adapter."""
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    from lit_lora.embedded import resolve
    from lit_lora.sampling import generate

    try:
        pipeline = DiffusionPipeline.from_pretrained(resolve(base), dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the base {base!r}: {error}") from error
    if adapter:
        PeftModel.from_pretrained(_adapted_part(pipeline, config), adapter)
    pipeline.set_progress_bar_config(disable=True)
    return partial(generate, pipeline.to(device))


def _family_class(family: str | None, base: str) -> type[ModelFamily] | None:
    """The family of this name or import path, or the one for the base's pipeline; None if there is none."""
    import lit_lora
    from lit_lora.families import ModelFamily, ModelSource, family_of

    if family is None:
        return family_of(str(ModelSource(base).index().get("_class_name")))
    path, _, name = family.rpartition(".")
    try:
        kind = getattr(import_module(path) if path else lit_lora, name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"family={family!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, ModelFamily)):
        raise UserError(f"family={family!r} is not a subclass of lit_lora.ModelFamily")
    return kind


def _adapted_part(pipeline: Any, config: Mapping[str, Any]) -> Any:
    """The part of a pipeline that an adapter was made for, whose class PEFT's config names."""
    wanted = (config.get("auto_mapping") or {}).get("base_model_class")
    components = pipeline.components
    if wanted is None:
        parts = [components[name] for name in ("transformer", "unet") if name in components]
    else:
        parts = [part for part in components.values() if type(part).__name__ == wanted]
    if not parts:
        raise UserError(
            f"the adapter was made for a {wanted}, which {type(pipeline).__name__} does not have; set --base to the "
            f"base that the adapter was trained on"
        )
    return parts[0]


def _adapter_config(adapter: str | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    from lit_lora.formats.peft import read_config

    return read_config(Path(adapter))
