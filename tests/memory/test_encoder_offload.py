"""Encoders that wait in host memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_lora.draws import Draws
from lit_lora.families import StableDiffusion
from lit_lora.memory.encoder_offload import EncoderOffload
from tests.helpers import make_batches


@pytest.fixture
def family(sd_folder: Path) -> StableDiffusion:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    return family


def offload_of(family: StableDiffusion) -> EncoderOffload:
    offload = EncoderOffload()
    for model in (family.vae, family.encoders["text_encoder"]):
        offload.add(model)
    return offload


def test_they_encode_the_same(family: StableDiffusion) -> None:
    [batch] = make_batches(1)
    with torch.no_grad():
        latents, conditioning = family.encode(batch, Draws(0, batch["slot"]))
    offload = offload_of(family)
    tensors = [*family.vae.parameters(), *family.vae.buffers(), *family.encoders["text_encoder"].parameters()]
    waiting = [tensor.data_ptr() for tensor in tensors]
    assert offload.nbytes >= sum(tensor.nbytes for tensor in tensors)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, offload.on_device():
            assert all(tensor.data_ptr() != pointer for tensor, pointer in zip(tensors, waiting, strict=True))
            again, conditioning_again = family.encode(batch, Draws(0, batch["slot"]))
        assert torch.equal(again, latents)
        assert torch.equal(conditioning_again["encoder_hidden_states"], conditioning["encoder_hidden_states"])
        assert [tensor.data_ptr() for tensor in tensors] == waiting
    assert not any(tensor.is_inference() for tensor in tensors)


def test_copies_go_at_the_end_of_the_outer_block(family: StableDiffusion) -> None:
    offload = offload_of(family)
    parameter = next(family.vae.parameters())
    host = parameter.data_ptr()
    with offload.on_device():
        copy = weakref.ref(parameter.untyped_storage())
        pointer = parameter.data_ptr()
        with offload.on_device():
            assert parameter.data_ptr() == pointer
        assert parameter.data_ptr() == pointer != host
    assert parameter.data_ptr() == host
    assert copy() is None


def test_they_go_back_after_an_error(family: StableDiffusion) -> None:
    offload = offload_of(family)
    parameter = next(family.vae.parameters())
    host = parameter.data_ptr()
    with pytest.raises(RuntimeError, match="while encoding"), offload.on_device():
        raise RuntimeError("while encoding")
    assert parameter.data_ptr() == host
    with offload.on_device():
        assert parameter.data_ptr() != host


def test_a_move_of_the_whole_leaves_them_where_they_are(family: StableDiffusion) -> None:
    offload = offload_of(family)
    whole = nn.ModuleDict({"family": family})
    whole.to("meta")  # a device that this machine has
    assert offload.device == torch.device("meta")
    assert all(parameter.is_meta for parameter in family.denoiser.parameters())
    for model in (family.vae, family.encoders["text_encoder"]):
        assert not any(parameter.is_meta for parameter in model.parameters())
    whole.half()
    assert offload.device == torch.device("meta")
    assert family.vae.dtype == torch.float32


def test_one_that_is_kept_stays_so(family: StableDiffusion) -> None:
    offload = offload_of(family)
    before = offload.nbytes
    offload.add(family.vae)
    assert offload.nbytes == before
