"""Images with captions from WebDataset shards, for any LightningModule."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from tqdm import tqdm

from lit_lora.datamodules.dataset import ShardDataset
from lit_lora.datamodules.framing import Framing
from lit_lora.datamodules.index import ShardIndex
from lit_lora.datamodules.loader import PlannedLoader
from lit_lora.datamodules.plan import Plan
from lit_lora.datamodules.restarting_loader import RestartingLoader
from lit_lora.datamodules.shard_paths import find_shards
from lit_lora.datamodules.table import SampleTable
from lit_lora.draws import seed_of
from lit_lora.errors import UserError

Shards = str | list[str] | None

_HINT_AFTER_S = 3.0


class WebDatasetDataModule(LightningDataModule):
    """Images with captions from tar shards in the WebDataset format.

    Shards are paths of ``.tar`` files, folders of them, globs, or braces as in ``data/shard-{000000..000099}.tar``.
    A sample is an image (``.jpg``, ``.jpeg``, ``.png``, ``.webp``) and a caption (``.txt`` or ``.json``).

    A batch is a dict: ``pixel_values`` uint8 (B, 3, R, R); ``caption`` list of str; ``original_size`` int64 (B, 2),
    height and width; ``crop_top_left`` int64 (B, 2), top and left; ``weight`` float32 (B,), 0 for a place that must not
    count; ``slot`` list of int, the number of each place in the whole run; ``key`` list of str.

    Training can be resumed at any step, with another number of loader workers, and with another number of processes
    where ``batch_size`` times that number stays the same: the batches are those of an uninterrupted run.

    Args:
        train_shards: Shards to train on.
        val_shards: Shards to validate on.
        test_shards: Shards to test on.
        val_samples: So many samples of ``train_shards`` are held out to validate on, chosen by ``seed``. It cannot be
            combined with ``val_shards``.
        batch_size: Samples in a batch of one process.
        resolution: Side of the square images in pixels; the short side is resized to it, the long side is cropped.
        center_crop: Crop the middle of training images; otherwise a random place. Validation and test images are
            always cropped in the middle.
        random_flip: Mirror half of the training images left to right.
        caption: Where captions are: ``txt``, ``json``, or null for ``.txt`` where a sample has it and else ``.json``.
        caption_key: The key of the caption in ``.json`` members.
        num_workers: Processes that read and decode for each training process; 0 does it in the training process.
        max_bad_samples: So many different samples may be damaged before training stops. Their places in the batch are
            filled by other samples with weight 0. Each process counts its own.
        seed: Decides the order, the crops, the flips, and which samples are held out.

    Raises:
        UserError: A value is out of its bounds, or ``val_shards`` and ``val_samples`` are combined.
    """

    def __init__(
        self,
        train_shards: Shards = None,
        val_shards: Shards = None,
        test_shards: Shards = None,
        val_samples: int = 0,
        batch_size: int = 1,
        resolution: int = 512,
        center_crop: bool = False,
        random_flip: bool = False,
        caption: Literal["txt", "json"] | None = None,
        caption_key: str = "caption",
        num_workers: int = 2,
        max_bad_samples: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check("val_samples", val_samples, 0)
        _check("batch_size", batch_size, 1)
        _check("resolution", resolution, 1)
        _check("num_workers", num_workers, 0)
        _check("max_bad_samples", max_bad_samples, 0)
        _check("seed", seed, 0)
        if caption not in (None, "txt", "json"):
            raise UserError(f"caption={caption!r} is not known; choose txt, json or null")
        if val_shards and val_samples:
            raise UserError(f"val_shards and val_samples={val_samples} exclude each other; drop one of them")
        self.train_shards = train_shards
        self.val_shards = val_shards
        self.test_shards = test_shards
        self.val_samples = val_samples
        self.batch_size = batch_size
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.caption = caption
        self.caption_key = caption_key
        self.num_workers = num_workers
        self.max_bad_samples = max_bad_samples
        self.seed = seed
        self._train: ShardDataset | None = None
        self._val: ShardDataset | None = None
        self._test: ShardDataset | None = None
        self._train_loader: PlannedLoader | None = None
        self._loaded_state: dict[str, int] | None = None

    def prepare_data(self) -> None:
        """Index the shards that have no index yet, once per node.

        Raises:
            UserError: A shard is missing or damaged.
        """
        for shards in (self.train_shards, self.val_shards, self.test_shards):
            if shards:
                _load_indexes(shards)

    def setup(self, stage: str) -> None:
        """Read the indexes and check that the samples are complete.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``. Prediction runs over the validation samples.

        Raises:
            UserError: There is no data for this stage, samples lack an image or a caption, or there are too few.
        """
        if stage == "test":
            if not self.test_shards:
                raise UserError("there is no data to test on; set test_shards")
            self._test = self._evaluation_data(self._table(self.test_shards))
            return
        if stage == "fit" and not self.train_shards:
            raise UserError("there is no data to train on; set train_shards")
        if stage != "fit" and not self.val_shards and not self.val_samples:
            raise UserError(f"there is no data to {stage} on; set val_shards or val_samples")
        if self.train_shards and (stage == "fit" or self.val_samples):
            self._split_train(self._table(self.train_shards))
        if self.val_shards:
            self._val = self._evaluation_data(self._table(self.val_shards))
        if stage == "fit":
            self._train_plan()  # so that too few samples are reported before the model is loaded

    def train_dataloader(self) -> PlannedLoader:
        """The loader for training, at the place where the checkpoint or the loader before it left off.

        With ``Trainer(overfit_batches=...)`` each epoch sees the same batches.

        Raises:
            UserError: The checkpoint belongs to other data, another seed or another global batch.
        """
        assert self._train is not None, "setup('fit') comes first"
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        loader = self._loader(RestartingLoader if overfit else PlannedLoader, self._train, self._train_plan())
        before = self._train_loader
        if before is not None and before.plan.global_batch_size == loader.plan.global_batch_size:
            loader.load_state_dict(before.state_dict())
        elif before is None and self._loaded_state is not None:
            loader.load_state_dict(self._loaded_state)
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> PlannedLoader | list[PlannedLoader]:
        """The loader for validation, each sample once over all processes; an empty list where there is no data."""
        return [] if self._val is None else self._evaluation_loader(self._val)

    def test_dataloader(self) -> PlannedLoader:
        """The loader for testing, each sample once over all processes."""
        assert self._test is not None, "setup('test') comes first"
        return self._evaluation_loader(self._test)

    def predict_dataloader(self) -> PlannedLoader:
        """The loader for prediction: the validation samples, each once over all processes."""
        assert self._val is not None, "setup('predict') comes first"
        return self._evaluation_loader(self._val)

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data. Lightning keeps the loader's own state too, but loses it in some cases."""
        state = self._loaded_state if self._train_loader is None else self._train_loader.state_dict()
        return {} if state is None else {"train_loader": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for the next train loader; Lightning calls this before there is one."""
        self._loaded_state = state_dict.get("train_loader")
        self._train_loader = None

    def _table(self, shards: str | list[str]) -> SampleTable:
        return SampleTable.concatenate(_load_indexes(shards))

    def _split_train(self, table: SampleTable) -> None:
        if self.val_samples >= len(table):
            raise UserError(
                f"val_samples={self.val_samples} leaves nothing of {len(table)} samples to train on; choose fewer"
            )
        order = np.random.default_rng(seed_of(self.seed, "held out")).permutation(len(table))
        framing = Framing(self.resolution, self.center_crop, self.random_flip, self.seed)
        self._train = self._dataset(table, np.sort(order[self.val_samples :]), framing)
        if self.val_samples:
            self._val = self._evaluation_data(table, np.sort(order[: self.val_samples]))

    def _evaluation_data(self, table: SampleTable, samples: NDArray[np.int64] | None = None) -> ShardDataset:
        framing = Framing(self.resolution, center_crop=True, random_flip=False, seed=self.seed)
        return self._dataset(table, np.arange(len(table)) if samples is None else samples, framing)

    def _dataset(self, table: SampleTable, samples: NDArray[np.int64], framing: Framing) -> ShardDataset:
        extensions = ("txt", "json") if self.caption is None else (self.caption,)
        return ShardDataset(table, samples, framing, extensions, self.caption_key)

    def _train_plan(self) -> Plan:
        assert self._train is not None
        return Plan(len(self._train), self.batch_size * self._world_size, self.seed)

    def _evaluation_loader(self, dataset: ShardDataset) -> PlannedLoader:
        plan = Plan(len(dataset), self.batch_size * self._world_size, self.seed, shuffle=False, leftovers="pad")
        return self._loader(RestartingLoader, dataset, plan)

    def _loader(self, kind: type[PlannedLoader], dataset: ShardDataset, plan: Plan) -> PlannedLoader:
        rank = 0 if self.trainer is None else self.trainer.global_rank
        return kind(dataset, plan, rank, self._world_size, self.num_workers, self.max_bad_samples)

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


def _load_indexes(shards: str | list[str]) -> list[ShardIndex]:
    # The bar appears only where this takes long, which is when indexes have to be made.
    paths = tqdm(find_shards(shards), "indexing shards", unit="shard", delay=_HINT_AFTER_S, leave=False)
    return [ShardIndex.load_or_build(path) for path in paths]


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}={value} is too small; it must be at least {least}")
