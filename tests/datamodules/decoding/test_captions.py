from __future__ import annotations

import json
import os
import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lit_lora.datamodules.decoding.captions import (
    MAX_JSON_BYTES,
    MAX_TEXT_BYTES,
    Captions,
    CaptionSource,
    warn_of_changed_names,
)
from lit_lora.datamodules.decoding.decode import BadSampleError
from lit_lora.datamodules.decoding.image_decoder import ImageDecoder
from lit_lora.described import described
from lit_lora.errors import UserError

SLOTS = range(2000)


class TakesCaptions:
    def __init__(self, captions: Captions = Captions()) -> None:  # noqa: B008
        self.captions = captions


def _json(value):
    return {"json": json.dumps(value).encode()}


def _draw_json(value, key):
    return Captions([CaptionSource("json", key=key)]).draw(_json(value), 0, 0)


def test_default_is_the_text_and_then_the_json():
    captions = Captions()
    assert captions.extensions == ("txt", "json")
    assert captions.draw({"txt": b"\xef\xbb\xbf a fox\n", "json": b"not looked at"}, 0, 0) == "a fox"
    assert captions.draw(_json({"caption": " a hen "}), 0, 0) == "a hen"


def test_other_members_are_not_looked_at():
    assert Captions([CaptionSource("cls")]).draw({"txt": b"a fox", "cls": b"7"}, 0, 0) == "7"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text", {"text": "a fox"}),
        ("captions.en.short", {"captions": {"en": {"short": "a fox"}}}),
        ("captions.1", {"captions": ["a hen", "a fox"]}),
        ("0.text", [{"text": "a fox"}]),
        ("by_number.1", {"by_number": {"1": "a fox"}}),
    ],
)
def test_paths_into_json(key, value):
    assert _draw_json(value, key) == "a fox"


@pytest.mark.parametrize("value", [{"a": 3}, {"a": None}, {"a": {"b": "x"}}, {"a": []}, {"a": ["x", 3]}, {}, [1], 3])
def test_json_without_text_at_the_path(value):
    with pytest.raises(BadSampleError, match=r"no text under the key 'a' in \.json"):
        _draw_json(value, "a")


@pytest.mark.parametrize("key", ["a.2", "a.-1", "a.0.0", "a.b"])
def test_paths_that_lead_nowhere(key):
    with pytest.raises(BadSampleError, match="no text under the key"):
        _draw_json({"a": ["x", "y"]}, key)


def test_texts_of_a_list_are_drawn_uniformly():
    captions = Captions([CaptionSource("json", key="texts")])
    members = _json({"texts": ["a", "b", "c", "d"]})
    counts = Counter(captions.draw(members, 0, slot) for slot in SLOTS)
    assert set(counts) == set("abcd")
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_the_first_source_that_the_sample_has():
    captions = Captions([CaptionSource("json", key="long"), CaptionSource("json", key="short"), CaptionSource("txt")])
    assert captions.extensions == ("json", "txt")
    assert captions.draw(_json({"long": "L", "short": "S"}), 0, 0) == "L"
    assert captions.draw(_json({"short": "S"}) | {"txt": b"T"}, 0, 0) == "S"
    assert captions.draw(_json({}) | {"txt": b"T"}, 0, 0) == "T"
    with pytest.raises(BadSampleError, match=r"key 'long' in \.json or under the key 'short' in \.json or in \.txt"):
        captions.draw({}, 0, 0)


def test_sources_are_drawn_by_weight():
    captions = Captions([CaptionSource("txt", weight=3), CaptionSource("json", weight=1)])
    members = {"txt": b"T"} | _json({"caption": "J"})
    counts = Counter(captions.draw(members, 5, slot) for slot in SLOTS)
    assert abs(counts["T"] - 1500) < 5 * (2000 * 0.75 * 0.25) ** 0.5
    assert {captions.draw(_json({"caption": "J"}), 5, slot) for slot in range(20)} == {"J"}


def test_classes(tmp_path):
    assert (
        Captions([CaptionSource("cls", template="a photo of a {}")]).draw({"cls": b"fox\n"}, 0, 0) == "a photo of a fox"
    )
    names = tmp_path / "names.txt"
    names.write_text("hen\nfox\n")
    for class_names in (str(names), ["hen", "fox"]):
        captions = Captions([CaptionSource("cls", class_names=class_names)])
        assert captions.draw({"cls": b"1"}, 0, 0) == "fox"
        for data in (b"2", b"9" * 5000):
            with pytest.raises(BadSampleError, match="out of range; class_names has 2 names"):
                captions.draw({"cls": data}, 0, 0)
        for data in (b"fox", b"-1", b"", "\u0661".encode()):
            with pytest.raises(BadSampleError, match="not a number"):
                captions.draw({"cls": data}, 0, 0)


