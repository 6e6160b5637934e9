"""Parts beside the denoiser in which a fine-tuned pipeline differs from its base."""

from __future__ import annotations

import torch

from lit_lora.adapter_tools.base_model import BaseModel
from lit_lora.adapter_tools.weight_stream import shapes_in
from lit_lora.errors import UserError
from lit_lora.formats.sampling_scheduler import scheduler_metadata
from lit_lora.objectives import DDPM
from lit_lora.tensor_reader import TensorReader

_OF_TRAINING = {
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "beta_schedule": None,
    "beta_start": None,
    "beta_end": None,
    "num_train_timesteps": None,
}
"""Entries of a scheduler's config that belong to the weights, with diffusers' values where they are not written."""


def trained_scheduler(tuned: BaseModel | None, base: BaseModel | None) -> dict[str, str]:
    """Metadata of the scheduler that a fine-tuned pipeline needs, where it was trained for another one than its base's.

    Two samplers for the same training are no difference.

    Args:
        tuned: Fine-tuned pipeline; None for a file of weights.
        base: Pipeline that it was made of; None for a file of weights.
    """
    if tuned is None or base is None or not (tuned.has("scheduler") and base.has("scheduler")):
        return {}
    there, here = base.config("scheduler"), tuned.config("scheduler")
    if all(here.get(name, default) == there.get(name, default) for name, default in _OF_TRAINING.items()):
        return {}
    names = [*_OF_TRAINING, "timestep_spacing", *(["_class_name"] if here["_class_name"] in DDPM.schedulers else [])]
    return scheduler_metadata(there, {name: here.get(name, _OF_TRAINING.get(name)) for name in names})


def other_changes(tuned: BaseModel | None, base: BaseModel | None) -> dict[str, str]:
    """What is known of the text encoders and the VAE of two pipelines that are not equal, by part.

    The weights are read one at a time.

    Args:
        tuned: Fine-tuned pipeline; None for a file of weights.
        base: Pipeline that it was made of; None for a file of weights.
    """
    if tuned is None or base is None or not (tuned.is_pipeline and base.is_pipeline):
        return {}
    found: dict[str, str] = {}
    for name in dict.fromkeys((*tuned.index, *base.index)):
        if name == "vae" or name.startswith("text_encoder"):
            told = _difference(name, tuned, base)
            found |= {name: told} if told else {}
    return found


def _difference(name: str, tuned: BaseModel, base: BaseModel) -> str:
    """How a part differs; empty if it does not."""
    having = [one for one in (tuned, base) if one.has(name)]
    if len(having) == 1:
        return f"only {having[0].path} has it"
    if not having:
        return ""
    try:
        files, others = (shapes_in(one.weight_files(name)) for one in (tuned, base))
    except UserError as error:
        return f"it cannot be compared ({error})"
    places, theirs = (
        {key: reader for file, keys in one.items() for reader in [TensorReader(file)] for key in keys}
        for one in (files, others)
    )
    if places.keys() != theirs.keys():
        return f"{len(places.keys() ^ theirs.keys())} weights are only in one of the models"
    changed = sum(
        not torch.equal(reader.tensor(key).double(), theirs[key].tensor(key).double()) for key, reader in places.items()
    )
    return f"{changed} of {len(places)} weights are changed" if changed else ""
