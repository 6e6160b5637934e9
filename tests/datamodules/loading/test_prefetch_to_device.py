from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_lora.datamodules import ImageDecoder, Plan, PrefetchToDevice, WebDatasetDataModule
from lit_lora.datamodules.indexing.index import ShardIndex
from lit_lora.datamodules.indexing.table import SampleTable
from lit_lora.datamodules.loading.dataset import ShardDataset
from lit_lora.datamodules.loading.device_copies import DeviceCopies
from lit_lora.datamodules.loading.loader import PlannedLoader
from lit_lora.datamodules.loading.shard_reader import ShardReader
from lit_lora.errors import UserError
from tests.datamodules.loading.test_data_progress import Module
from tests.datamodules.one_chunk import OneChunk

workers = pytest.mark.parametrize("num_workers", [0, 2])


class Copies(DeviceCopies):
    """Stands for copies on a GPU; notes which batches were begun, by which thread, and which were finished."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.begun, self.finished, self.threads = [], [], set()

    def begin(self, batch):
        self.begun.append(batch["slot"])
        self.threads.add(threading.current_thread())
        return super().begin(batch | {"copy": batch["slot"]})

    def finish(self, batch):
        self.finished.append(batch.pop("copy"))
        return super().finish(batch)


@pytest.fixture
def make_loader(make_shards):
    table = SampleTable.of([ShardIndex.build(path) for path in make_shards(5, 8)])

    def make(num_workers, copies=None):
        dataset = ShardDataset(ShardReader(table), ImageDecoder(random_flip=True))
        loader = PlannedLoader(dataset, Plan(OneChunk(13, (8, 8)), 2, seed=5), num_workers=num_workers)
        loader.copies = copies
        return loader

    return make


def _seen(batches):
    return [(sorted(batch), batch["slot"], batch["pixel_values"].tolist()) for batch in batches]


@workers
def test_order_values_and_position_are_the_same(make_loader, num_workers):
    plain, copies = make_loader(0), Copies()
    loader = make_loader(num_workers, copies)
    expected = _seen([*plain, *plain])
    assert _seen([*loader, *loader]) == expected
    assert loader.state_dict() == plain.state_dict()
    assert copies.finished == [slots for _, slots, _ in expected]
    assert sorted(copies.begun) == sorted(copies.finished)
    assert (threading.main_thread() in copies.threads) == (num_workers == 0)
    loader.close()


@workers
def test_batches_that_were_copied_ahead_are_not_lost(make_loader, num_workers):
    copies = Copies()
    first = make_loader(num_workers, copies)
    before = _seen(islice(first, 2))
    state = first.state_dict()
    first.close()
    assert state["pass_batches"] == len(copies.finished) == 2
    second = make_loader(num_workers, Copies())
    second.load_state_dict(state)
    assert before + _seen(second) == _seen(make_loader(0))
    second.close()


@workers
def test_error_of_a_copy(make_loader, num_workers):
    class Failing(Copies):
        def begin(self, batch):
            if len(self.begun) == 1:
                raise torch.OutOfMemoryError("full")
            return super().begin(batch)

    loader = make_loader(num_workers, Failing())
    batches = iter(loader)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        list(batches)
    assert loader.state_dict()["pass_batches"] <= 1
    loader.close()


def test_the_stream_that_computes_waits_for_the_copy(monkeypatch):
    waits = []
    copying = SimpleNamespace(record_event=lambda: "copied")
    computing = SimpleNamespace(wait_event=waits.append)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(waits.append(stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    copies = DeviceCopies(torch.device("cpu"))
    copies._stream = copying
    batch = copies.begin({"pixel_values": torch.ones(2), "text": {"hidden": torch.ones(1)}, "slot": [0, 1]})
    assert waits == [copying]
    batch = copies.finish(batch)
    assert waits == [copying, "copied"]
    assert set(batch) == {"pixel_values", "text", "slot"}


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_cpu_copies_nothing(make_shards, trainer_options):
    (path,) = make_shards(4)
    data = WebDatasetDataModule(str(path), resolution=8, batch_size=2)
    module = Module()
    Trainer(**trainer_options | {"callbacks": [PrefetchToDevice()], "max_epochs": 1}).fit(module, data)
    assert len(module.keys) == 4
    assert data._train_loader.copies is None


def test_other_loaders_are_refused(trainer_options):
    trainer = Trainer(**trainer_options | {"callbacks": [PrefetchToDevice()], "max_epochs": 1})
    batches = DataLoader([{"key": "a", "pixel_values": torch.zeros(1)}] * 2, num_workers=0)
    with pytest.raises(UserError, match="of WebDatasetDataModule, not of a DataLoader; remove the callback"):
        trainer.fit(Module(), batches)
