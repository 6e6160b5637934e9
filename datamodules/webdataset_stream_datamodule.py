"""Images with captions from a stream of WebDataset shards, for any LightningModule."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lit_lora.argument_types import check_types
from lit_lora.datamodules.batches.buckets import check_resolution
from lit_lora.datamodules.batches.plan import MAX_BATCH_SIZE
from lit_lora.datamodules.batches.read_cursor import loader_state, naming_checkpoint
from lit_lora.datamodules.decoding.captions import warn_of_changed_names
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.same_shards import tell_validated_training
from lit_lora.datamodules.indexing.shard_paths import expand_braces, find_shards
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.datamodules.set_up import set_up
from lit_lora.datamodules.streaming.restarting_stream_loader import RestartingStreamLoader
from lit_lora.datamodules.streaming.shard_stream import ShardStream
from lit_lora.datamodules.streaming.stream_loader import StreamLoader
from lit_lora.distributed.jobs import check_workers
from lit_lora.errors import UserError, check_kind, check_most, check_whole
from lit_lora.redact import redact

_PIPE = "pipe:"

_UNSAFE = re.compile(r"""[\s"'`$;|]""")

_PROGRAMS = {"gs": "gsutil", "ais": "ais"}
"""Program with which webdataset reads the URLs of a scheme; ``curl`` for all others."""

_BEGINNING = 1 << 16
"""Bytes at the beginning of a shard that tell it from another one of the same size."""


