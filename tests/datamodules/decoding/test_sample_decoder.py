"""A custom kind of sample, defined in one class."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_lora.datamodules import (
    BadSampleError,
    ImageDecoder,
    SampleDecoder,
    WebDatasetDataModule,
    WebDatasetStreamDataModule,
)
from lit_lora.errors import UserError


class ArrayDecoder(SampleDecoder):
    """Samples that have a NumPy array in place of an image."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length = length
        self.seed = seed

    @property
    def required(self):
        return {"array": ("npy",)}

    def __call__(self, members, slot, size, image_size):
        assert image_size == (0, 0)
        array = np.load(io.BytesIO(members["npy"]), allow_pickle=False)
        if array.shape != (self.length,):
            raise BadSampleError(f"the array has shape {array.shape}")
        return {"signal": torch.from_numpy(array), "seed": self.seed}

    def blank(self, size):
        return {"signal": torch.zeros(self.length), "seed": self.seed}

    def with_seed(self, seed):
        return type(self)(self.length, seed)


class WantsTensors(ArrayDecoder):
    @property
    def required(self):
        return {"tensors": ("pt",)}


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []
        self.val_seen: list[float] = []

    def training_step(self, batch, batch_idx):
        assert batch["seed"] == [5, 5]
        self.seen += batch["signal"][:, 0].tolist()
        return self.weight * batch["signal"].mean()

    def validation_step(self, batch, batch_idx):
        self.val_seen += batch["signal"][batch["weight"] > 0, 0].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def _npy(values):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, np.float32))
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path, write_tar):
    return write_tar(tmp_path / "a.tar", {f"{n:04}.npy": _npy([n, 0.5, 0.25]) for n in range(8)})


def test_planned_training_on_arrays(shard, trainer_options):
    data = WebDatasetDataModule(str(shard), val_samples=2, batch_size=2, decoder=ArrayDecoder(3), num_workers=2, seed=5)
    module = Recorder()
    Trainer(**trainer_options | {"max_epochs": 1, "num_sanity_val_steps": 0}).fit(module, data)
    assert sorted(module.seen + module.val_seen) == list(range(8))
    assert len(module.val_seen) == 2


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_bad_arrays_are_counted(tmp_path, write_tar, trainer_options):
    members = {f"{n:04}.npy": _npy([n] * (2 if n == 3 else 3)) for n in range(4)}
    data = WebDatasetDataModule(
        str(write_tar(tmp_path / "a.tar", members)), batch_size=2, decoder=ArrayDecoder(3), seed=5
    )
    with pytest.raises(UserError, match=r"1 bad samples, more than max_bad_samples=0(?s:.*)0003 .* has shape \(2,\)"):
        Trainer(**trainer_options | {"max_epochs": 1}).fit(Recorder(), data)


def test_required_members_are_checked_before_training(tmp_path, write_tar, encode_image):
    shard = write_tar(tmp_path / "a.tar", {"0.npy": _npy([0]), "1.jpg": encode_image()})
    with pytest.raises(UserError, match=r"1 of 2 samples have no array \(\.npy\)"):
        WebDatasetDataModule(str(shard), decoder=ArrayDecoder(1)).setup("fit")
    with pytest.raises(UserError, match=r"\.pt \(tensors\) is not indexed; use one of jpg, "):
        WebDatasetDataModule(str(shard), decoder=WantsTensors(1)).setup("fit")


@pytest.mark.parametrize(
    "datamodule", [WebDatasetDataModule, lambda **options: WebDatasetStreamDataModule("a.tar", 1, **options)]
)
def test_no_decoder_means_images_with_captions(datamodule):
    assert datamodule(decoder=None).decoder == ImageDecoder()


def test_streamed_training_on_arrays(shard, trainer_options):
    data = WebDatasetStreamDataModule(
        str(shard),
        3,
        val_shards=str(shard),
        val_batches=9,
        batch_size=2,
        decoder=ArrayDecoder(3),
        num_workers=0,
        seed=5,
    )
    module = Recorder()
    Trainer(**trainer_options | {"max_epochs": 1, "num_sanity_val_steps": 0}).fit(module, data)
    assert len(module.seen) == 6
    assert sorted(module.val_seen) == list(range(8))


@pytest.mark.filterwarnings("ignore:bad sample")
def test_streamed_samples_without_an_array_are_skipped(tmp_path, write_tar):
    shard = write_tar(tmp_path / "a.tar", {"0.npy": _npy([0, 0, 0]), "1.txt": b"x", "2.npy": _npy([2, 0, 0])})
    data = WebDatasetStreamDataModule(
        str(shard), 1, val_shards=str(shard), val_batches=1, batch_size=2, decoder=ArrayDecoder(3), num_workers=0,
        max_bad_samples=1,
    )  # fmt: skip
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["signal"][:, 0].tolist() == [0, 2]
