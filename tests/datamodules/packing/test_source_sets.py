from __future__ import annotations

import pytest

from lit_lora.datamodules.packing.source_sets import find_folders
from lit_lora.errors import UserError


@pytest.fixture
def make(tmp_path):
    def make(*names: str):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "data"

    return make


def test_the_name_says_repeats_and_caption(make, tmp_path):
    source = make(
        "10_sks dog/a.png", "10_sks dog/a.txt", "2_a_b/deep/x.JPG", "__MACOSX/x.png", "log/x.txt", "10_out/x.png"
    )
    found = find_folders(source, source / "10_out")
    assert found is not None
    assert [(one.name, one.repeats, one.fallback, one.prior) for one in found.sets] == [
        ("10_sks dog", 10, "sks dog", False),
        ("2_a_b", 2, "a_b", False),
    ]


@pytest.mark.parametrize("names", [["10_a/x.png", "y.png"], ["10_a/x.png", "b/y.png"], ["10_a/x.txt"], ["10_/x.png"]])
def test_other_folders(make, tmp_path, names):
    assert find_folders(make(*names), tmp_path / "out") is None


def test_no_repeats(make, tmp_path):
    with pytest.raises(UserError, match="0_a has 0 repeats"):
        find_folders(make("0_a/x.png"), tmp_path / "out")