def test_template_keeps_other_braces():
    assert Captions([CaptionSource(template="{a} {} {b}")]).draw({"txt": b"{}"}, 0, 0) == "{a} {} {b}"


def test_unreadable_members():
    for members, message in [
        ({"txt": "caf\u00e9".encode("latin-1")}, r"not UTF-8 \(byte 3\)"),
        ({"json": b"{"}, "not valid"),
        ({"json": b"\xff"}, "not valid"),
        ({"json": b"[" * 100_000}, "not valid"),
        ({"json": b'{"caption": "\\ud800"}'}, "not Unicode"),
        ({"txt": b" " * (MAX_TEXT_BYTES + 1)}, "1048577 bytes, more than 1048576"),
        ({"json": b" " * (MAX_JSON_BYTES + 1)}, "16777217 bytes, more than 16777216"),
    ]:
        with pytest.raises(BadSampleError, match=message):
            Captions().draw(members, 0, 0)
    assert Captions().draw({"txt": b"x" * MAX_TEXT_BYTES}, 0, 0) == "x" * MAX_TEXT_BYTES


def test_a_dropped_caption_is_empty_and_its_sample_still_checked():
    captions = Captions(dropout=0.25, prefix="by me: ", suffix="!")
    drawn = [captions.draw({"txt": b"a fox"}, 0, slot) for slot in SLOTS]
    assert set(drawn) == {"", "by me: a fox!"}
    assert abs(drawn.count("") - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5
    with pytest.raises(BadSampleError):
        Captions(dropout=1.0).draw({}, 0, 0)
    assert Captions(dropout=1.0).draw({"txt": b"a fox"}, 0, 0) == ""


TAGS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8)


@given(tags=TAGS, keep=st.integers(0, 9), seed=st.integers(0, 2**31), slot=st.integers(0, 2**60))
def test_shuffling_keeps_the_tags_and_the_first_in_place(tags, keep, seed, slot):
    captions = Captions([CaptionSource(template="x, {}, y")], shuffle_tags=True, keep_tags=keep)
    members = {"txt": ", ".join(tags).encode()}
    drawn = captions.draw(members, seed, slot)
    assert drawn == captions.draw(members, seed, slot)
    shuffled = drawn.removeprefix("x, ").removesuffix(", y").split(", ")
    assert Counter(shuffled) == Counter(tags)
    assert shuffled[:keep] == tags[:keep]


def test_shuffling_reaches_every_order():
    captions = Captions(shuffle_tags=True, keep_tags=1, separator=";")
    assert {captions.draw({"txt": b"0;1;2;3"}, 0, slot) for slot in range(100)} == {
        f"0;{a};{b};{c}" for a in "123" for b in "123" for c in "123" if len({a, b, c}) == 3
    }


def test_draws_do_not_depend_on_each_other():
    """Dropout and further captions do not change the order of a caption's tags."""
    plain = Captions(shuffle_tags=True)
    varied = Captions([CaptionSource("txt", weight=1), CaptionSource("json", weight=1)], dropout=0.5, shuffle_tags=True)
    text = b"a, b, c, d, e"
    members = {"txt": text} | _json({"caption": [text.decode()] * 2})
    for slot in range(50):
        assert varied.draw(members, 7, slot) in ("", plain.draw({"txt": text}, 7, slot))


def test_which_caption_and_which_order_are_independent():
    captions = Captions([CaptionSource("json", key="texts")], shuffle_tags=True)
    members = _json({"texts": ["a, b", "c, d"]})
    counts = Counter(captions.draw(members, 0, slot) for slot in SLOTS)
    assert set(counts) == {"a, b", "b, a", "c, d", "d, c"}
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_drawn_anew_at_each_occurrence_and_for_each_seed():
    captions = Captions(shuffle_tags=True)
    members = {"txt": b"a, b, c, d, e, f, g, h"}
    assert len({captions.draw(members, 0, slot) for slot in range(10)}) > 5
    assert len({captions.draw(members, seed, 0) for seed in range(10)}) > 5


def test_fixed():
    assert Captions().fixed
    assert Captions([CaptionSource("txt", weight=2.0)], prefix="x").fixed
    assert Captions(prefix="<", suffix=">").draw_fixed({"txt": b"a fox"}) == "<a fox>"
    assert not Captions(dropout=0.1).fixed
    assert not Captions(shuffle_tags=True).fixed
    assert not Captions([CaptionSource("txt", weight=1), CaptionSource("json", weight=1)]).fixed
    with pytest.raises(BadSampleError, match=r"2 captions under the key 'a' in \.json; select one, as a\.0"):
        Captions([CaptionSource("json", key="a")]).draw_fixed(_json({"a": ["x", "y"]}))


