from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_lora.datamodules.packing.pack_sets import PackedSets
from lit_lora.datamodules.packing.source_sets import SourceSet, SourceSets
from lit_lora.errors import UserError
from lit_lora.tools.training.captions import rule_of_sets
from lit_lora.tools.training.sources import can_be_cached, keys_of, train_sets, uncached_choice


def _packed(**captions: Any) -> PackedSets:
    """A set without a decoder, one with, and class images with the same."""
    decoder = {
        "center_crop": True,
        "captions": {"dropout": 0, "shuffle_tags": False, "wildcards": False, "prefix": "art "} | captions,
    }
    found = SourceSets(
        [
            SourceSet("a", Path("a"), 2),
            SourceSet("b", Path("b"), 1, decoder=decoder),
            SourceSet("c", Path("c"), 1, prior=True, decoder=decoder),
        ],
        {"resolution": 32},
    )
    written = {"class_path": "ImageDecoder", "init_args": decoder}
    sets = [
        {"shards": "out/a", "repeats": 2},
        {"shards": "out/b", "repeats": 1, "decoder": written},
        {"shards": "out/c", "repeats": 1, "prior": True, "decoder": written},
    ]
    return PackedSets(found, [], {}, Path("out/sets.yaml"), {"train_sets": sets})


def test_the_trigger_stands_before_captions_but_not_of_class_images() -> None:
    sets = train_sets(_packed(), "sks, ", Path("cache"))
    assert [one["shards"] for one in sets] == ["cache/0", "cache/1", "cache/2"]
    assert [one["decoder"]["init_args"]["background"] for one in sets[1:]] == ["white", "white"]
    prefixes = [one["decoder"]["init_args"]["captions"]["prefix"] for one in sets[1:]]
    assert prefixes == ["sks, art ", "art "]
    assert [one["shards"] for one in train_sets(_packed(), "", None)] == ["out/a", "out/b", "out/c"]


def test_what_a_dataset_toml_gives() -> None:
    keys = keys_of(_packed(), {"model": {"objective": {}}})
    prior = {"class_path": "lit_lora.objectives.PriorPreservation"}
    assert keys == {"data.init_args.resolution": 32, "model.objective.init_args.prior": prior}
    assert "model.objective.class_path" in keys_of(_packed(), {"model": {}})


@pytest.mark.parametrize("captions", [{}, {"dropout": 0.1}, {"shuffle_tags": True}, {"wildcards": True}])
def test_captions_that_vary_are_not_cached(captions: dict[str, Any]) -> None:
    packed = _packed(**captions)
    assert can_be_cached(packed) is not bool(captions)
    said = uncached_choice(packed)
    assert (said is not None) is bool(captions), "the table of choices says why there is no cache"
    assert said is None or (said.name, said.value) == ("cache", "none")


def test_captions_of_sets() -> None:
    assert rule_of_sets("auto", "sks").prefix == "sks, "
    with pytest.raises(UserError, match="captions='names' is for one folder"):
        rule_of_sets("names", "sks")
