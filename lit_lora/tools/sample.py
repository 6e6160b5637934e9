"""``lit-lora sample``: pictures from a base model with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from lit_lora.errors import UserError


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
) -> None:
    """Draw pictures and write them as one grid.

    Args:
        adapter: Folder with adapter_config.json, or nothing to draw with the base alone.
        base: Folder, hub id or "embedded"; by default what the adapter was trained on.
        prompts: What to draw: one text, or a list as '["a red seven", "a blue star"]'.
        count: Pictures of each prompt.
        out: PNG file for the grid; a name without ending makes a folder with one PNG for each picture.
        seed: Picture i is drawn from seed + i.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 turns it off.
        height: Of a picture in pixels; the model's own by default.
        width: Of a picture in pixels; the model's own by default.
        columns: Pictures in a row of the grid.
        dtype: Precision of the base model.
        device: By default the first GPU if there is one, else the CPU.
    """
    if not prompts:
        raise UserError('give --prompts: one text, or a list as \'["a red seven on white", "a blue star"]\'')
    texts = [text for text in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(count)]
    config = _adapter_config(adapter)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            "give --base: a folder, a hub id or 'embedded'" + (" (the adapter names none)" if adapter else "")
        )

    import torch
    from diffusers import DiffusionPipeline
    from peft import PeftModel
    from torchvision.utils import save_image

    from lit_lora.embedded import resolve
    from lit_lora.files import atomic_file
    from lit_lora.sampling import generate, image_grid

    try:
        pipeline = DiffusionPipeline.from_pretrained(resolve(base), dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the base {base!r}: {error}") from error
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    if adapter:
        # In place: the pipeline's own denoiser has the adapter's layers from here on.
        PeftModel.from_pretrained(getattr(pipeline, denoiser), adapter)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    seeds = [seed + i for i in range(len(texts))]
    images = generate(
        pipeline, texts, seeds, num_inference_steps=steps, guidance_scale=guidance_scale, height=height, width=width
    )
    target = Path(out)
    if target.suffix:
        with atomic_file(target) as part:
            save_image(image_grid(images, columns), part, format="png")
    else:
        for i, image in enumerate(images):
            with atomic_file(target / f"{i:04d}.png") as part:
                image.save(part, format="png")
    print(f"{len(images)} pictures: {target}")


def _adapter_config(adapter: str | None) -> dict[str, str]:
    if adapter is None:
        return {}
    path = Path(adapter) / "adapter_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter} is no adapter folder: cannot read {path.name} ({error})") from error
