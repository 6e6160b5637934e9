from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.datamodules import Plan, ShardIndex, ShardSet, WebDatasetDataModule
from lit_lora.datamodules.batches.buckets import AspectRatioBuckets
from lit_lora.datamodules.batches.chunks import Chunks
from lit_lora.datamodules.decoding.captions import Captions
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.staging.staging import Staging
from lit_lora.errors import UserError
from tests.datamodules.faulty_server import FaultyServer
from tests.helpers import processes

pytestmark = [
    # Lightning says the first to everyone whose validation loaders are an empty list, the second to everyone who
    # resumes.
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

CRASH = "crash on purpose"


class Recorder(LightningModule):
    """Trains one number and records what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_seen: list[tuple[list[int], list[str], float]] = []
        self.val_seen: list[list[tuple[str, float, int]]] = []

    def training_step(self, batch, batch_idx):
        pixels = batch["pixel_values"].float()
        self.train_seen.append((batch["slot"], batch["key"], float(pixels.mean())))
        return self.weight * pixels.mean()

    def on_validation_epoch_start(self):
        self.val_seen.append([])

    def validation_step(self, batch, batch_idx):
        self.val_seen[-1] += zip(batch["key"], batch["weight"].tolist(), batch["slot"], strict=True)

    def predict_step(self, batch, batch_idx):
        return batch["key"]

    def test_step(self, batch, batch_idx):
        self.log("weights", batch["weight"].sum(), reduce_fx="sum")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class CountsShowings(Recorder):
    """Records the samples with positive weight."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: list[int] = []

    def training_step(self, batch, batch_idx):
        self.slots += [slot for slot, weight in zip(batch["slot"], batch["weight"], strict=True) if weight]
        return super().training_step(batch, batch_idx)


class Crash(Callback):
    """Raises an error before a step, which ends the run like a kill."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError(CRASH)


class ReadsSteppingBatches(Recorder):
    """Reads the estimated number of steps, which makes Lightning lose the loader's own state."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def _data(paths, **options):
    options = {"batch_size": 2, "resolution": 8, "num_workers": 0, "seed": 4} | options
    options.setdefault("decoder", ImageDecoder(random_flip=True))
    return WebDatasetDataModule([str(path) for path in paths], **options)


def _fit(folder, data, callbacks=(), ckpt_path=None, model=None, **options):
    model = model or Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


def _save_each_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize(("saving", "told"), [(ModelCheckpoint, True), (AdapterCheckpoint, False)])
def test_other_batches_are_told_where_no_callback_tells_what_changes(saving, told, tmp_path, make_shards, caplog):
    paths = make_shards(9)
    for batch_size, steps in ((2, 1), (3, 2)):
        save = saving(tmp_path / "saved", filename="last", every_n_train_steps=1, enable_version_counter=False)
        last = tmp_path / "saved" / "last.ckpt"
        data = _data(paths, batch_size=batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _fit(tmp_path, data, [save], last if last.exists() else None, max_steps=steps)
    assert ("the global batch has 3 samples, and had 2" in caplog.text) == told


# Twelve training samples make six batches a pass.
RUNS = {
    "steps": {"max_steps": 15, "max_epochs": -1},
    "epochs": {"max_epochs": 3},
    "validation within the pass": {"max_epochs": 3, "val_check_interval": 2},
    "validation across passes": {"max_steps": 15, "val_check_interval": 4, "check_val_every_n_epoch": None},
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("run", RUNS)
def test_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path, make_shards, run, num_workers):
    paths = make_shards(9, 7)
    whole = _fit(tmp_path, _data(paths, val_samples=4), **RUNS[run])

    for crash in (2, 5, 6, 7, 11) if num_workers == 0 else (5,):
        folder = tmp_path / str(crash)
        with pytest.raises(RuntimeError, match=CRASH):
            _fit(folder, _data(paths, val_samples=4), [_save_each_step(folder), Crash(crash)], **RUNS[run])
        data = _data(paths, val_samples=4, num_workers=num_workers)
        resumed = _fit(folder, data, [_save_each_step(folder)], folder / f"step={crash}.ckpt", **RUNS[run])
        assert resumed.train_seen == whole.train_seen[crash:], crash
        assert resumed.val_seen[-1] == whole.val_seen[-1]


def test_no_worker_processes_are_left(tmp_path, make_shards):
    paths = make_shards(16)
    options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    _fit(tmp_path, _data(paths, num_workers=2), **options)
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match=CRASH):
        _fit(tmp_path, _data(paths, val_samples=4, num_workers=2), [Crash(3)], max_epochs=3)
    assert multiprocessing.active_children() == []


def test_each_pass_takes_all_samples_once(tmp_path, make_shards):
    model = _fit(tmp_path, _data(make_shards(9, 3)), max_epochs=2)
    for number in range(2):
        keys = [key for _, keys, _ in model.train_seen[6 * number : 6 * number + 6] for key in keys]
        assert sorted(keys) == [f"{sample:04}" for sample in range(12)]
    slots = [slot for slots, *_ in model.train_seen for slot in slots]
    assert sorted(slots) == list(range(24))


def test_position_survives_if_lightning_drops_the_loader_state(tmp_path, make_shards):
    paths = make_shards(12)
    whole = _fit(tmp_path, _data(paths), max_epochs=2)
    save, model = _save_each_step(tmp_path), ReadsSteppingBatches()
    with pytest.raises(RuntimeError, match=CRASH):
        _fit(tmp_path, _data(paths), [save, Crash(4)], model=model, max_epochs=2)
    save, model = _save_each_step(tmp_path), ReadsSteppingBatches()
    resumed = _fit(tmp_path, _data(paths), [save], tmp_path / "step=4.ckpt", model, max_epochs=2)

    assert resumed.train_seen == whole.train_seen[4:]


def test_checkpoint_of_other_data(tmp_path, make_shards):
    paths = make_shards(12)
    _fit(tmp_path, _data(paths), [_save_each_step(tmp_path)], max_steps=2)
    data = _data(paths, seed=5)
    with pytest.raises(UserError, match="the checkpoint has seed 4, this run 5"):
        _fit(tmp_path, data, [_save_each_step(tmp_path)], tmp_path / "step=2.ckpt", max_steps=4)


def test_reloading_the_loader_continues(tmp_path, make_shards):
    paths = make_shards(12)
    whole = _fit(tmp_path, _data(paths), max_epochs=3)
    reloaded = _fit(tmp_path, _data(paths), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert reloaded.train_seen == whole.train_seen


def test_a_resolution_that_is_set_later_is_that_of_the_batches(make_shards):
    data = _data(make_shards(4))
    data.resolution = 16
    data.prepare_data()
    data.setup("fit")
    assert data.image_sizes() == [(16, 16)]
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (2, 3, 16, 16)


def test_second_fit_continues(tmp_path, make_shards):
    paths = make_shards(12)
    whole = _fit(tmp_path, _data(paths), max_epochs=2)
    data = _data(paths)
    first = _fit(tmp_path, data, max_epochs=1)
    with pytest.warns(
        UserWarning, match=r"begins at batch 1 of pass 2 .* where an earlier fit with this datamodule ended"
    ):
        second = _fit(tmp_path, data, max_epochs=1)
    assert first.train_seen + second.train_seen == whole.train_seen
    data.val_samples = 2
    with pytest.raises(UserError, match=r"goes on from its earlier fit .* make a new one .* samples 12, this run 10"):
        _fit(tmp_path, data, max_epochs=1)


def test_a_trainer_that_fits_again_continues_without_a_word(make_shards, trainer_options, recwarn):
    data = _data(make_shards(12))
    trainer = Trainer(**trainer_options | {"max_epochs": 1, "max_steps": -1})
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(Recorder(), data)
    assert not [warning for warning in recwarn if "earlier fit" in str(warning.message)]


def test_overfit_batches_repeats_the_same_batches(tmp_path, make_shards):
    model = _fit(tmp_path, _data(make_shards(12)), max_epochs=3, overfit_batches=2)
    assert model.train_seen == 3 * model.train_seen[:2]


def test_held_out_samples(tmp_path, make_shards):
    paths = make_shards(9, 7)
    model = _fit(tmp_path, _data(paths, val_samples=5), max_epochs=2)
    held_out = [key for key, weight, _ in model.val_seen[-1] if weight]
    trained = {key for _, keys, _ in model.train_seen for key in keys}

    assert len(held_out) == len(set(held_out)) == 5
    assert not trained & set(held_out)
    assert len(model.val_seen[-1]) == 6
    assert model.val_seen[-1] == model.val_seen[-2]
    other = _fit(tmp_path, _data(paths, val_samples=5, seed=5), max_epochs=1)
    assert [key for key, *_ in other.val_seen[-1]] != [key for key, *_ in model.val_seen[-1]]


def test_validate_test_and_predict(tmp_path, make_shards):
    train, other = make_shards(6), make_shards(5, folder="other")
    data = _data(train, val_shards=str(other[0]), test_shards=str(other[0].parent))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model = Recorder()

    trainer.validate(model, data, verbose=False)
    assert [key for key, weight, _ in model.val_seen[0] if weight] == [f"{number:04}" for number in range(5)]
    assert trainer.test(model, data, verbose=False) == [{"weights": 5.0}]
    predicted = [key for batch in trainer.predict(model, data) for key in batch]
    assert predicted == ["0000", "0001", "0002", "0003", "0004", "0000"]


def test_without_validation_data(make_shards):
    data = _data(make_shards(6))
    data.setup("fit")
    assert data.val_dataloader() == []
    assert len(data.train_dataloader()) == 3


def test_evaluation_does_not_draw(make_shards):
    data = _data(make_shards(6), val_samples=3)
    data.setup("fit")
    framing = data.val_dataloader()._dataset.decoder.framing
    assert framing.center_crop
    assert not framing.random_flip


def test_prepare_data_indexes_all_shards(make_shards):
    train, val, test = (make_shards(2, folder=name)[0] for name in ("train", "val", "test"))
    WebDatasetDataModule(str(train), str(val), str(test)).prepare_data()
    assert all(path.with_name(path.name + ".index").is_file() for path in (train, val, test))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is too small; it must be at least 1"),
        ({"batch_size": 10**12}, "batch_size=1000000000000 is too large; it must be at most 65536"),
        ({"resolution": 10**9}, "resolution=1000000000 is too large; it must be at most 10000"),
        (
            {"num_workers": 5000},
            r"num_workers=5000 is too large; it must be at most \d+; this machine has \d+ processors",
        ),
        ({"resolution": 0}, "resolution=0"),
        ({"val_samples": -1}, "val_samples=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"max_bad_samples": -1}, "max_bad_samples=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"val_shards": "x.tar", "val_samples": 3}, "val_shards=x.tar and val_samples=3 exclude each other"),
        ({"resolution": 500, "buckets": AspectRatioBuckets()}, "resolution=500 is not a multiple of .*choose 512"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        WebDatasetDataModule("train.tar", **options)


def test_missing_data_is_reported_by_stage(make_shards):
    with pytest.raises(UserError, match="no data to train on; set train_shards"):
        WebDatasetDataModule().setup("fit")
    data = _data(make_shards(3))
    with pytest.raises(UserError, match="no data to validate on; set val_shards or val_samples"):
        data.setup("validate")
    with pytest.raises(UserError, match="no data to test on; set test_shards"):
        data.setup("test")


def test_loaders_before_setup_say_what_to_call(make_shards):
    data = _data(make_shards(4), val_samples=2, test_shards="test.tar")
    for make, stage in (
        (data.plan, "fit"),
        (data.train_dataloader, "fit"),
        (data.val_dataloader, "fit"),
        (data.test_dataloader, "test"),
        (data.predict_dataloader, "predict"),
    ):
        with pytest.raises(
            UserError, match=rf"samples are not read yet; call setup\('{stage}'\) of the datamodule first"
        ):
            make()


def test_too_few_samples_are_reported_in_setup(make_shards):
    paths = make_shards(3)
    with pytest.raises(UserError, match="3 samples do not fill one batch of 4"):
        _data(paths, batch_size=4).setup("fit")
    with pytest.raises(UserError, match="val_samples=3 leaves none of 3 samples"):
        _data(paths, val_samples=3).setup("fit")


@pytest.mark.parametrize(("count", "told"), [(101, False), (102, True)])
def test_samples_that_fill_no_batch_are_told_above_two_percent(make_shards, trainer_options, count, told, caplog):
    data = _data(make_shards(count), batch_size=99)
    data.trainer = Trainer(**trainer_options)
    data.setup("fit")
    assert (f"each pass drops {count - 99} of {count} samples" in caplog.text) == told


@pytest.mark.parametrize("options", [{}, {"chunks": 3}, {"chunks": 2, "buckets": AspectRatioBuckets(8)}])
def test_another_batch_size_neither_repeats_nor_loses_samples(tmp_path, make_shards, options):
    paths = make_shards(8, 8, 8)
    options = {"resolution": 16} | options | {"chunks": Chunks(options.get("chunks", 1), leftovers="pad")}
    first, second = CountsShowings(), CountsShowings()
    with pytest.raises(RuntimeError, match=CRASH):
        _fit(tmp_path, _data(paths, **options), [_save_each_step(tmp_path), Crash(5)], model=first, max_epochs=2)
    data = _data(paths, batch_size=5, **options)
    _fit(tmp_path, data, [_save_each_step(tmp_path)], tmp_path / "step=5.ckpt", second, max_epochs=2)

    shown = first.slots + second.slots
    assert sorted(shown) == list(range(48))
    assert sorted(shown[:24]) == list(range(24))


def test_buckets_and_sdxls_conditioning(tmp_path, write_tar, encode_image):
    sizes = {"square": (90, 90), "wide": (180, 90), "tall": (90, 180), "small": (20, 30)}
    members = {}
    for name, (width, height) in sizes.items():
        for number in range(4):
            members[f"{name}{number}.png"] = encode_image(width, height, "PNG")
            members[f"{name}{number}.txt"] = b"x"
    shard = write_tar(tmp_path / "x.tar", members)
    data = _data([shard], resolution=64, buckets=AspectRatioBuckets(16, max_upscaling=1.0), val_samples=2)
    data.setup("fit")

    seen = set()
    for batch in data.train_dataloader():
        (name,) = {key[:-1] for key in batch["key"]}
        seen.add(name)
        height, width = batch["pixel_values"].shape[-2:]
        original, target = batch["original_size"], batch["target_size"]
        assert original.tolist() == [list(sizes[name][::-1])] * 2
        assert target.tolist() == [[height, width]] * 2
        assert height * width <= 64**2
        assert height % 16 == width % 16 == 0
        assert (width > height, width < height) == (name == "wide", name == "tall")
        scale = (target / original).amax(dim=1, keepdim=True)
        assert (batch["crop_top_left"] <= (original * scale - target).ceil()).all()
    assert seen == {"square", "wide", "tall"}
    # Held-out samples are all evaluated, each in its own shape.
    assert sum(batch["weight"].sum() for batch in data.val_dataloader()) == 2


def test_all_samples_too_small(make_shards):
    with pytest.raises(
        UserError, match=r"all 16 samples are too small for resolution=.* with buckets.max_upscaling=1\.5"
    ):
        _data(make_shards(16), resolution=64, buckets=AspectRatioBuckets(max_upscaling=1.5)).setup("fit")


@pytest.fixture
def server(make_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_shards(4, 4, 4)
    DataIndex.load_or_build(paths)
    server = FaultyServer(paths[0].parent)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("buckets", "sizes"),
    [
        (None, [(64, 64)]),
        (AspectRatioBuckets(32, 4.0), [(128, 32), (96, 32), (64, 64), (32, 96), (32, 128)]),
    ],
)
def test_image_sizes_are_known_without_data(buckets, sizes):
    assert WebDatasetDataModule(resolution=64, buckets=buckets).image_sizes() == sizes


def test_shard_that_is_named_twice(make_shards):
    paths = make_shards(4, 4)
    with pytest.raises(UserError, match=r"shard-000001.tar is named more than once; name each shard once"):
        _data([paths[0].parent, paths[1]]).setup("fit")


def test_staged_run_sees_what_a_local_one_sees(tmp_path, server):
    options = {"val_samples": 2, "num_workers": 2}
    staged_chunks = Chunks(3, staging=Staging(str(tmp_path / "stage")))
    local = _fit(tmp_path, _data([server.folder], chunks=Chunks(3), **options), max_epochs=2)
    staged = _fit(tmp_path, _data([server.url], chunks=staged_chunks, **options), max_epochs=2)

    assert staged.train_seen == local.train_seen
    assert staged.val_seen == local.val_seen
    assert multiprocessing.active_children() == []
    slow = _fit(tmp_path, _data([server.folder], chunks=staged_chunks, **options), max_epochs=2)
    assert slow.train_seen == local.train_seen


def test_crash_ends_the_stager(tmp_path, server):
    data = _data([server.url], chunks=Chunks(3, staging=Staging(str(tmp_path / "stage"))))
    with pytest.raises(RuntimeError, match=CRASH):
        _fit(tmp_path, data, [Crash(3)], max_epochs=2)
    assert data._train_loader._stage._process is None
    assert not list((tmp_path / "stage").glob("lit_lora-job-*"))


def test_unavailable_shard_ends_the_run(tmp_path, server):
    server.fault = lambda path: 404 if path.endswith("000001.tar") else None
    data = _data([server.url], chunks=Chunks(3, staging=Staging(str(tmp_path / "stage"))))
    with pytest.raises(UserError, match=r"shard-000001.tar.*404"):
        _fit(tmp_path, data, max_epochs=1)


def test_remote_shards_need_staging(server, tmp_path):
    with pytest.raises(UserError, match=r"http://127.0.0.1:.* is not on a local disk; set chunks.staging.dir"):
        _data([server.url]).setup("fit")
    with pytest.raises(UserError, match=r"budget for staged shards is 5.0 kB .* the two largest of 3 chunks have"):
        _data([server.url], chunks=Chunks(3, staging=Staging(str(tmp_path), "5 kB"))).setup("fit")


def test_package_exports_load_lazily():
    code = (
        "import sys, lit_lora.datamodules as d; heavy = {'torch', 'lightning', 'numpy', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy; assert d.Plan.__name__ == 'Plan'; assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert ShardIndex.__module__ == "lit_lora.datamodules.indexing.index"
    assert Plan.__module__ == "lit_lora.datamodules.batches.plan"


def test_becomes_yaml(tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(WebDatasetDataModule, "data")
    config = parser.parse_args(
        [
            "--data.train_shards=[a.tar, b.tar]",
            "--data.decoder.captions.dropout=0.1",
            "--data.decoder.random_flip=true",
            "--data.chunks.count=4",
            "--data.chunks.staging={dir: x, budget: 3GB}",
            "--data.buckets.divisor=32",
            "--data.batch_size=3",
        ]
    )
    again = parser.parse_string(parser.dump(config))
    data = parser.instantiate_classes(again).data
    assert data.decoder == ImageDecoder(random_flip=True, captions=Captions(dropout=0.1))
    assert data.decoder == parser.instantiate_classes(config).data.decoder
    assert data.chunks == Chunks(4, staging=Staging("x", "3GB"))
    assert data.buckets == AspectRatioBuckets(divisor=32)
    assert data.train_shards == ["a.tar", "b.tar"]


def _two_sets(make_shards, **options):
    """Nine samples with two and a half repeats, and eight with half of one, four of which are class images."""
    dogs, cats = make_shards(9, folder="dogs"), make_shards(4, folder="cats") + make_shards(4, folder="more")
    subject = ImageDecoder(random_flip=True, captions=Captions(prefix="sks "))
    sets = [ShardSet(str(dogs[0]), 2.5, subject), ShardSet([str(path) for path in cats], 0.5, prior=True)]
    return WebDatasetDataModule(train_sets=sets, resolution=8, num_workers=0, seed=4, **{"batch_size": 1} | options)


def test_each_pass_shows_sets_as_often_as_their_repeats_say(tmp_path, make_shards):
    data = _two_sets(make_shards, val_samples=1)
    data.prepare_data()
    data.setup("fit")
    passes = [list(data.train_dataloader()) for _ in range(4)]
    for batches in passes:
        assert [batch["prior"] for batch in batches].count([False]) == 20
        assert [batch["prior"] for batch in batches].count([True]) == 4
        assert all(batch["caption"][0].startswith("sks ") is not batch["prior"][0] for batch in batches)
    slots = [batch["slot"][0] for batches in passes for batch in batches]
    assert len(slots) == len(set(slots))
    [held_out] = data.val_dataloader()
    assert held_out["prior"] == [False]
    assert held_out["caption"][0].startswith("sks ")
    trained = {batch["key"][0] for batches in passes for batch in batches if not batch["prior"][0]}
    assert held_out["key"][0] not in trained
    assert len(trained) == 8


@pytest.mark.parametrize("buckets", [None, AspectRatioBuckets(8)])
def test_a_resumed_run_over_sets_neither_repeats_nor_loses_samples(tmp_path, make_shards, buckets):
    """Nor with another batch size, from the middle of a pass."""
    whole = _fit(tmp_path, _two_sets(make_shards, buckets=buckets), max_epochs=2)
    assert len(whole.train_seen) == 2 * (23 + 4)  # 22.5 rounds to 23
    first = _fit(tmp_path, _two_sets(make_shards, buckets=buckets), [_save_each_step(tmp_path)], max_steps=7)
    data = _two_sets(make_shards, buckets=buckets, batch_size=2)
    rest = _fit(tmp_path, data, [_save_each_step(tmp_path)], tmp_path / "step=7.ckpt", max_epochs=1)
    one_pass = [slot for seen in (first, rest) for slots, *_ in seen.train_seen for slot in slots]
    assert sorted(one_pass) == sorted(slot for slots, *_ in whole.train_seen[:27] for slot in slots)


def _sets_with_shares(make_shards, **options):
    """Six samples with two repeats, 12 showings, beside ten samples of 30 % and three of 20 % of a pass of 24."""
    (base,), large, (small,) = (make_shards(n, folder=f"of {n}") if n != 10 else make_shards(5, 5) for n in (6, 10, 3))
    sets = [
        ShardSet(str(base), 2),
        ShardSet([str(path) for path in large], share=0.3),
        ShardSet(str(small), share=0.2, decoder=ImageDecoder(captions=Captions(prefix="small "))),
    ]
    return WebDatasetDataModule(train_sets=sets, resolution=8, num_workers=0, seed=4, **{"batch_size": 1} | options)


@pytest.mark.parametrize("options", [{}, {"buckets": AspectRatioBuckets(8), "chunks": Chunks(count=2)}])
def test_sets_have_their_shares_of_each_pass(make_shards, options):
    data = _sets_with_shares(make_shards, **options)
    data.setup("fit")
    shards = data.train_samples.table.shard_of
    for _ in range(3):
        shown = Counter(slot % data.train_samples.total for batch in data.train_dataloader() for slot in batch["slot"])
        per_set = [[], [], []]
        for sample in range(19):
            per_set[(0, 1, 1, 2)[shards(sample)]].append(shown[sample])
        assert [sum(times) for times in per_set] == [12, 7, 5]  # 7.2 and 4.8, rounded
        assert [(min(times), max(times)) for times in per_set] == [(2, 2), (0, 1), (1, 2)]


def test_a_resumed_run_over_shares_neither_repeats_nor_loses_samples(tmp_path, make_shards):
    whole = _fit(tmp_path, _sets_with_shares(make_shards), max_epochs=1)
    first = _fit(tmp_path, _sets_with_shares(make_shards), [_save_each_step(tmp_path)], max_steps=7)
    data = _sets_with_shares(make_shards, batch_size=1)
    rest = _fit(tmp_path, data, [_save_each_step(tmp_path)], tmp_path / "step=7.ckpt", max_epochs=1)
    together = [slot for seen in (first, rest) for slots, *_ in seen.train_seen for slot in slots]
    assert sorted(together) == sorted(slot for slots, *_ in whole.train_seen for slot in slots)
    # On two processes, batches of the plan hold the same samples.
    alone, two = (
        [slot for batch, _ in islice(plan.walk(plan.start()), plan.batches_per_pass) for slot in batch.slots.tolist()]
        for plan in (data.plan(1), data.plan(2))
    )
    assert sorted(alone) == sorted(two)
    assert len(alone) == 24


def test_shares_that_cannot_be_planned(make_shards):
    first, second, third = (str(make_shards(4, folder=folder)[0]) for folder in "abc")

    def setup(*sets, **options):
        WebDatasetDataModule(train_sets=list(sets), resolution=8, **options).setup("fit")

    with pytest.raises(UserError, match=r"the shares of train_sets add up to 1.1; they must leave"):
        setup(ShardSet(first), ShardSet(second, share=0.5), ShardSet(third, share=0.6))
    with pytest.raises(UserError, match=r"all 2 sets of train_sets have a share"):
        setup(ShardSet(first, share=0.5), ShardSet(second, share=0.5))
    with pytest.raises(UserError, match=r"share=0.01 of .*b.* shows none of its 4 samples in a pass; raise share"):
        setup(ShardSet(first), ShardSet(second, share=0.01))
    with pytest.raises(UserError, match=r"share=0.9999 of .*b.* shows its 4 samples more than 10,000 times"):
        setup(ShardSet(first, 5), ShardSet(second, share=0.9999))


def test_a_checkpoint_of_other_repeats(tmp_path, make_shards):
    paths = make_shards(4, folder="a") + make_shards(4, folder="b")

    def data(*repeats):
        sets = [ShardSet(str(path), times) for path, times in zip(paths, repeats, strict=True)]
        return WebDatasetDataModule(train_sets=sets, resolution=8, num_workers=0)

    _fit(tmp_path, data(1, 2), [_save_each_step(tmp_path)], max_steps=1)
    with pytest.raises(UserError, match=r"has repeats .* restore the repeats of train_sets"):
        _fit(tmp_path, data(2, 1), [_save_each_step(tmp_path)], tmp_path / "step=1.ckpt", max_steps=2)


def test_sets_that_cannot_be_trained_together(make_shards):
    first, second = (str(make_shards(4, folder=folder)[0]) for folder in "ab")

    def setup(*sets, **options):
        WebDatasetDataModule(train_sets=list(sets), resolution=8, **options).setup("fit")

    with pytest.raises(UserError, match=r"a/shard-000000.tar is named more than once"):
        setup(ShardSet(first), ShardSet([second, first]))
    with pytest.raises(UserError, match=r"loss_mask is missing in the first and uint8 \(1, 8, 8\) in the second"):
        setup(ShardSet(first), ShardSet(second, decoder=ImageDecoder(mask="alpha")))
    with pytest.raises(UserError, match=r"repeats=0.1 of .*b.* shows none of its 4 samples"):
        setup(ShardSet(first), ShardSet(second, 0.1))
    with pytest.raises(UserError, match="val_samples=5 exceeds the 4 samples that are no class images"):
        setup(ShardSet(first), ShardSet(second, prior=True), val_samples=5)
    with pytest.raises(UserError, match=r"train_shards=shards and train_sets=.* exclude each other"):
        WebDatasetDataModule("shards", train_sets=[ShardSet("more")])


SCRIPT = """
import json, sys
from pathlib import Path
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
import torch
from lit_lora.datamodules import ImageDecoder, ShardSet, WebDatasetDataModule


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.val_seen = [], []

    def training_step(self, batch, batch_idx):
        pixels = batch["pixel_values"].float()
        self.seen.append(list(zip(batch["slot"], batch["key"])))
        return self.weight * pixels.mean()

    def validation_step(self, batch, batch_idx):
        self.val_seen += zip(batch["key"], batch["weight"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


if __name__ == "__main__":
    shards, out, ckpt_path = sys.argv[1:4]
    save = ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=8, default_root_dir=out, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[save],
    )
    model = Recorder()
    sets = [ShardSet(shards + "/shard-000000.tar"), ShardSet(shards + "/shard-000001.tar", 0.5, prior=True)]
    data = WebDatasetDataModule(
        None, val_samples=4, batch_size=1, resolution=8, num_workers=1, decoder=ImageDecoder(random_flip=True), seed=4,
        train_sets=sets,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path or None)
    result = {"seen": model.seen, "val": model.val_seen}
    Path(out, f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
"""


def _run_pair(out, shards, ckpt_path=""):
    """The global batches that the two processes of a run saw."""
    out.mkdir()
    script = out / "script.py"
    script.write_text(SCRIPT)
    processes([script, shards, out, ckpt_path], 2, out)
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    seen = [low + high for low, high in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    return seen, ranks[0]["val"] + ranks[1]["val"]


@pytest.mark.slow
def test_other_numbers_of_processes_see_the_same_global_batches(tmp_path, make_shards):
    paths = make_shards(9, 8)

    def data():
        sets = [ShardSet(str(paths[0])), ShardSet(str(paths[1]), 0.5, prior=True)]
        return _data([], val_samples=4, train_sets=sets)

    save = _save_each_step(tmp_path / "alone")
    alone = _fit(tmp_path, data(), [save], max_steps=8)
    counts = Counter(key for _, keys, _ in alone.train_seen for key in keys)
    # Two passes, in each of which nine samples make four batches: 5 that are not held out and 4 of 8 class images.
    assert len(counts) >= 9
    assert sum(counts.values()) == 16
    whole = [[list(pair) for pair in zip(slots, keys, strict=True)] for slots, keys, _ in alone.train_seen]

    seen, val = _run_pair(tmp_path / "pair", paths[0].parent)
    assert seen == whole
    counted = [key for key, weight in val if weight]
    assert sorted(counted) == sorted(key for seen in alone.val_seen[-2:] for key, weight, _ in seen if weight)
    assert _run_pair(tmp_path / "again", paths[0].parent, tmp_path / "alone" / "step=5.ckpt")[0] == whole[5:]

    save = _save_each_step(tmp_path / "pair")
    resumed = _fit(tmp_path, data(), [save], tmp_path / "pair" / "step=3.ckpt", max_steps=8)
    assert resumed.train_seen == alone.train_seen[3:]
