"""The documentation names what exists: classes, config keys, options, commands, paths, and code that parses."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import sys
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest
import yaml

from lit_lora.cli import TOOLS, TRAINER_COMMANDS
from lit_lora.lazy import public_names
from lit_lora.lightning_cli import build_cli
from lit_lora.option_names import SHORT
from lit_lora.tools import (
    adapter_check,
    adapter_convert,
    adapter_diff,
    adapter_extract,
    adapter_info,
    adapter_merge,
    adapter_push,
    adapter_resize,
    cache,
    demo,
    plan,
    prior,
    report,
    sample,
    shards,
    train,
)

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""The pages that say what is, and not what was."""
LINK_DEFINITION = re.compile(r"^\[([^\]]+)\]: ")
CONFIG = str(ROOT / "configs" / "sd15.yaml")
NO_CONFIG = {"BadSampleError", "UserError", "Plan", "ShardIndex"}
"""Public classes that no config names."""
FUNCTIONS = {
    "sample": sample.SampleOptions,
    "demo": demo.demo,
    "prior": prior.PriorOptions,
    "report": report.report,
    "train": train.train,
    "adapter check": adapter_check.check,
    "adapter convert": adapter_convert.convert,
    "adapter diff": adapter_diff.diff,
    "adapter extract": adapter_extract.extract,
    "adapter info": adapter_info.info,
    "adapter merge": adapter_merge.merge,
    "adapter push": adapter_push.push,
    "adapter resize": adapter_resize.resize,
    **{f"shards {name}": getattr(shards, name) for name in ("pack", "index", "check", "info")},
}


@pytest.fixture(scope="module")
def config_keys() -> ModuleType:
    """The hook that makes the tables of docs/config.md."""
    spec = importlib.util.spec_from_file_location("config_keys", ROOT / "docs" / "hooks" / "config_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["config_keys"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    """The parsers of the commands that take the options of ``fit``."""
    kinds: dict[str, dict[str, Any]] = {
        "fit": {},
        "plan": {"cli_class": plan._PlanCLI},
        "cache": {"cli_class": cache._CacheCLI},
    }
    arguments = ["fit", "--config", CONFIG, "--trainer.accelerator", "cpu"]
    return {name: build_cli(arguments, run=False, **kind).parser for name, kind in kinds.items()}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page; indented blocks have no language."""
    text = page.read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *(("", block) for block in re.findall(r"(?:^    .*\n)+", rest, re.MULTILINE))]


def commands() -> list[str]:
    """Every command of the pages and configs."""
    lines = [
        line.strip().removeprefix("$ ")
        for page in PAGES
        for language, text in blocks(page)
        if not language
        for line in text.split("\n")
    ]
    configs = [path.read_text() for path in (ROOT / "configs").rglob("*.yaml")]
    lines += [line.removeprefix("#").strip() for text in configs for line in text.split("\n") if line.startswith("#")]
    return sorted({line for line in lines if re.match(r"lit-lora [a-z]+ (--|shards|\w+ \S+$|\w+ )", line)})


def test_every_public_class_has_its_config_keys(config_keys: ModuleType) -> None:
    page = config_keys.reference()
    described = {one.__name__ for section in config_keys.SECTIONS for one in config_keys.classes_of(section)}
    abstract = {name for name, one in config_keys.public_classes().items() if inspect.isabstract(one)}
    assert described == set(public_names()) - NO_CONFIG - abstract
    for section in config_keys.SECTIONS:
        assert f"## `{section.key}`" in page
        for one in config_keys.classes_of(section):
            assert section.options is not None or f"### `{one.__name__}`" in page
            for key in config_keys.keys_of(one):
                assert f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" in page
    assert config_keys.MARKER in (ROOT / "docs" / "config.md").read_text()
    assert not re.search(r":\w+:`|``", page), "no Sphinx roles are left"


def test_an_argument_without_a_description_is_an_error(config_keys: ModuleType) -> None:
    class Undocumented:
        """A class.

        Args:
            known: Described.
        """

        def __init__(self, known: int, unknown: int = 0) -> None: ...

    with pytest.raises(LookupError, match="Undocumented does not describe its argument unknown"):
        config_keys.keys_of(Undocumented)


