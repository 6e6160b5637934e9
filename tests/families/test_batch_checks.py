"""Batches of datamodules that nobody here wrote: what is not as the contract says is one error, not other training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_lora.errors import UserError
from lit_lora.families import check_batch
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches

IMAGES = torch.full((2, 3, 16, 16), 7, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": None}, "the batch has no caption, only 'pixel_values'"),
        ({"pixel_values": None}, "the batch has no pixel_values, only 'caption'"),
        ({"caption": "ab"}, "caption is str, not a list of 2 strings"),
        ({"caption": [b"a", b"b"]}, "caption is list, not a list of 2 strings"),
        ({"caption": ["a"]}, "caption has 1 entries for 2 images"),
        ({"weight": torch.ones(3)}, "weight has 3 entries for 2 images"),
        ({"pixel_values": [1, 2]}, "pixel_values is a list, not a tensor"),
        (
            {"pixel_values": IMAGES.permute(0, 2, 3, 1)},
            r"pixel_values has the shape \(2, 16, 16, 3\), not \(B, 3, H, W\)",
        ),
        ({"pixel_values": IMAGES[:, :1]}, r"the shape \(2, 1, 16, 16\)"),
        ({"pixel_values": IMAGES[..., :15]}, "takes images whose sides are multiples of 2 px, not 16 x 15"),
        ({"pixel_values": IMAGES.long()}, "pixel_values is torch.int64"),
        ({"loss_mask": torch.ones(2, 16, 16)}, r"loss_mask is \(2, 16, 16\), not a tensor \(2, 1, 16, 16\)"),
        ({"loss_mask": [1, 2]}, r"loss_mask is a list, not a tensor \(2, 1, 16, 16\)"),
        ({"pixel_values": IMAGES.float()}, "pixel_values has values from 7 to 7"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str, sd_module: LoraDiffusion) -> None:
    sd_module.configure_model()
    batch = {"pixel_values": IMAGES, "caption": ["a", "b"]}
    check_batch(sd_module.family, batch, values=True)
    changed = {key: value for key, value in (batch | change).items() if value is not None}
    with pytest.raises(UserError, match=f"{message}(.|\n)*") as caught:
        check_batch(sd_module.family, changed, values=True)
    assert "multiples" in message or "see lit_lora.families.Batch" in str(caught.value)


def test_other_batches_are_named(sd_module: LoraDiffusion) -> None:
    with pytest.raises(UserError, match="the batch is a tuple; LoraDiffusion takes a dict with pixel_values"):
        check_batch(sd_module.family, (IMAGES, ["a", "b"]), values=True)


def test_images_from_zero_to_one_warn(sd_module: LoraDiffusion) -> None:
    sd_module.configure_model()
    batch = {"pixel_values": IMAGES / 255, "caption": ["a", "b"]}
    with pytest.warns(UserWarning, match=r"no value of pixel_values is below 0, the largest is 0\.0275"):
        check_batch(sd_module.family, batch, values=True)


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_every_stage_checks(stage: str, sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    batches = [{key: value for key, value in batch.items() if key != "caption"} for batch in make_batches(1)]
    trainer = Trainer(**trainer_options)
    with pytest.raises(UserError, match="the batch has no caption"):
        getattr(trainer, stage)(sd_module, loader_of(batches))
