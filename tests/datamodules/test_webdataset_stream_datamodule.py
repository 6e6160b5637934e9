from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_lora.cli import main
from lit_lora.datamodules.decoding.captions import Captions, CaptionSource
from lit_lora.datamodules.decoding.decode import decode_rgb
from lit_lora.datamodules.decoding.framing import Framing
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.datamodules.webdataset_stream_datamodule import WebDatasetStreamDataModule
from lit_lora.errors import UserError
from tests.helpers import processes

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


class Recorder(LightningModule):
    """Trains one number and records what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int], list[str]]] = []
        self.validated: list[list[tuple[str, float]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, batch["slot"], batch["key"]))
        return self.weight * batch["pixel_values"].float().mean()

    def on_validation_epoch_start(self):
        self.validated.append([])

    def validation_step(self, batch, batch_idx):
        self.validated[-1] += zip(batch["key"], batch["weight"].tolist(), strict=True)

    def predict_step(self, batch, batch_idx):
        return batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def _data(shards, batches_per_epoch=6, **options):
    options = {"batch_size": 2, "resolution": 8, "num_workers": 0, "shuffle_buffer": 4, "seed": 4} | options
    return WebDatasetStreamDataModule([str(shard) for shard in shards], batches_per_epoch, **options)


def _process(data, rank, world_size):
    """The datamodule with a trainer of one of several processes."""
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, overfit_batches=0)
    return data


def _fit(folder, data, callbacks=(), ckpt_path=None, **options):
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


def _samples(number_of):
    return [f"{number:04}" for number in range(number_of)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_have_fixed_length_and_continue_the_stream(make_shards, num_workers):
    """With webdataset's with_epoch, two workers would make twice as many."""
    data = _data(make_shards(6, 6, 6), num_workers=num_workers, decoder=ImageDecoder(random_flip=True))
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 6
    epochs = [list(loader) for _ in range(3)]
    data.teardown("fit")
    assert [len(epoch) for epoch in epochs] == [6, 6, 6]
    slots = [slot for epoch in epochs for batch in epoch for slot in batch["slot"]]
    assert slots == list(range(36))
    orders = [[key for batch in epoch for key in batch["key"]] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert data.state_dict() == {"train_loader": {"batches": 18, "slots": 36}}


def test_the_loader_before_setup_says_what_to_call(make_shards):
    with pytest.raises(
        UserError, match=r"training shards are not read yet; call setup\('fit'\) of the datamodule first"
    ):
        _data(make_shards(2)).train_dataloader()


def test_the_rest_of_an_epoch(make_shards):
    data = _data(make_shards(6))
    data.setup("fit")
    data.load_state_dict({"train_loader": {"batches": 6 + 4, "slots": 20}})
    loader = data.train_dataloader()
    assert [batch["slot"] for batch in loader] == [[20, 21], [22, 23]]
    assert len(list(loader)) == 6


def test_fewer_shards_than_workers(make_shards):
    data = _data(make_shards(3), num_workers=2)
    data.setup("fit")
    assert [len(batch["key"]) for batch in data.train_dataloader()] == [2] * 6
    data.teardown("fit")


def test_processes_see_different_samples_in_different_slots(make_shards):
    shards = make_shards(*[2] * 10)
    seen = []
    for rank in range(2):
        data = _process(_data(shards), rank, 2)
        data.setup("fit")
        loader = data.train_dataloader()
        seen.append(list(loader))
        assert loader.state_dict() == {"batches": 6, "slots": 24}
    slots = [[slot for batch in batches for slot in batch["slot"]] for batches in seen]
    assert sorted(slots[0] + slots[1]) == list(range(24))
    assert [b["key"] for b in seen[0]] != [b["key"] for b in seen[1]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_approximate(tmp_path, caplog, make_shards, num_workers):
    shards = make_shards(*[3] * 6)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = _fit(tmp_path, _data(shards, num_workers=num_workers), [save], max_epochs=2)
    caplog.set_level("INFO")
    resumed = _fit(
        tmp_path,
        _data(shards, num_workers=num_workers, batch_size=4),
        [save],
        ckpt_path=tmp_path / "step=4.ckpt",
        max_epochs=2,
    )
    assert [number for number, _, _ in whole.seen] == list(range(6)) * 2
    assert [number for number, _, _ in resumed.seen] == [4, 5, *range(6)]
    assert [keys for _, _, keys in resumed.seen] != [keys for _, _, keys in whole.seen[4:]]
    first_slots = [slot for _, slots, _ in whole.seen[:4] for slot in slots]
    later_slots = [slot for _, slots, _ in resumed.seen for slot in slots]
    assert first_slots + later_slots == list(range(8 + 32))
    said = [record for record in caplog.records if "resuming is approximate" in record.getMessage()]
    assert len(said) == 1
    assert "after 4 batches" in said[0].getMessage()


def test_overfitting_sees_the_same_batches_in_each_epoch(tmp_path, make_shards):
    model = _fit(tmp_path, _data(make_shards(6, 6)), max_epochs=2, overfit_batches=3)
    assert len(model.seen) == 6
    assert model.seen[:3] == model.seen[3:]


def test_checkpoint_of_another_datamodule(make_shards):
    data = _data(make_shards(3))
    data.setup("fit")
    data.load_state_dict({"train_loader": {"pass": 1, "batch": 2}})
    with pytest.raises(UserError, match="the checkpoint was made with another datamodule"):
        data.train_dataloader()


def test_validation_sees_each_sample_once(tmp_path, make_shards):
    val_shards = [str(shard) for shard in make_shards(3, 2, 4, folder="val")]
    for num_workers in (0, 2):
        data = _data(make_shards(4), 2, val_shards=val_shards, val_batches=100, num_workers=num_workers)
        model = _fit(tmp_path, data, max_epochs=2)
        assert len(model.validated) == 2
        assert model.validated[0] == model.validated[1]
        assert sorted(key for key, weight in model.validated[0] if weight) == _samples(9)


def test_validation_images_are_cropped_in_the_middle_and_not_flipped(make_shards, encode_image):
    shards = [str(shard) for shard in make_shards(6)]
    data = _data(shards, val_shards=shards, val_batches=3, decoder=ImageDecoder(random_flip=True))
    data.setup("validate")
    framing = Framing(center_crop=True, random_flip=False, seed=0)
    for batch in data.val_dataloader():
        for key, pixels in zip(batch["key"], batch["pixel_values"], strict=True):
            image = decode_rgb(encode_image(seed=int(key)))
            assert torch.equal(pixels, framing(image, 0, (8, 8)).pixels)


def test_validation_is_limited_and_predicts(tmp_path, make_shards):
    shards = make_shards(6)
    data = _data(shards, val_shards=str(shards[0].parent), val_batches=2)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    assert trainer.predict(Recorder(), data) == [["0000", "0001"], ["0002", "0003"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_processes_validate_the_same_number_of_batches(make_shards, num_workers):
    shards = [str(shard) for shard in make_shards(5, 1, 1, 1)]
    seen = []
    for rank in range(3):
        data = _process(_data(shards, val_shards=shards, val_batches=5, num_workers=num_workers), rank, 3)
        data.setup("validate")
        seen.append(list(data.val_dataloader()))
    assert [len(batches) for batches in seen] == [5, 5, 5]
    counted = [key for b in seen for batch in b for key, w in zip(batch["key"], batch["weight"], strict=True) if w]
    assert sorted(counted) == _samples(8)
    slots = Counter(slot for batches in seen for batch in batches for slot in batch["slot"])
    assert set(slots.values()) == {1}
    last = seen[1][-1]
    assert last["pixel_values"].shape == (2, 3, 8, 8)
    assert last["caption"] == ["", ""]
    assert set(last) == set(seen[0][0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_skipped_up_to_the_limit(tmp_path, write_tar, encode_image, num_workers):
    members = {}
    for number in range(8):
        members[f"{number}.jpg"] = encode_image() if number % 2 else b"damaged"
        members[f"{number}.txt"] = b"x"
    shard = write_tar(tmp_path / "a.tar", members)
    data = _data([shard], 12, num_workers=num_workers, max_bad_samples=4)
    data.setup("fit")
    loader = data.train_dataloader()
    with pytest.warns(UserWarning, match=r"bad sample \d in .*a\.tar, skipped: the image") as caught:
        batches = list(loader)
    data.teardown("fit")
    assert {key for batch in batches for key in batch["key"]} == set("1357")
    assert "bad" not in batches[0]
    assert loader.num_bad_samples == len(caught) == 4

    data = _data([shard], 12, num_workers=num_workers, max_bad_samples=3, shuffle_buffer=0)
    data.setup("fit")
    with pytest.warns(UserWarning, match="bad sample"), pytest.raises(UserError) as error:
        list(data.train_dataloader())
    data.teardown("fit")
    assert "4 bad samples or shards, more than max_bad_samples=3" in str(error.value)
    assert f"\n  6 in {shard}: the image's header cannot be read" in str(error.value)


def test_shards_without_usable_samples_are_an_error(monkeypatch, make_shards):
    monkeypatch.setattr("lit_lora.datamodules.streaming.shard_stream._MAX_FAILURES_IN_A_ROW", 10)
    (shard,) = make_shards(1)
    shard.write_bytes(bytes(1024))
    data = _data([shard], max_bad_samples=5)
    data.setup("fit")
    with (
        pytest.warns(UserWarning, match="it holds no samples"),
        pytest.raises(UserError, match="contain no usable samples; check train_shards"),
    ):
        list(data.train_dataloader())


def test_captions(tmp_path, write_tar, encode_image):
    shard = write_tar(tmp_path / "a.tar", {"0.jpg": encode_image(), "0.cls": b"1", "0.txt": b"not this"})
    captions = Captions([CaptionSource("cls", class_names=["hen", "fox"], template="a {}")])
    data = _data([shard], decoder=ImageDecoder(captions=captions))
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["caption"] == ["a fox", "a fox"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches_per_epoch": 0}, "batches_per_epoch=0 is too small; it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"batch_size": 10**12}, "batch_size=1000000000000 is too large; it must be at most 65536"),
        ({"resolution": 10**9}, "resolution=1000000000 is too large; it must be at most 10000"),
        (
            {"num_workers": 5000},
            r"num_workers=5000 is too large; it must be at most \d+; this machine has \d+ processors",
        ),
        ({"shuffle_buffer": -1}, "shuffle_buffer=-1 is too small; it must be at least 0"),
        ({"val_shards": "a.tar"}, "val_shards and val_batches=None need each other"),
        ({"val_batches": 3}, "val_shards and val_batches=3 need each other"),
        ({"train_shards": "pipe:cat a.tar"}, "run shell commands; set allow_pipe: true"),
        ({"val_shards": ["a.tar", "pipe:cat b.tar"], "val_batches": 1}, "set allow_pipe: true"),
        ({"train_shards": "s3://bucket/a.tar"}, "webdataset cannot open s3://bucket/a.tar; use WebDatasetDataModule"),
        ({"train_shards": "https://host/$(touch x).tar"}, r"contains '\$', which a shell could interpret .* write %24"),
        ({"train_shards": "https://host/a.tar?x='"}, r"https://host/a\.tar contains"),
        ({"train_shards": "https://host/a.tar\nx"}, "write %0A instead"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        WebDatasetStreamDataModule(**{"train_shards": "a.tar", "batches_per_epoch": 1} | options)


@pytest.mark.parametrize("character", list("\"'`$;| \t\n"))
def test_urls_with_characters_of_a_shell(character):
    with pytest.raises(UserError, match="a shell could interpret as a command"):
        WebDatasetStreamDataModule(["a.tar", f"https://host/a{character}.tar"], 1)
    assert WebDatasetStreamDataModule(f"/data/a{character}.tar", 1)


def test_credentials_are_not_shown():
    for url in ("s4://user:SECRET@host/a.tar?token=SECRET", "https://user:SECRET@host/a;.tar?token=SECRET"):
        with pytest.raises(UserError) as error:
            WebDatasetStreamDataModule(url, 1)
        assert "SECRET" not in str(error.value)
        assert "host/a" in str(error.value)


def test_missing_data_is_reported(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"1 of 1 shards are missing, first .*nowhere\.tar"):
        _data(["nowhere.tar"]).setup("fit")
    with pytest.raises(UserError, match="no data to validate on; set val_shards and val_batches"):
        _data(["nowhere.tar"]).setup("validate")
    with pytest.raises(UserError, match="no data to test on"):
        _data(["nowhere.tar"]).setup("test")
    with pytest.raises(UserError, match="unbalanced braces"):
        _data(["https://host/{a.tar"]).setup("fit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"https://host/a\.tar is read by the program curl, which is not installed"):
        _data(["https://host/a.tar"]).setup("fit")


def test_all_forms_of_shard_names(monkeypatch, make_shards):
    shards = make_shards(1, 1)
    folder = shards[0].parent
    monkeypatch.chdir(folder.parent)
    for spec in (folder, "shards", "shards/*.tar", "shards/shard-{000000..000001}.tar", f"file://{folder}"):
        data = _data([spec], shuffle_buffer=0, batches_per_epoch=20)
        data.setup("fit")
        assert {key for batch in data.train_dataloader() for key in batch["key"]} == {"0000", "0001"}
    data = _data([f"pipe:cat {folder}/shard-{{000000..000001}}.tar"], allow_pipe=True, batches_per_epoch=20)
    data.setup("fit")
    assert {key for batch in data.train_dataloader() for key in batch["key"]} == {"0000", "0001"}


def test_colons_in_a_local_path(monkeypatch, make_shards):
    """Webdataset alone would take the text before the colon for a scheme."""
    (shard,) = make_shards(2, folder="http:")
    monkeypatch.chdir(shard.parents[1])
    data = _data(["http:/shard-000000.tar"])
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["weight"].tolist() == [1, 1]


def test_becomes_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(WebDatasetStreamDataModule, "data")
    config = parser.parse_string(
        "data: {train_shards: [a.tar, b.tar], batches_per_epoch: 10,"
        " decoder: {captions: {sources: [{extension: json, key: a.b}]}}}"
    )
    data = parser.instantiate_classes(parser.parse_string(parser.dump(config))).data
    assert data.train_shards == ["a.tar", "b.tar"]
    assert data.decoder == ImageDecoder(captions=Captions([CaptionSource("json", "a.b")]))
    with pytest.raises(Exception, match="batches_per_epoch"):
        parser.parse_string("data: {train_shards: a.tar}")


def test_command_line(tmp_path, capsys, make_shards, sd_folder):
    shards = str(make_shards(3, 3)[0].parent)
    data = {"train_shards": shards, "batches_per_epoch": 3, "val_shards": shards, "val_batches": 2, "resolution": 16}
    config = {
        "trainer": {
            "max_steps": 3,
            "max_epochs": -1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
        },
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(sd_folder)}},
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2, "target_modules": ["to_q"]}},
        },
        "data": {
            "class_path": "lit_lora.datamodules.WebDatasetStreamDataModule",
            "init_args": data | {"num_workers": 0},
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    assert main(["fit", "--config", str(file)]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", str(file), "--data.init_args.train_shards", "pipe:cat a.tar"]) == 2
    assert "set allow_pipe: true" in capsys.readouterr().err


@pytest.mark.slow
def test_spawned_workers(monkeypatch, make_shards):
    """Their environment contains neither rank nor world size."""
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn")
    )
    shards = make_shards(2, 2, 2, 2)
    data = _process(_data(shards, val_shards=[str(s) for s in shards], val_batches=2, num_workers=1), 1, 2)
    data.setup("validate")
    assert [batch["key"] for batch in data.val_dataloader()] == [["0002", "0003"], ["0006", "0007"]]


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from lit_lora.datamodules.webdataset_stream_datamodule import WebDatasetStreamDataModule


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.slots, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.slots += batch["slot"]
        return self.weight * batch["pixel_values"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += [key for key, weight in zip(batch["key"], batch["weight"].tolist()) if weight]
        self.log("loss", self.weight, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


if __name__ == "__main__":
    shards, out = sys.argv[1:]
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, default_root_dir=out, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
    )
    model = Recorder()
    data = WebDatasetStreamDataModule(
        shards, 4, val_shards=shards, val_batches=4, batch_size=2, resolution=8, num_workers=0, shuffle_buffer=4
    )
    trainer.fit(model, data)
    result = {"slots": model.slots, "validated": model.validated}
    Path(out, f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_uneven_shards_on_two_processes(tmp_path, make_shards):
    """Webdataset alone would give the processes different numbers of batches, and they would wait for each other forever."""
    shards = make_shards(2, 1, 2, 1, 2)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes([script, shards[0].parent, tmp_path], 2, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert sorted(ranks[0]["slots"] + ranks[1]["slots"]) == list(range(32))
    assert sorted(ranks[0]["validated"] + ranks[1]["validated"]) == sorted(_samples(8) * 2)


def test_other_validation_samples_have_another_digest(make_shards, tmp_path):
    """The record of the run compares it when it is resumed."""

    def digest(validation, **options):
        options = {"val_shards": validation, "val_batches": 2} | options if validation else {}
        data = _process(_data(trained, **options), 0, 2)
        data.setup("fit")
        return data.validation_digest

    trained = make_shards(6)
    (four,), (five,) = (make_shards(count, folder=str(count)) for count in (4, 5))
    moved = shutil.copytree(four.parent, tmp_path / "moved")
    told = digest(str(four))
    assert re.fullmatch(r"up to 8 of 1 shards \(\w{8}\)", told)
    assert digest(str(moved)) == told != digest(str(five))
    assert digest(str(four), val_batches=3).startswith("up to 12 of 1 shards")
    assert digest(None) == ""
    one, two = (digest(f"https://example.com/{name}.tar?token=x") for name in "ab")
    assert one != two
    assert one == digest("https://example.com/a.tar?token=y")
