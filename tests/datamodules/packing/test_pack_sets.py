from __future__ import annotations

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from lit_lora.cli import main
from lit_lora.datamodules.packing.pack_sets import find_sets, pack_sets, repeats_of
from lit_lora.datamodules.packing.source_sets import SourceSet, SourceSets
from lit_lora.errors import UserError
from tests.helpers import contents_of_shards

TOML = """
[[datasets]]
resolution = 8
[[datasets.subsets]]
image_dir = "img/3_dog"
num_repeats = 3
caption_extension = ".txt"
class_tokens = "sks dog"
flip_aug = true
[[datasets.subsets]]
image_dir = "img/1_cat"
is_reg = true
class_tokens = "a cat"
"""


@pytest.fixture
def images(tmp_path, encode_image, monkeypatch):
    """Three dogs, two of them with captions, and four cats without."""
    for folder, count in (("3_dog", 3), ("1_cat", 4)):
        (tmp_path / "img" / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "img" / folder / f"{number}.jpg").write_bytes(encode_image(seed=number))
    (tmp_path / "img" / "3_dog" / "0.txt").write_text("a dog runs")
    (tmp_path / "img" / "3_dog" / "1.txt").write_text("a dog sits")
    (tmp_path / "dataset.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _data_of(config):
    """The datamodule of a config, as ``lit-lora fit`` makes it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = config["data"] | {"class_path": "lit_lora.datamodules.WebDatasetDataModule"}
    data["init_args"] |= {"num_workers": 0}
    return parser.instantiate_classes(parser.parse_object({"data": data})).data


@pytest.mark.parametrize("source", ["img", "dataset.toml"])
def test_a_run_over_the_config_shows_each_set_as_often_as_planned(images, source, capsys):
    assert main(["shards", "pack", source, "out"]) == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load((images / "out" / "sets.yaml").read_text())
    data = _data_of(config | {"data": {"init_args": {"resolution": 8} | config["data"]["init_args"]}})
    data.setup("fit")
    captions = [caption for batch in data.train_dataloader() for caption in batch["caption"]]
    cats = 9 if source == "dataset.toml" else 4
    cat = "a cat" if source == "dataset.toml" else "cat"
    fallback = "sks dog" if source == "dataset.toml" else "dog"
    counts = {text: captions.count(text) for text in captions}
    assert counts == {"a dog runs": 3, "a dog sits": 3, fallback: 3, cat: cats}
    note = f"3_dog: 1 of 3 images have no caption file, first 2.jpg: they get '{fallback}'"
    assert note in " ".join(printed.split())
    assert "not applied" not in printed
    assert printed.endswith("Next:\nlit-lora fit --config configs/sd15.yaml \\\n  --config out/sets.yaml\n")
    assert ("prior" in config.get("model", {}).get("objective", {}).get("init_args", {})) == (source == "dataset.toml")


def test_class_images_are_as_many_as_others():
    sets = [SourceSet("a", None, 10), SourceSet("b", None, 2, prior=True), SourceSet("c", None, 1, prior=True)]
    repeats = repeats_of(sets, [20, 30, 40])
    assert repeats == [10, 4, 2]
    assert repeats[1] * 30 + repeats[2] * 40 == 10 * 20


def test_a_template_is_for_what_is_to_be_learned(images):
    sets = [
        SourceSet("dog", images / "img" / "3_dog", 1),
        SourceSet("cat", images / "img" / "1_cat", 1, "a cat", prior=True),
    ]
    pack_sets(SourceSets(sets), "out", captions="sks")
    found = {name: contents_of_shards(images / "out" / name) for name in ("dog", "cat")}
    assert {name: {text for key, text in one.items() if key.endswith(".txt")} for name, one in found.items()} == {
        "dog": {b"sks"},
        "cat": {b"a cat"},
    }


def test_mistakes(images):
    with pytest.raises(UserError, match="the folder none does not exist"):
        pack_sets(SourceSets([SourceSet("none", images.relative_to(images) / "none", 1)]), images / "out")
    with pytest.raises(UserError, match="all sets are class images"):
        pack_sets(SourceSets([SourceSet("cats", images / "img" / "1_cat", 1, prior=True)]), images / "out")
    assert find_sets(images / "img" / "1_cat", images / "out") is None


def test_the_validation_parts_of_several_folders_are_the_validation_set(tmp_path, encode_image, monkeypatch, capsys):
    for name, count in (("a/train", 3), ("a/validation", 2), ("b/train", 2), ("b/test", 1), ("2_c", 4)):
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / name / f"{name[0]}{number}.jpg").write_bytes(encode_image(seed=number))
            (tmp_path / name / f"{name[0]}{number}.txt").write_text(f"{name} {number}")
    monkeypatch.chdir(tmp_path)
    assert main(["shards", "pack", "[a,b,2_c]", "out"]) == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()[1:4]] == [
        ["a", "3", "1", "3", "+", "2", "for", "validation"],
        ["b", "2", "1", "2", "+", "1", "for", "validation"],
        ["2_c", "4", "2", "8"],
    ]
    assert "another split" not in printed
    config = yaml.safe_load((tmp_path / "out" / "sets.yaml").read_text())
    options = {"resolution": 8, "val_samples": 9} | config["data"]["init_args"]
    data = _data_of({"data": {"init_args": options}})
    data.setup("fit")
    trained = [caption for batch in data.train_dataloader() for caption in batch["caption"]]
    assert sorted(trained) == sorted(
        [f"a/train {n}" for n in range(3)] + [f"b/train {n}" for n in range(2)] + [f"2_c {n}" for n in range(4)] * 2
    )
    validated = [caption for batch in data.val_dataloader() for caption in batch["caption"]]
    assert validated == ["a/validation 0", "a/validation 1", "b/test 0"]
    whole = pack_sets(find_sets(["a", "b"], "whole"), "whole", validation=False)
    assert "val_shards" not in whole.options


def test_a_prefix_of_sets_without_captions(images):
    """A set's own words are captions before the fallback of all sets."""
    packed = pack_sets(find_sets(["img/3_dog", "img/1_cat"], "out"), "out", fallback="")
    notes = [note for summary in packed.summaries for note in summary.notes]
    assert notes[0].endswith("they get 'dog'")
    assert notes[1].endswith("they get 'cat'")
