"""No line of any command's help is wider than the terminal, and words are whole."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Literal

import docstring_parser
import pytest
from jsonargparse import ArgumentParser

import lit_lora
from lit_lora.cli import TOOLS, TRAINER_COMMANDS, main
from lit_lora.help_screen import HelpScreen
from lit_lora.lazy import public_names

SUBCOMMANDS = {
    "shards": ("pack", "index", "check", "info", "plan"),
    "adapter": ("info", "check", "diff", "convert", "resize", "merge", "extract", "push"),
}
COMMANDS = [[one] for one in (*TRAINER_COMMANDS, *TOOLS)] + [
    [command, one] for command, found in SUBCOMMANDS.items() for one in found
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("width", [80, 100])
def test_the_help_of_each_command_fits(
    command: list[str], width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", str(width))
    try:
        status: object = main([*command, "--help"])
    except SystemExit as error:
        status = error.code or 0
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert len(lines) > 10
    assert [line for line in lines if len(line) > width] == []
    assert f"{lines[0]} ".startswith(f"usage: lit-lora {' '.join(command)} ")
    usage = lines[: lines.index("")]
    column = len(f"usage: lit-lora {' '.join(command)} ")
    assert {len(line) - len(line.lstrip()) for line in usage[1:]} <= {column, 8}, "options stand below one another"
    takes_configs = command[0] in (*TRAINER_COMMANDS, "plan", "cache") or command == ["shards", "plan"]
    assert any("--print_config" in line for line in lines) == takes_configs
    text = " ".join(" ".join(lines).split())
    assert "Model Registry" not in text
    assert "weights_only" not in text, "it has no effect"
    assert ("Seed of the global random number generators; true draws one." in text) == takes_configs


def help_of(parser: ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "60")
    return parser.format_help().splitlines()


def test_names_are_divided_at_their_dots_and_text_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser(formatter_class=HelpScreen, prog="x")
    name = "some_package.some_module.some_other_module.TheNameOfAClass"
    parser.add_argument("--one", help=f"Known are: {name}, and well-known-words-with-hyphens.")
    lines = [line.strip() for line in help_of(parser, monkeypatch)]
    assert lines[lines.index("some_package.some_module.some_other_module.") + 1] == "TheNameOfAClass, and"
    assert any("well-known-words-with-hyphens." in line for line in lines)


def test_marks_of_restructured_text_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser(
        formatter_class=HelpScreen,
        prog="x",
        description="Of :class:`~a.b.C`, :class:`d.E` and ``f``. .. note:: As `g`::",
    )
    assert "Of C, d.E and f. Note: As g:" in help_of(parser, monkeypatch)


def test_what_a_terminal_cannot_show_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser(
        formatter_class=HelpScreen, prog="x", description=r"The weight :math:`\sigma^{-2}` of `it <https://a.b>`_."
    )
    assert "The weight sigma^(-2) of it (https://a.b)." in help_of(parser, monkeypatch)


def test_classes_without_a_public_name_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser(formatter_class=HelpScreen, prog="x")
    parser.add_argument(
        "--one",
        help="(known subclasses: lit_lora.b.c.D, lit_lora.A, lit_lora.b.F, lit_lora.E, f.g.H, peft.a.B, f.X, g.X, h.X.Y)",
    )
    shown = " ".join(" ".join(help_of(parser, monkeypatch)).split())
    assert "(known subclasses: A, E, H, f.X, g.X, Y)" in shown


def test_choices_and_empty_defaults_are_shown_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser(formatter_class=HelpScreen, prog="x")
    parser.add_argument("--mask", type=Literal["mask.png", "alpha"] | None, help="Mask.")
    parser.add_argument("--suffix", default="", type=str, help="Suffix.")
    shown = " ".join(" ".join(help_of(parser, monkeypatch)).split())
    assert "Literal['mask.png', 'alpha']" in shown
    assert 'Suffix. (type: str, default: "")' in shown


@pytest.mark.parametrize("name", sorted(public_names().keys() - {"ShardIndex"}))  # is read from files, not configured
def test_each_class_and_option_is_described_in_plain_text(name: str) -> None:
    """As jsonargparse reads docstrings, which takes one that begins with a role for another format."""
    found = getattr(lit_lora, name)
    docstring = docstring_parser.parse(inspect.getdoc(found) or "")
    assert docstring.short_description
    described = {one: each.description or "" for each in docstring.params for one in each.arg_name.split(", ")}
    options = {one for one in inspect.signature(found).parameters if not one.startswith("_")} if described else set()
    assert options - set(described) <= {"options", "args", "kwargs"}
    shown = HelpScreen("x", width=10_000)._fill_text(
        "\n".join([docstring.short_description, *described.values()]), 10_000, ""
    )
    assert not re.search(r"`|\\|:[a-z]+:", shown)


@pytest.mark.parametrize("option", ["--trainer.callbacks.help", "--trainer.strategy.help"])
def test_the_help_of_a_class_needs_no_config(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = {"--trainer.callbacks.help": "SampleImages", "--trainer.strategy.help": "LitLoraFSDP"}[option]
    with pytest.raises(SystemExit) as ended:
        main(["fit", option, name])
    assert not ended.value.code
    assert f"Help for {option}=lit_lora.{name}" in capsys.readouterr().out


def test_wide_headings_and_options_become_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser(formatter_class=HelpScreen, prog="x", add_help=False)
    group = parser.add_argument_group("a heading that has more letters than a line of the terminal takes")
    group.add_argument("--the_name_of_an_option", "--another_name_of_the_option", metavar="VALUE")
    lines = help_of(parser, monkeypatch)
    first = lines.index("a heading that has more letters than a line of the")
    assert lines[first + 1] == "terminal takes:"
    option, other = lines[first + 2 : first + 4]
    assert option.replace(" VALUE", "") == "  --the_name_of_an_option,"  # Python 3.13 shows what it takes once
    assert other == "  --another_name_of_the_option VALUE"
