from __future__ import annotations

import pytest

from lit_lora.datamodules.packing.source_sets import find_folders, sets_of
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


def test_several_folders_are_sets(make, tmp_path):
    """Names of folders say repeats where they begin with a number; folders of such folders stand for these; names differ."""
    data = make("dogs/a.png", "5_cats/a.png", "img/2_red/a.png", "img/1_blue/a.png", "more/dogs/a.png", "10_out/a.png")
    folders = [data / name for name in ("dogs", "5_cats", "img", "more/dogs")]
    found = sets_of(folders, data / "10_out")
    assert [(one.name, one.folder, one.repeats, one.fallback) for one in found.sets] == [
        ("dogs", data / "dogs", 1, ""),
        ("5_cats", data / "5_cats", 5, "cats"),
        ("1_blue", data / "img" / "1_blue", 1, "blue"),
        ("2_red", data / "img" / "2_red", 2, "red"),
        ("dogs-2", data / "more" / "dogs", 1, ""),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "gone"], "gone is no folder"),
        (["a", "a/x.png"], "x.png is no folder"),
        (["a", "a/in"], "a/in is inside .*a; name folders side by side"),
        (["a", "b/../a"], "a is named more than once; name it once"),
        (["a", "0_b"], "0_b has 0 repeats"),
    ],
)
def test_folders_that_are_no_sets(make, names, message):
    data = make("a/x.png", "a/in/x.png", "b/x.png", "0_b/x.png")
    with pytest.raises(UserError, match=message):
        sets_of([data / name for name in names], data / "out")