class WebDatasetStreamDataModule(LightningDataModule):
    """Images with captions from tar shards that can be neither indexed nor copied to a local disk.

    The library webdataset reads each shard from front to back. Prefer ``WebDatasetDataModule`` wherever it can be used: here a
    resumed run differs from an uninterrupted one, an epoch does not contain each sample once, and two runs are equal only
    with the same number of processes and loader workers.

    For training, each loader worker draws an endless sequence of shards at random and shuffles their samples in a buffer. For
    validation, each shard is read once over all processes and workers.

    A batch is a dict: ``pixel_values`` uint8 (B, 3, R, R); ``caption`` list of str; ``original_size`` and
    ``target_size`` int64 (B, 2), height and width; ``crop_top_left`` int64 (B, 2), top and left; ``weight`` float32
    (B,), 0 for a sample that does not count; ``slot`` list of int, the number of this occurrence of the sample in the
    whole run; ``key`` list of str.

    Args:
        train_shards: Shards to train on: paths, folders, globs, braces (``shard-{000000..000099}.tar``), or URLs that
            webdataset opens (``https://``, ``gs://``, ``hf://``, ``pipe:``), also with braces. They may be compressed.
        batches_per_epoch: Batches of one process in an epoch; the stream itself has no length.
        val_shards: Shards to validate on.
        val_batches: Maximum number of validation batches of one process.
        batch_size: Samples in a batch of one process. Defaults to 1.
        resolution: Side of the square images in pixels. Defaults to 512. Images are resized to cover the square and then
            cropped.
        decoder: Conversion of a sample's members to its entries in a batch. Defaults (also for null) to ``ImageDecoder``,
            which has the options for crops, flips and captions.
        num_workers: Processes per training process that read and decode. Defaults to 2; 0 reads in the training process.
        shuffle_buffer: Number of encoded training samples that each worker shuffles in memory. Defaults to 1000; 0 keeps
            the order of the shards.
        max_bad_samples: Number of different bad samples and damaged shards that each process skips before training stops.
            Defaults to 0.
        allow_pipe: Whether to open ``pipe:`` URLs, which run shell commands. Defaults to false.
        seed: Seed of the choice of shards, the order, the crops, the flips and the captions. Defaults to 0.

    Raises:
        UserError: If a value is out of its bounds, or a URL cannot be opened or is not safe to open.
    """

    def __init__(
        self,
        train_shards: str | list[str],
        batches_per_epoch: int,
        val_shards: str | list[str] | None = None,
        val_batches: int | None = None,
        batch_size: int = 1,
        resolution: int = 512,
        decoder: SampleDecoder | None = ImageDecoder(),  # noqa: B008 it is frozen
        num_workers: int = 2,
        shuffle_buffer: int = 1000,
        max_bad_samples: int = 0,
        allow_pipe: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_kind(SampleDecoder, "ImageDecoder()", decoder=decoder)
        check_types(WebDatasetStreamDataModule, locals())
        check_whole(1, batches_per_epoch=batches_per_epoch, batch_size=batch_size)
        check_resolution(resolution)
        check_most(MAX_BATCH_SIZE, batch_size=batch_size)
        check_whole(1, val_batches=val_batches)
        check_whole(0, num_workers=num_workers, shuffle_buffer=shuffle_buffer, max_bad_samples=max_bad_samples)
        check_whole(0, seed=seed)
        check_workers(num_workers=num_workers)
        if bool(val_shards) != (val_batches is not None):
            raise UserError(f"val_shards and val_batches={val_batches} need each other; set both or neither")
        self.train_shards = train_shards
        self.batches_per_epoch = batches_per_epoch
        self.val_shards = val_shards
        self.val_batches = val_batches
        self.batch_size = batch_size
        self.resolution = resolution
        self.decoder: SampleDecoder = ImageDecoder() if decoder is None else decoder
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        self.max_bad_samples = max_bad_samples
        self.allow_pipe = allow_pipe
        self.seed = seed
        self._train: list[str] = []
        self._val: list[str] = []
        self._train_loader: StreamLoader | None = None
        self._loaded_state: dict[str, int] | None = None
        for spec in [*_listed(train_shards), *_listed(val_shards)]:
            if _is_url(spec):
                _check_url(spec, allow_pipe)

    def setup(self, stage: str) -> None:
        """Find the shards of a stage.

        Args:
            stage: ``"fit"``, ``"validate"`` or ``"predict"``. Prediction runs over the validation samples.

        Raises:
            UserError: If there is no data for this stage, or local shards or the program that reads remote shards are missing.
        """
        if stage == "test":
            raise UserError("WebDatasetStreamDataModule has no data to test on; validate instead")
        if stage != "fit" and not self.val_shards:
            raise UserError(f"there is no data to {TrainerFn(stage).value} on; set val_shards and val_batches")
        warn_of_changed_names([self.decoder])
        if stage == "fit":
            self._train = _expand(self.train_shards)
        if self.val_shards:
            self._val = _expand(self.val_shards)
            if stage == "fit":
                tell_validated_training(self._train, self._val)
        self.validation_digest = self._validation_digest()  # a resumed run compares it

    def _validation_digest(self) -> str:
        """Most samples that are validated on, number of their shards, and a checksum of these."""
        if not self._val or self.val_batches is None:
            return ""
        named = map(_identity, self._val)
        world_size = 1 if self.trainer is None else self.trainer.world_size
        most = self.val_batches * self.batch_size * world_size
        return f"up to {most} of {len(self._val)} shards ({zlib.crc32(chr(10).join(named).encode()):08x})"

    def image_sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of every size that a batch may have: the square of ``resolution``."""
        return [(self.resolution, self.resolution)]

    def train_dataloader(self) -> StreamLoader:
        """The loader for training, which continues after the batches of the checkpoint or of the previous loader.

        With ``Trainer(overfit_batches=...)`` each epoch sees the same batches.

        Raises:
            UserError: If the checkpoint was made with another datamodule.
        """
        shards = set_up(self._train or None, "training shards", "fit")
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        stream = self._stream(shards, self.decoder, resampled=True)
        loader = (RestartingStreamLoader if overfit else StreamLoader)(
            stream, self.batches_per_epoch, self.num_workers, self.max_bad_samples
        )
        if self._train_loader is not None:
            self._train_loader.close()
            loader.load_state_dict(self._train_loader.state_dict())
        elif self._loaded_state is not None:
            with naming_checkpoint(self.trainer):
                loader.load_state_dict(self._loaded_state)
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> StreamLoader | list[StreamLoader]:
        """The loader for validation, each sample once over all processes; an empty list if there is no data."""
        if not self._val or self.val_batches is None:
            return []
        stream = self._stream(self._val, self.decoder.for_evaluation(), resampled=False)
        return RestartingStreamLoader(stream, self.val_batches, self.num_workers, self.max_bad_samples)

    def predict_dataloader(self) -> StreamLoader | list[StreamLoader]:
        """The loader for prediction: the validation samples."""
        return self.val_dataloader()

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        if self._train_loader is not None:
            self._train_loader.close()

    def state_dict(self) -> dict[str, Any]:
        """The number of batches that were trained on. Lightning also keeps the loader's own state, but loses it in some cases."""
        state = self._loaded_state if self._train_loader is None else self._train_loader.state_dict()
        return {"train_loader": state}  # also for None: Lightning's tuner restores the state before the first batch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count: of the next train loader, and of the present one, which Lightning's tuner goes on with."""
        self._loaded_state = loader_state(state_dict)
        if self._train_loader is not None:
            self._train_loader.restart(self._loaded_state)

    def _stream(self, shards: list[str], decoder: SampleDecoder, resampled: bool) -> ShardStream:
        trainer = self.trainer
        return ShardStream(
            shards,
            decoder.with_seed(self.seed),
            self.image_sizes()[0],
            self.batch_size,
            resampled,
            self.shuffle_buffer,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            max_bad_samples=self.max_bad_samples,
            seed=self.seed,
        )


def _listed(shards: str | list[str] | None) -> list[str]:
    given = [shards] if isinstance(shards, str | os.PathLike) else shards or []
    return [os.fspath(one) for one in given]


def _is_url(spec: str) -> bool:
    return spec.startswith(_PIPE) or is_remote(spec)


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _check_url(url: str, allow_pipe: bool) -> None:
    """Refuse URLs that webdataset cannot open or that could make it run commands."""
    from webdataset.gopen import gopen_schemes

    if url.startswith(_PIPE):
        if not allow_pipe:
            raise UserError(
                "shards that start with pipe: run shell commands; set allow_pipe: true if you trust their source"
            )
        return
    if _scheme(url) not in gopen_schemes:
        raise UserError(
            f"webdataset cannot open {redact(url)}; use WebDatasetDataModule with chunks.staging, or a command that writes"
            f" the shard to its output, as in 'pipe:aws s3 cp s3://… -', with allow_pipe: true"
        )
    unsafe = _UNSAFE.search(url)
    if unsafe:
        raise UserError(
            f"{redact(url)} contains {unsafe.group()!r}, which a shell could interpret as a command; write"
            f" %{ord(unsafe.group()):02X} instead"
        )


def _expand(shards: str | list[str]) -> list[str]:
    """All shards one by one; local shards as absolute paths, which webdataset does not mistake for URLs."""
    found: list[str] = []
    for spec in _listed(shards):
        if _is_url(spec):
            _check_program(spec)
            found += expand_braces(spec)
        else:
            found += [str(path.absolute()) for path in find_shards(spec.removeprefix("file://"))]
    return found


def _identity(shard: str) -> str:
    """A text that tells a shard from others: name, size and beginning of a local one, which may be moved; URL of another."""
    if _is_url(shard):
        return redact(shard)
    path = Path(shard)
    with path.open("rb") as file:
        return f"{path.name} {path.stat().st_size} {zlib.crc32(file.read(_BEGINNING)):08x}"


def _check_program(url: str) -> None:
    program = _PROGRAMS.get(_scheme(url), "curl")
    if not url.startswith(_PIPE) and shutil.which(program) is None:
        raise UserError(f"{redact(url)} is read by the program {program}, which is not installed; install it")
