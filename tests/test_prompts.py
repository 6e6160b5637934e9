from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lit_lora.errors import UserError
from lit_lora.prompts import Prompt, images_to_edit, prompt_groups, read_prompts

YAML = """
- a red seven
- prompt: a blue star
  negative_prompt: blurry
  seed: 3
  width: 32
  steps: 8
  guidance_scale: 2
"""


def test_texts() -> None:
    assert read_prompts("a cat. txt") == [Prompt("a cat. txt")]
    assert read_prompts(["a", "b. txt"]) == [Prompt("a"), Prompt("b. txt")]


def test_files_hold_texts_and_entries(tmp_path: Path) -> None:
    lines, entries = tmp_path / "lines.txt", tmp_path / "entries.yaml"
    lines.write_text("\ufeff# comment\na red seven\n\n  a blue star \n", encoding="utf-8")
    entries.write_text(YAML)
    assert read_prompts(str(lines)) == [Prompt("a red seven"), Prompt("a blue star")]
    star = Prompt("a blue star", "blurry", seed=3, width=32, steps=8, guidance_scale=2)
    assert read_prompts(str(entries)) == [Prompt("a red seven"), star]
    assert str(star) == "a blue star (negative prompt blurry, seed 3, width 32, steps 8, guidance scale 2)"
    assert star.filled(seed=9, negative_prompt="x", height=16) == Prompt("a blue star", "blurry", 3, 32, 16, 8, 2)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_part_prompts(mark: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(f"a{mark}red seven\r\na blue star\r# none\n".encode())
    assert read_prompts(str(tmp_path / "a.txt")) == [Prompt(f"a{mark}red seven"), Prompt("a blue star")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", None, "cannot read the prompts in .*: No such file"),
        ("a.json", "[", "cannot read the prompts in .*; correct the file"),
        ("a.yaml", "prompt: a", "holds no list of prompts"),
        (
            "a.yaml",
            "- seed: 1",
            "entry 1 of .* has no prompt; an entry is a text, or a mapping with prompt, negative_prompt",
        ),
        ("a.yaml", "- a\n- {prompt: b, sed: 1}", "entry 2 of .* has the unknown setting sed; choose from prompt, neg"),
        ("a.yaml", "- {prompt: b, seed: x}", "entry 1 of .*: seed='x' of a prompt is no int"),
        ("a.yaml", "- {prompt: b, steps: 0}", "entry 1 of .*: steps=0 is too small"),
        ("a.json", '[{"prompt": "b", "guidance_scale": NaN}]', "entry 1 of .*: guidance_scale=nan is too small"),
        ("a.txt", "# only a comment\n", "there are no prompts"),
        (
            "a.yaml",
            "- {prompt: b, image: none.png}",
            "entry 1 of .*: there is no image .*none.png; give its path relative to",
        ),
        ("a.yaml", "- {prompt: b, image: 3}", "entry 1 of .*: image=3 of a prompt is no str"),
        ("a.yaml", "- ''", "entry 1 of .*: a prompt is empty"),
    ],
)
def test_a_wrong_file_is_one_error(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / name))


def test_files_among_texts_are_read_and_not_drawn(tmp_path: Path) -> None:
    file, other = tmp_path / "lines.txt", tmp_path / "lines.jsonl"
    file.write_text("a red seven\n")
    other.write_text("{}")
    assert read_prompts([str(file), "a star", str(file)]) == [
        Prompt(one) for one in ("a red seven", "a star", "a red seven")
    ]
    assert read_prompts(["a", "open notes.txt"]) == [Prompt("a"), Prompt("open notes.txt")]
    with pytest.raises(UserError, match=r"cannot read the prompts in .*gone.txt"):
        read_prompts(["a", str(tmp_path / "gone.txt")])
    with pytest.raises(UserError, match=r"lines.jsonl is a file, and its ending is none of .txt, .yaml"):
        read_prompts(str(other))


def test_a_file_without_an_ending_is_told_from_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dogs").write_text("a dog\n")
    with pytest.warns(UserWarning, match=r"dogs is drawn as a prompt, although a file has this name; .* ending .txt"):
        assert read_prompts("dogs") == [Prompt("dogs")]
    assert read_prompts(["dogs", "cats"]) == [Prompt("dogs"), Prompt("cats")]


def test_an_empty_negative_prompt_of_an_entry_wins(tmp_path: Path) -> None:
    file = tmp_path / "entries.yaml"
    file.write_text("- {prompt: a, negative_prompt: ''}\n- b\n")
    assert [one.filled(negative_prompt="blurry").negative_prompt for one in read_prompts(str(file))] == ["", "blurry"]


def test_a_setting_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    for ending, text in (
        (".yaml", "- prompt: a\n  seed: 1\n  seed: 2\n"),
        (".json", '[{"prompt": "a", "seed": 1, "seed": 2}]'),
    ):
        file = tmp_path / f"entries{ending}"
        file.write_text(text)
        with pytest.raises(UserError, match="seed is given twice"):
            read_prompts(str(file))


def test_prompts_with_equal_options_are_drawn_together() -> None:
    prompts = [Prompt("a", seed=1), Prompt("b", width=32), Prompt("c", seed=2), Prompt("d", "e"), Prompt("f", width=32)]
    groups = prompt_groups(prompts, {"num_inference_steps": 2, "width": 16})
    assert [group.places for group in groups] == [[0, 2], [1, 4], [3]]
    assert [group.options for group in groups] == [{"num_inference_steps": 2, "width": width} for width in (16, 32, 16)]


def test_images_to_edit_are_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "of").mkdir()
    Image.new("L", (4, 2), 255).save(tmp_path / "of" / "white.png")
    (tmp_path / "a.yaml").write_text("- {prompt: snow, image: of/white.png}\n- sun\n")
    prompts = read_prompts(str(tmp_path / "a.yaml"))
    assert str(prompts[0]) == "snow (image white.png)"
    assert [group.places for group in prompt_groups(prompts, {})] == [[0], [1]]
    assert images_to_edit(prompts[1:]) == {}
    [image] = images_to_edit(prompts[:1])["sources"]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 2), (255, 255, 255))
    (tmp_path / "of" / "white.png").write_text("no image")
    with pytest.raises(UserError, match=r"cannot read the image .*white\.png of a prompt"):
        images_to_edit(prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a cat <lora:style:0.8>",
            "<lora:style:0.8> in a prompt is drawn as text, not read as an adapter; give it with",
        ),
        ("a cat --n blurry --w 512", "--n in a prompt is drawn as text, not read as an option"),
        ("a {red|blue} cat", r"{red\|blue} in a prompt is drawn as text, not read as a choice of words"),
        ("a (red:1.3) cat", r"\(red:1.3\) in a prompt is drawn as text, not read as words with a weight"),
    ],
)
def test_what_other_programs_read_is_named(text: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        assert read_prompts(text) == [Prompt(text)]


def test_plain_punctuation_is_not_the_syntax_of_other_programs() -> None:
    read_prompts(["a well-known cat -- asleep", "a <cat-toy> (red, 3 legs)", "a poster: {ABC}", "at (10:30 am)"])


def test_a_seed_is_at_most_what_torch_takes() -> None:
    with pytest.raises(
        UserError, match="seed=9223372036854775808 is too large; it must be at most 9223372036854775807"
    ):
        Prompt("a cat", seed=2**63)
