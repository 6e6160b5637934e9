from __future__ import annotations

import pytest

from lit_lora.datamodules.packing.source_sets import find_folders, given_to_each, sets_of, with_class_images
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


def test_each_set_gets_its_own_value(make, tmp_path):
    data = make("a/1.png", "2_b/1.png")
    found = sets_of([data / "a", data / "2_b"], tmp_path / "out")
    assert [one.repeats for one in given_to_each(found, repeats=[0.5, 3], sources=None).sets] == [0.5, 3]
    with pytest.raises(UserError, match="repeats has 1 value for 2 sets; give one for each of a, 2_b"):
        given_to_each(found, repeats=[3])


def test_class_images_are_a_further_set(make, tmp_path):
    data = make("a/1.png", "3_brown_dog/1.png")
    found = sets_of([data / "a"], tmp_path / "out")
    both = with_class_images(found, data / "3_brown_dog")
    last = both.sets[-1]
    assert (last.name, last.repeats, last.fallback, last.prior) == ("class images", 1, "brown dog", True)
    with pytest.raises(UserError, match="the sets have class images of their own"):
        with_class_images(both, data / "3_brown_dog")
    with pytest.raises(UserError, match="named more than once"):
        with_class_images(found, data / "a")
    with pytest.raises(UserError, match=r"class_images=.*none is no folder; name one of images of the class"):
        with_class_images(found, data / "none")