def test_class_names_of_a_changed_file_count(tmp_path):
    names = tmp_path / "names.txt"
    found = []
    for text in ("hen\nfox\n", "hen\nowl\n"):
        names.write_text(text)
        source = CaptionSource("cls", class_names=str(names))
        source.warn_of_change()  # of which there was none
        found.append((source.texts({"cls": b"1"}), str(source.description()), described(Captions([source]))))
    assert [texts for texts, *_ in found] == [["fox"], ["owl"]]
    names.write_text("hen\nfox\n")
    with pytest.warns(UserWarning, match=r"names\.txt was changed after it was read, and the names of then are used"):
        warn_of_changed_names([ImageDecoder(captions=Captions([source])), object()])
    names.unlink()  # which a run that goes on does not notice
    source.warn_of_change()
    assert source.texts({"cls": b"1"}) == ["owl"]
    assert found[0][1] != found[1][1]  # of a cache
    assert found[0][2] != found[1][2]  # which a resumed run compares


def test_description_identifies_the_captions(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("hen\nfox\n")
    second.write_text("hen\nfox")
    by_file = [Captions([CaptionSource("cls", class_names=str(path))]).description() for path in (first, second)]
    assert by_file[0] == by_file[1] == Captions([CaptionSource("cls", class_names=["hen", "fox"])]).description()
    assert json.loads(json.dumps(by_file[0])) == by_file[0]
    assert "hen" not in json.dumps(by_file[0])
    assert Captions([CaptionSource("cls", class_names=["hen"])]).description() != by_file[0]
    assert Captions(prefix="x").description() != Captions().description()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extension": "caption"}, "extension='caption' is unknown; write 'txt' or 'json' or 'cls'"),
        ({"extension": "json", "key": "a..b"}, r"key='a\.\.b' has an empty part"),
        ({"template": "a fox"}, "contains {} 0 times; write it once"),
        ({"template": "{} {}"}, "contains {} 2 times"),
        ({"weight": 0.0}, r"weight=0\.0 must be finite and above 0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"class_names": ["a"]}, "class_names needs extension: cls, not txt"),
        ({"extension": "cls", "class_names": []}, "contains no names"),
        ({"extension": "cls", "class_names": ["a", ""]}, "the name of class 1 is empty"),
        ({"extension": "cls", "class_names": "nowhere.txt"}, r"cannot read nowhere\.txt \(No such file"),
    ],
)
def test_sources_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        CaptionSource(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": [CaptionSource(weight=1), CaptionSource("json")]}, "1 of 2 caption sources have a weight"),
        ({"dropout": 1.5}, r"dropout=1\.5 is not a probability"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"keep_tags": -1}, "keep_tags=-1 is too small; it must be at least 0"),
        ({"separator": ""}, "separator is empty"),
    ],
)
def test_captions_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Captions(**options)


def test_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TakesCaptions, "data")
    assert parser.instantiate_classes(parser.parse_args([])).data.captions == Captions()
    config = parser.parse_string(
        "data: {captions: {sources: [{extension: json, key: a.b}, {extension: cls, class_names: [x, y]}], dropout: 0.1}}"
    )
    again = parser.parse_string(parser.dump(config))
    expected = Captions([CaptionSource("json", "a.b"), CaptionSource("cls", class_names=["x", "y"])], dropout=0.1)
    assert parser.instantiate_classes(again).data.captions == expected
    with pytest.raises(Exception, match="extnsion"):
        parser.parse_string("data: {captions: {sources: [{extnsion: json}]}}")


def test_goes_to_workers():
    captions = Captions([CaptionSource("cls", class_names=["hen", "fox"])], shuffle_tags=True)
    assert pickle.loads(pickle.dumps(captions)) == captions


def test_class_names_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "names")
    for path, message in ((tmp_path / "names", "names is a pipe, not a regular file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=message):
            CaptionSource("cls", class_names=str(path))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="large has 1073741824 bytes, more than 67108864"):
        CaptionSource("cls", class_names=str(tmp_path / "large"))


def test_key_of_thousands_of_digits():
    """Python refuses to read such numbers."""
    with pytest.raises(BadSampleError, match="there is no text"):
        Captions([CaptionSource("json", key="9" * 5000)]).draw({"json": b"[1]"}, 0, 0)


def test_tags_that_are_kept_where_none_is_shuffled():
    with pytest.warns(UserWarning, match="keep_tags=2 has no effect without shuffle_tags: true"):
        Captions(keep_tags=2)
