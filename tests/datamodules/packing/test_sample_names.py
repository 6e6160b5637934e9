from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.datamodules.packing.sample_names import SampleNames


def _keys(*files):
    names = SampleNames.of(files)
    return [names.key(sample) for sample in range(len(names))]


def test_keys_are_unique_and_without_dots():
    keys = _keys("a.b.jpg", "a_b.jpg", "a.b.png", "d.ir/x.jpg", "/abs/../x.jpg", "ü" * 60 + "1.jpg", "ü" * 60 + "2.jpg")
    assert keys[:5] == ["a_b", "a_b-2", "a_b-3", "d_ir/x", "abs/x"]
    assert len(set(keys)) == 7
    assert all(len(key.encode()) <= 90 and "." not in key for key in keys)


def test_number_that_would_give_an_existing_key_is_skipped():
    assert _keys("a-2", "a", "a", "a-3", "a-4", "a-4") == ["a-2", "a", "a-5", "a-3", "a-4", "a-4-2"]


def test_names_that_are_not_utf8():
    names = SampleNames.of(["ü\udcff.jpg", "b.jpg"])
    assert [names[0], names[1]] == ["ü\udcff.jpg", "b.jpg"]


@given(st.lists(st.text("ab./-2é", min_size=1, max_size=6)))
def test_each_name_comes_back_and_no_key_comes_twice(files):
    names = SampleNames.of(files)
    keys = [names.key(sample) for sample in range(len(names))]
    assert [names[sample] for sample in range(len(names))] == files
    assert len(set(keys)) == len(files)

    order = np.random.default_rng(0).permutation(len(files))
    part = names.select(order)
    assert [part[place] for place in range(len(part))] == [files[sample] for sample in order]
    assert [part.key(place) for place in range(len(part))] == [keys[sample] for sample in order]