def test_nested_keys_are_where_the_page_says(config_keys: ModuleType, parsers: dict[str, Any], tmp_path: Path) -> None:
    """The path of each section takes its keys, with their defaults."""
    required = {
        "family": {"pretrained_model_name_or_path": "base"},
        "staging": {"dir": "/disk"},
        "base_adapters": {"path": "first.safetensors"},
        "parameter_groups": {"pattern": "*", "lr": 1e-3},
        "train_sets": {"shards": "shards"},
        "logger": {"project": "my"},
    }
    chosen = {"model.objective": "FlowMatching"}  # the next section's key is one of its options
    config: dict[str, Any] = {}
    for section in config_keys.SECTIONS[1:]:
        *parents, last = section.key.split(".")
        place = config
        for name in parents:
            place = place[name[:-2]][0] if name.endswith("[]") else place.setdefault(name, {})
        last, is_list, _ = last.partition("[]")
        classes = config_keys.classes_of(section)
        one = next((one for one in classes if one.__name__ == chosen.get(section.key)), classes[0])
        parameters = inspect.signature(one).parameters.values()
        plain = [each for each in parameters if isinstance(each.default, bool | int | float | str | None)]
        values: dict[str, Any] = {each.name: each.default for each in plain if not each.name.startswith("_")}
        values |= required.get(last, {})
        if section.options is None:
            values = {"class_path": one.__name__, "init_args": values}
        place[last] = [values] if is_list else values
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    parsed = parsers["fit"].parse_args(["--config", CONFIG, "--config", str(path)])
    assert parsed.data.init_args.chunks.staging.dir == "/disk"
    assert parsed.data.init_args.decoder.init_args.captions.sources[0].extension == "txt"
    assert parsed.model.objective.init_args.density.class_path.endswith("CosMap")


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(re.findall(r"\n\n:::", text)) == len(listed), (
        "a line above each, or mkdocstrings reads it as options of the last"
    )
    assert {name.rpartition(".")[2] for name in listed} >= set(public_names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_configs_in_the_pages_parse(
    page: Path, parsers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    for number, (_, text) in enumerate(block for block in blocks(page) if block[0] == "yaml"):
        values = yaml.safe_load(text)
        if "decoder" in values:
            values = {"data": {"class_path": "WebDatasetDataModule", "init_args": values}}
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(values))
        parsers["fit"].parse_args(["--config", CONFIG, "--config", str(path)])


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_pages_have_real_options(command: str, parsers: dict[str, Any]) -> None:
    arguments = shlex.split(command, comments=True)[1:]
    name = " ".join(arguments[: 2 if arguments[0] in ("shards", "adapter") else 1])
    if name == "shards plan":
        name, arguments = "fit", arguments[1:]
    if name in FUNCTIONS:
        parameters = inspect.signature(FUNCTIONS[name]).parameters
        assert {one[2:].partition("=")[0] for one in arguments if one.startswith("--")} <= set(parameters)
        return
    assert name in (*TRAINER_COMMANDS, *TOOLS)
    assert "--config" in arguments
    rest = [
        str(ROOT / one) if one.startswith("configs/") else CONFIG if one == "my.yaml" else one for one in arguments[1:]
    ]
    if "--ckpt_path" in rest:  # an option of the subcommand
        place = rest.index("--ckpt_path")
        del rest[place : place + 2]
    parser = parsers.get(name, parsers["fit"])
    # Parsing alone would take the beginning of an option's name for the option.
    assert {one for one in rest if re.fullmatch(r"--\w+", one)} <= set(re.findall(r"--\w+", parser.format_help()))
    parser.parse_args(rest)


def test_options_in_the_text_exist(parsers: dict[str, Any]) -> None:
    """Options of commands that are named within sentences."""
    known = {name: set(re.findall(r"--(\w+)", parser.format_help())) for name, parser in parsers.items()}
    known |= {name: set(inspect.signature(function).parameters) for name, function in FUNCTIONS.items()}
    for page in PAGES:
        text = re.sub(r"\s+", " ", page.read_text())
        for command, options in re.findall(r"`lit-lora (\w+(?: \w+)?)((?: --[^`]*)?)`", text):
            assert command.split()[0] in (*TRAINER_COMMANDS, *TOOLS), command
            unknown = set(re.findall(r"--(\w+)", options)) - known.get(command, known["fit"])
            assert not unknown, f"{page}: lit-lora {command}{options}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_in_the_text_exist(page: Path, parsers: dict[str, Any]) -> None:
    """Options without their command, import paths, and paths of files."""
    text = page.read_text()
    known = {name for parser in parsers.values() for name in re.findall(r"--([\w.+]+)", parser.format_help())}
    known |= {name for function in FUNCTIONS.values() for name in inspect.signature(function).parameters}
    known |= set(SHORT)
    options = set(re.findall(r"`--([a-z]\w*)(?: [^`]*)?`", text))
    assert not options - known
    for path in set(re.findall(r"`(lit_lora(?:\.\w+)+)", text)) - {"lit_lora.quantized_base"}:  # a key of metadata
        resolve_name(path)
    paths = set(re.findall(r"`((?:tests|benchmarks|docs|configs|lit_lora|datamodules|callbacks)/[\w/.]+)`", text))
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_in_the_pages_calls_what_exists(page: Path) -> None:
    """Imports are found, and what they import takes the arguments of the calls."""
    for text in (text for language, text in blocks(page) if language == "python" and "--8<--" not in text):
        nodes = list(ast.walk(ast.parse(text)))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        found = {one.name: resolve_name(f"{node.module}:{one.name}") for node in imports for one in node.names}
        for call in (node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            made = found.get(call.func.id)  # type: ignore[attr-defined]
            if made is not None and made.__module__ != "functools":
                inspect.signature(made).bind(*call.args, **{one.arg: one.value for one in call.keywords if one.arg})


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_of_text_are_not_wide(page: Path) -> None:
    wide = [line for line in without_blocks(page).splitlines() if len(line) > 130]
    assert [line for line in wide if not line.startswith(("|", "    ")) and not LINK_DEFINITION.match(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_by_name_have_a_definition(page: Path) -> None:
    """Without one, the page shows the brackets."""
    text = re.sub(r"`[^`]*`", "", without_blocks(page))
    defined = {name for line in text.splitlines() for name in LINK_DEFINITION.findall(line)}
    assert sorted(set(re.findall(r"\]\[([^\]]+)\]", text)) - defined) == []
    assert [line for line in text.splitlines() if LINK_DEFINITION.match(line) and len(line.split()) != 2] == []


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_examples_are_included_in_their_pages() -> None:
    """The formatter would take ``--8<-- "FILE"`` in a Python block for an expression; the form of blocks stays."""
    for name, example in (
        ("extend/family", "my_family"),
        ("extend/objective", "my_objective"),
        ("extend/callback", "my_callback"),
        ("extend/data_source", "my_data"),
        ("extend/format", "my_format"),
        ("injection", "injection"),
    ):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        assert f"```python\n--8<--\nexamples/{example}.py\n--8<--\n```" in text
        assert (ROOT / "docs" / "examples" / f"{example}.py").is_file()


def test_the_tables_of_memory_have_the_measured_and_planned_numbers() -> None:
    """Those of the models are in ``benchmarks/results``, those of the shipped configs in the configs' comments."""
    measured, shipped = (ROOT / "docs" / "memory.md").read_text().split("The shipped configs, with")
    results = " ".join(path.read_text() for path in (ROOT / "benchmarks" / "results").glob("*.txt"))
    comments = " ".join(path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    readme = (ROOT / "README.md").read_text()
    for text, source in ((measured, results), (readme, results), (shipped, comments)):
        rows = " ".join(line for line in text.split("\n") if line.startswith("| "))
        numbers = set(re.findall(r"(\d+\.\d+) (?:GiB|GB|%)", rows))
        assert numbers
        assert not numbers - set(re.findall(r"\d+\.\d+", source))
