"""What merged adapters say, and what they need beside their base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lit_lora.adapter_tools.merged_metadata import merged_metadata
from lit_lora.adapter_tools.named_adapter import NamedAdapter
from lit_lora.errors import UserError
from lit_lora.formats import write_adapter
from lit_lora.formats.base_adapter import BaseAdapter
from lit_lora.formats.base_records import base_metadata
from lit_lora.formats.find import read_adapter
from tests.adapter_tools.layers import adapter, config

ONE = adapter(config(), seed=1)


def of(*entries: dict[str, str]) -> dict[str, str]:
    """The metadata of merged adapters with these metadata."""
    return merged_metadata([NamedAdapter(f"adapter {i}", replace(ONE, metadata=one)) for i, one in enumerate(entries)])


def test_words_are_joined_and_statements_stay() -> None:
    phrase, tags, by = "modelspec.trigger_phrase", "modelspec.tags", "modelspec.author"
    one, other = {phrase: "star, blue", "ss_steps": "3", by: "me"}, {phrase: "blue, cat", tags: "x", "ss_steps": "4"}
    assert of(one, other) == {phrase: "star, blue, cat", tags: "x", by: "me"}
    with pytest.warns(
        UserWarning, match=r"does not say modelspec.license, which is mit in adapter 0 and openrail in adapter 1"
    ):
        assert of({"modelspec.license": "mit"}, {"modelspec.license": "openrail"}) == {}


@pytest.mark.parametrize("name", ["lit_lora.quantized_base", "lit_lora.scheduler"])
def test_what_the_result_needs(name: str) -> None:
    assert of({name: "a"}, {name: "a"}) == {name: "a"}
    with pytest.raises(UserError, match=f"need different bases: {name} is a in adapter 0 and b in adapter 1"):
        of({name: "a"}, {name: "b"})


def test_nothing_told_is_no_need_but_the_own_scheduler_of_the_base() -> None:
    name = "lit_lora.quantized_base"
    assert of({name: "a"}, {}) == of({}, {name: "a"}) == {name: "a"}
    name = "lit_lora.scheduler"
    with pytest.raises(
        UserError, match=f"need different bases: {name} is the base's own in adapter 0 and v in adapter 1"
    ):
        of({}, {name: "v"})


def test_adapters_of_the_training(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("first", "other", "second")]
    for seed, path in enumerate(paths):
        Path(path).mkdir()
        write_adapter(adapter(config(), seed=seed), Path(path))
    first, other = (BaseAdapter(path, 0.8).record_of(read_adapter(path)) for path in paths[:2])
    over = [replace(ONE, metadata=base_metadata([one])) for one in (first, other)]
    second = NamedAdapter(paths[2], over[0])
    assert json.loads(merged_metadata([second, second])["lit_lora.base_adapters"]) == [first]
    assert merged_metadata([NamedAdapter(paths[0], ONE, 0.8), second]) == {}  # the result contains it
    wrong = [
        [second, NamedAdapter(paths[2], ONE)],
        [second, NamedAdapter(paths[2], over[1])],
        [second, NamedAdapter(paths[0], ONE, 0.7)],
    ]
    for adapters in wrong:
        with pytest.raises(
            UserError, match=r"was trained over first \(weight 0.8, SHA-256 .*, and .* over (no|other) "
        ):
            merged_metadata(adapters)
