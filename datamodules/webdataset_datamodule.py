"""Images with captions from WebDataset shards, for any LightningModule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lit_lora.argument_types import check_types
from lit_lora.datamodules.batches.buckets import AspectRatioBuckets, Bucketing
from lit_lora.datamodules.batches.chunked_samples import ChunkedSamples
from lit_lora.datamodules.batches.chunks import Chunks
from lit_lora.datamodules.batches.cursor import Cursor
from lit_lora.datamodules.batches.listed_samples import ListedSamples
from lit_lora.datamodules.batches.plan import MAX_BATCH_SIZE, Plan
from lit_lora.datamodules.batches.read_cursor import loader_state, naming_checkpoint, tell_other_batches
from lit_lora.datamodules.caching.of_run import is_cacheable
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.datamodules.indexing.same_shards import tell_validated_training
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.data_progress import add_data_progress
from lit_lora.datamodules.loading.dataset import ShardDataset
from lit_lora.datamodules.loading.loader import PlannedLoader
from lit_lora.datamodules.loading.open_sets import OpenSets
from lit_lora.datamodules.loading.restarting_loader import RestartingLoader
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.datamodules.set_up import set_up
from lit_lora.datamodules.shard_set import ShardSet
from lit_lora.datamodules.staging.make_stager import checked_budget, make_stager
from lit_lora.distributed.jobs import check_workers
from lit_lora.draws import seed_of
from lit_lora.errors import UserError, check_exclusive, check_kind, check_most, check_whole
from lit_lora.redact import redact

Shards = str | list[str] | None

_log = logging.getLogger(__name__)

_MUCH_DROPPED = 0.02


class WebDatasetDataModule(LightningDataModule):
    """Images with captions from tar shards in the WebDataset format.

    Shards are ``.tar`` files, folders of them, globs, or braces as in ``data/shard-{000000..000099}.tar``, on a local
    disk or as URLs that fsspec opens (``https://``, ``s3://`` …). A sample is an image (``.jpg``, ``.jpeg``, ``.png``,
    ``.webp``) and a caption (``.txt``, ``.json`` or ``.cls``), a sample of a cache that ``lit-lora cache`` made, or any
    members that a custom ``decoder`` reads.

    A batch is a dict: ``pixel_values`` uint8 (B, 3, H, W); ``caption`` list of str; ``original_size`` and
    ``target_size`` int64 (B, 2), height and width; ``crop_top_left`` int64 (B, 2), top and left; ``weight`` float32
    (B,), 0 for a sample that is not trained on; ``slot`` list of int, the number of this occurrence of the sample in the
    whole run; ``key`` list of str; ``loss_mask`` uint8 (B, 1, H, W), if the decoder reads masks.

    Training can be resumed at any step, with another number of loader workers, processes or samples in a batch: no
    sample of a pass is repeated or lost.

    Args:
        train_shards: Shards to train on.
        val_shards: Shards to validate on.
        test_shards: Shards to test on.
        val_samples: Number of samples of ``train_shards`` that are held out for validation, chosen by ``seed``; excludes
            ``val_shards``. Defaults to 0.
        batch_size: Samples in a batch of one process. Defaults to 1.
        resolution: Side of the square images in pixels. Defaults to 512. Images are resized to cover the square and then
            cropped.
        buckets: Aspect ratio buckets, which keep images near their own shape at about the same area. Defaults to null:
            square images. A batch over all processes has one shape.
        decoder: Conversion of a sample's members to its entries in a batch. Defaults (also for null) to ``ImageDecoder``,
            which has the options for crops, flips and captions.
        chunks: Options of chunked training: the number of chunks, the passes over each, and staging on a local disk.
            Defaults to one chunk that is read in place.
        num_workers: Threads per training process that read and decode ahead. Defaults to 2; 0 reads between the steps.
        max_bad_samples: Number of different bad samples that each process tolerates before training stops. Defaults to 0.
            Other samples with weight 0 replace them in the batch.
        seed: Seed of the order, the crops, the flips, the captions, and the choice of held-out samples. Defaults to 0.
        train_sets: Sets to train on, instead of ``train_shards``, each with its own repeats and decoder.

    Raises:
        UserError: If a value is out of its bounds, or two arguments exclude each other.
    """

    def __init__(
        self,
        train_shards: Shards = None,
        val_shards: Shards = None,
        test_shards: Shards = None,
        val_samples: int = 0,
        batch_size: int = 1,
        resolution: int = 512,
        buckets: AspectRatioBuckets | None = None,
        decoder: SampleDecoder | None = ImageDecoder(),  # noqa: B008 it is frozen
        chunks: Chunks = Chunks(),  # noqa: B008 it is frozen
        num_workers: int = 2,
        max_bad_samples: int = 0,
        seed: int = 0,
        train_sets: list[ShardSet] | None = None,
    ) -> None:
        super().__init__()
        check_kind(AspectRatioBuckets, "AspectRatioBuckets(divisor=64)", buckets=buckets)
        check_kind(SampleDecoder, "ImageDecoder()", decoder=decoder)
        check_kind(Chunks, "Chunks(count=10)", chunks=chunks)
        check_types(WebDatasetDataModule, locals())
        check_whole(0, val_samples=val_samples, num_workers=num_workers, max_bad_samples=max_bad_samples, seed=seed)
        check_whole(1, batch_size=batch_size)
        check_most(MAX_BATCH_SIZE, batch_size=batch_size)
        check_workers(num_workers=num_workers)
        check_exclusive(val_shards=val_shards, val_samples=val_samples)
        check_exclusive(train_shards=train_shards, train_sets=train_sets)
        self.train_shards, self.val_shards, self.test_shards = train_shards, val_shards, test_shards
        self.val_samples = val_samples
        self.batch_size = batch_size
        self.resolution = resolution
        self.buckets = buckets
        self.decoder: SampleDecoder = ImageDecoder() if decoder is None else decoder
        self.chunks = chunks
        self.num_workers, self.max_bad_samples, self.seed = num_workers, max_bad_samples, seed
        self.train_sets = train_sets
        self.cached: frozenset[str] = frozenset()
        """Parts of a batch that come from a cache, ``"latents"`` and ``"text"``; known after setup."""
        self._opened: dict[SampleTable, OpenSets] = {}
        self._train: ChunkedSamples | None = None
        self._val: ListedSamples | None = None
        self._test: ListedSamples | None = None
        self._train_loader: PlannedLoader | None = None
        self._loaded_state: dict[str, Any] | None = None
        self._restored_cursor: Cursor | None = None
        self.image_sizes()  # refuses values out of their bounds

    def prepare_data(self) -> None:
        """Index local shards that have no index yet, and copy the indexes of remote shards; called once per node.

        Raises:
            UserError: If a shard or an index is missing or damaged.
        """
        for shards in (*(one.shards for one in self.training_sets), self.val_shards, self.test_shards):
            if shards:
                open_table(shards, refresh=True)

    def setup(self, stage: str) -> None:
        """Read the indexes and check that the samples are complete and that training on them can be planned.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``. Prediction runs over the validation samples.

        Raises:
            UserError: If there is no data for this stage, samples lack an image or a caption, there are too few samples, or
                the shards of two chunks exceed the staging budget.
        """
        if stage == "test":
            if not self.test_shards:
                raise UserError("there is no data to test on; set test_shards")
            self._test = self._evaluation_data(self.test_shards)
        if stage == "fit" and not self.training_sets:
            raise UserError("there is no data to train on; set train_shards")
        if stage in ("validate", "predict") and not self.val_shards and not self.val_samples:
            raise UserError(f"there is no data to {TrainerFn(stage).value} on; set val_shards or val_samples")
        if self.training_sets and stage != "test" and (stage == "fit" or self.val_samples):
            self._split_train(self._open(self.training_sets))
        if stage != "test" and self.val_shards:
            self._val = self._evaluation_data(self.val_shards)
            if stage == "fit":
                tell_validated_training(self.train_samples.table.locations, self._val.table.locations)
        if stage == "fit":
            self._prepare_training()
        self.validation_digest = "" if self._val is None else str(self._val)  # a resumed run compares it
        tables = {samples.table for samples in (self._train, self._val, self._test) if samples is not None}
        self._opened = {table: self._opened[table] for table in tables}
        self.cached = frozenset.intersection(*(opened.cached for opened in self._opened.values()))

    @property
    def training_sets(self) -> list[ShardSet]:
        """The sets to train on; a single one of ``train_shards`` if ``train_sets`` is not given."""
        if self.train_sets:
            return self.train_sets
        return [ShardSet(self.train_shards)] if self.train_shards else []

    @property
    def decoders(self) -> list[SampleDecoder]:
        """The decoder of each set in :attr:`training_sets`; that of the datamodule if there are none."""
        return [one.decoder or self.decoder for one in self.training_sets] or [self.decoder]

    @property
    def cacheable(self) -> frozenset[str]:
        """Parts of a batch that ``lit-lora cache`` can encode, if images are cropped at the center; none of a cache."""
        decoders = [one for one in self.decoders if is_cacheable(one)]
        if self.cached or len(decoders) < len(self.decoders):
            return frozenset()
        return frozenset({"latents", "text"} if all(one.captions.fixed for one in decoders) else {"latents"})

    def image_sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of every size that a batch may have; available before :meth:`setup`.

        They let a model that needs multiples of some number of pixels check them before anything is loaded.
        """
        return [(int(height), int(width)) for height, width in self._bucketing.sizes]

    @property
    def train_samples(self) -> ChunkedSamples:
        """The training samples, after ``setup("fit")``."""
        return set_up(self._train, "training samples", "fit")

    def plan(self, world_size: int | None = None) -> Plan:
        """The plan of all training batches.

        Args:
            world_size: Number of training processes. Defaults to the trainer's.

        Raises:
            UserError: If there are too few samples.
        """
        return Plan(
            self.train_samples,
            self.batch_size * (world_size or self._world_size),
            self.seed,
            leftovers=self.chunks.leftovers,
            passes_per_chunk=self.chunks.passes,
            steps_per_chunk=self.chunks.steps,
        )

    def train_dataloader(self) -> PlannedLoader:
        """The loader for training, which continues after the checkpoint or the previous loader.

        With ``Trainer(overfit_batches=...)`` each epoch sees the same batches.

        Raises:
            UserError: If the checkpoint belongs to other data or another seed.
        """
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        before, state = self._train_loader, self._loaded_state
        resumed = before is None or before.cursor is self._restored_cursor
        if before is not None:
            state = state if resumed else before.state_dict()
            before.close()
        table, digest = self.train_samples.table, self.train_samples.repeats.digest
        repeats = {} if digest is None else {"repeats": digest}
        stager = None
        if self.chunks.staging is not None:
            stager = make_stager(self.chunks.staging, self.train_samples, self.seed, self.trainer)
        loader = (RestartingLoader if overfit else PlannedLoader)(
            self.train_dataset(None if stager is None else stager.path),
            self.plan(),
            self._rank,
            self._world_size,
            self.num_workers,
            self.max_bad_samples,
            {"shards": table.digest, "keys": table.key_digest, "bucketing": self._bucketing.digest} | repeats,
            stager,
        )
        if state is not None:
            with naming_checkpoint(self.trainer):
                loader.load_state_dict(state)
            if resumed and self._rank == 0:
                tell_other_batches(state, loader.plan, self.trainer)
        if before is not None:
            loader.bad_samples |= before.bad_samples
            loader.wordless = before.wordless
        self._train_loader = loader
        return loader

    def train_dataset(self, locate: Callable[[int], Path] | None = None) -> ShardDataset:
        """Random access to the training samples.

        Args:
            locate: Function from the number of a shard to its local file, for staged shards. Defaults to None: shards are read
                in place.
        """
        return self._opened[self.train_samples.table].dataset(locate)

    def val_dataloader(self) -> PlannedLoader | list[PlannedLoader]:
        """The loader for validation, each sample once over all processes; an empty list if there is no data."""
        if self._val is None and not (self.val_shards or self.val_samples):
            return []
        return self._evaluation_loader(set_up(self._val, "validation samples", "fit"))

    def test_dataloader(self) -> PlannedLoader:
        """The loader for testing, each sample once over all processes."""
        return self._evaluation_loader(set_up(self._test, "test samples", "test"))

    def predict_dataloader(self) -> PlannedLoader:
        """The loader for prediction: the validation samples, each once over all processes."""
        return self._evaluation_loader(set_up(self._val, "validation samples", "predict"))

    def teardown(self, stage: str) -> None:
        """End the loader threads and the staging of shards."""
        if self._train_loader is not None:
            self._train_loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """End threads and staging after an error, since Lightning then does not call :meth:`teardown`."""
        self.teardown("fit")

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data. Lightning also keeps the loader's own state, but loses it in some cases."""
        state = self._loaded_state if self._train_loader is None else self._train_loader.state_dict()
        return {"train_loader": state}  # also for None: Lightning's tuner restores the state before the first batch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position: of the next train loader, and of the present one, which Lightning's tuner goes on with."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # the position in a checkpoint under validation does not apply to a later fit
        self._loaded_state = loader_state(state_dict)
        if self._train_loader is not None:
            self._train_loader.restart(self._loaded_state)
            self._restored_cursor = self._train_loader.cursor

    def _split_train(self, opened: OpenSets) -> None:
        table, (shards, count) = opened.table, opened.without_prior()
        if self.val_samples >= len(table):
            raise UserError(
                f"val_samples={self.val_samples} leaves none of {len(table)} samples to train on; choose fewer"
            )
        if self.val_samples > count:
            raise UserError(
                f"val_samples={self.val_samples} exceeds the {count} samples that are no class images; choose fewer"
            )
        generator = np.random.default_rng(seed_of(self.seed, "held out"))
        held_out = table.nth(shards, np.sort(generator.choice(count, self.val_samples, replace=False)))
        num_chunks = self.chunks.number(len(table))
        self._train = ChunkedSamples.split(table, self._bucketing, num_chunks, self.seed, held_out, opened.repeats)
        if not self._train.counts.any():
            raise UserError(
                f"all {self._train.too_small} samples are too small for resolution={self.resolution} with"
                f" buckets.max_upscaling={self._bucketing.max_upscaling}; lower the resolution or raise buckets.max_upscaling"
            )
        opened.check_shown(self._train)
        if self.val_samples:
            self._val = ListedSamples(table, held_out, self._evaluation_bucketing)

    def _prepare_training(self) -> None:
        """Check plan and staging before the model is loaded, and add the callback :class:`DataProgress`."""
        plan = self.plan()
        dropped = plan.num_samples - plan.samples_per_round
        if dropped > _MUCH_DROPPED * plan.num_samples and self.trainer is not None and self._rank == 0:
            _log.warning(
                "each pass drops %d of %d samples, which do not fill a batch of %d in their chunk and bucket;"
                " set chunks.leftovers=pad to train on them too, or use fewer chunks, fewer buckets or smaller batches",
                dropped,
                plan.num_samples,
                plan.global_batch_size,
            )
        remote = next((location for location in self.train_samples.table.locations if is_remote(location)), None)
        if self.chunks.staging is not None:
            checked_budget(self.chunks.staging, self.train_samples)
        elif remote is not None:
            raise UserError(
                f"{redact(remote)} is not on a local disk; set chunks.staging.dir to a folder on a local disk (and chunks.count,"
                " since two chunks have to fit there), or use WebDatasetStreamDataModule"
            )
        if self.trainer is not None:
            add_data_progress(self.trainer.callbacks)  # type: ignore[attr-defined]

    def _open(self, sets: list[ShardSet], evaluation: bool = False) -> OpenSets:
        """The samples of sets, after checking that the run can use them."""
        decoders = [self.decoder.for_evaluation()] if evaluation else self.decoders
        identity = getattr(self.trainer and self.trainer.lightning_module, "cache_identity", dict)
        marked = any(one.prior for one in self.training_sets)
        opened = OpenSets.open(sets, decoders, identity(), self.resolution, self.buckets, self.seed, marked)
        self._opened[opened.table] = opened
        return opened

    def _evaluation_data(self, shards: str | list[str]) -> ListedSamples:
        table = self._open([ShardSet(shards)], evaluation=True).table
        return ListedSamples(table, np.arange(len(table)), self._evaluation_bucketing)

    @property
    def _bucketing(self) -> Bucketing:
        return Bucketing.of(self.resolution, self.buckets, None if self.buckets is None else self.buckets.max_upscaling)

    @property
    def _evaluation_bucketing(self) -> Bucketing:
        """The sizes for evaluation, for which no image is too small."""
        return Bucketing.of(self.resolution, self.buckets)

    def _evaluation_loader(self, samples: ListedSamples) -> PlannedLoader:
        return RestartingLoader(
            self._opened[samples.table].dataset(evaluation=True),
            Plan(samples, self.batch_size * self._world_size, self.seed, shuffle=False, leftovers="pad"),
            self._rank,
            self._world_size,
            self.num_workers,
            self.max_bad_samples,
        )

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size
