"""A tiny FLUX.1 Kontext pipeline."""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxKontextPipeline, FluxPipeline
from transformers import CLIPTokenizer

from lit_lora.embedded import base_path
from lit_lora.families import FluxKontext
from tests.tiny_pipelines import write_flux

FAMILY = FluxKontext


def write(folder: Path) -> Path:
    """The parts of FLUX.1-dev in the pipeline that edits."""
    write_flux(folder, CLIPTokenizer.from_pretrained(base_path(), subfolder="tokenizer"))
    FluxKontextPipeline(**FluxPipeline.from_pretrained(folder).components).save_pretrained(folder)
    return folder
