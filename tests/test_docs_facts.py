"""What the documentation states as a fact, compared with the code, the configs and the measured results."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

import lit_lora
from lit_lora import families
from lit_lora.datamodules.batches.buckets import MAX_RESOLUTION
from lit_lora.datamodules.batches.plan import MAX_BATCH_SIZE, MAX_PASSES
from lit_lora.datamodules.decoding import captions
from lit_lora.datamodules.decoding.sample_decoder import SampleDecoder
from lit_lora.datamodules.indexing.extensions import MASK_EXTENSION, SOURCE_EXTENSIONS
from lit_lora.datamodules.indexing.scan import EXTENSIONS
from lit_lora.datamodules.indexing.shard_paths import MAX_SHARDS
from lit_lora.datamodules.packing.input import PackInput
from lit_lora.datamodules.remote.remote_source import RETRIED_STATUS
from lit_lora.formats import FORMATS, AdapterFormat
from lit_lora.formats.base import AdapterFiles
from lit_lora.lazy import public_names
from lit_lora.objectives import NoiseKind, NoisySample, Objective, TimestepDensity, Weighting
from lit_lora.prompts import read_prompts
from lit_lora.tools.train import train
from lit_lora.tools.training.memory import LADDER
from tests.test_optimizers import IN_A_SMALL_MODULE, OPTIMIZERS

ROOT = Path(__file__).parents[1]
RESULTS = " ".join(path.read_text() for path in (ROOT / "benchmarks" / "results").glob("*.txt"))
CONFIGS = {path.name: path.read_text() for path in (ROOT / "configs").rglob("*.yaml")}
MODELS = sorted({path.name for path in (ROOT / "configs").glob("*.yaml")} - {"demo.yaml"})
"""The configs for published models."""


def read(page: str) -> str:
    return (ROOT / page).read_text()


def section(page: str, title: str) -> str:
    """The text of a page below a title, up to the next title of any level."""
    return re.split(r"^#+ .*$", read(page).split(f"\n{title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without their head lines."""
    lines = re.findall(r"^\|(.*)\|$", re.sub(r"^\|.*\n\|(?:-+\|)+$", "", text, flags=re.MULTILINE), re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def names(cell: str) -> list[str]:
    """The names in backquotes, without what follows them in brackets."""
    return re.findall(r"`(\w+)[^`]*`", cell)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_families_and_their_objectives(page: str) -> None:
    """Each family with the objective of its models, and in the README with the configs that train it."""
    kinds = vars(families).values()
    known = {one.__name__ for one in kinds if isinstance(one, type) and issubclass(one, families.ModelFamily)}
    table = [row for row in rows(read(page)) if known.intersection(names(row[0]))]
    assert sorted(names(row[0])[0] for row in table) == sorted(known - {"ModelFamily"})
    trained = []
    for family, _, objective, *configs in table:
        assert [getattr(families, names(family)[0]).default_objective.__name__] == names(objective)
        for config in re.findall(r"`(.*?)`", " ".join(configs)):
            model = yaml.safe_load(CONFIGS[config])["model"]
            assert model["family"]["class_path"].rpartition(".")[2] == names(family)[0]
            assert model["objective"]["class_path"].rpartition(".")[2] == names(objective)[0]
            trained.append(config)
    if page == "README.md":
        assert sorted(trained) == MODELS


def test_defaults_of_objectives() -> None:
    """Numbers in the tables of objectives are the defaults of the classes that they describe."""
    found = {}
    for name, *cells in rows(read("docs/objectives.md")):
        for symbol, value in re.findall(r"(\w) = (\d+)", cells[-1]):
            found[names(name)[0], "k" if symbol == "k" else "gamma"] = float(value)
    text = section("docs/objectives.md", "## Contrast")
    found["Contrast", "weight"] = float(re.findall(r"= ([\d.]+) \(`weight`\)", text)[0])
    assert len(found) == 5
    for (name, key), value in found.items():
        assert inspect.signature(getattr(lit_lora, name)).parameters[key].default == value


def test_bounds_of_options() -> None:
    bounds = {
        "`resolution`": f"{MAX_RESOLUTION:,}",
        "`batch_size`": f"{MAX_BATCH_SIZE:,}",
        "`chunks.passes`": f"{MAX_PASSES:,}",
        "shards that braces name": f"{MAX_SHARDS:,}",
        "`class_names`": f"a regular file of at most {captions._MAX_NAMES_BYTES >> 20} MiB",
    }
    table = {row[0]: row[1] for row in rows(read("docs/data.md")) if len(row) == 2}
    assert {name: table[name] for name in bounds} == bounds


def test_statuses_that_are_retried() -> None:
    said = re.search(r"The statuses ([\d, and]+), stalls", read("docs/data.md"))
    assert said is not None
    assert {int(status) for status in re.findall(r"\d+", said[1])} == RETRIED_STATUS


def test_members_that_shards_index() -> None:
    """Images, captions and arrays; masks and sources have passages of their own."""
    said = re.search(r"Shards index the members (.*?);", read("docs/extend/data_source.md"), re.DOTALL)
    assert said is not None
    beside = {MASK_EXTENSION, *SOURCE_EXTENSIONS}
    assert set(re.findall(r"`(\w+)`", said[1])) == set(EXTENSIONS) - beside


def test_formats_and_their_files() -> None:
    table = {names(row[0])[0]: row[1] for row in rows(read("docs/adapters.md")) if len(row) == 4}
    assert table.keys() == {one.name for one in FORMATS}
    for one in FORMATS:
        assert f"`{one.file_name}`" in table[one.name]


def test_text_encoders_that_are_trained() -> None:
    table = {names(row[0])[0]: row[1] for row in rows(section("docs/text_encoders.md", "## Adapters"))}
    assert len(table) > 10
    for name, trained in table.items():
        assert set(names(trained)) == set(getattr(families, name).adaptable_encoders)


def test_overlays() -> None:
    """What the page on memory says of the overlays for GPUs: quantization of base and text encoders, and a limit."""
    assert (
        "`8gb` stores the base and the text encoders in `NF4`; `12gb` and `16gb` store the text encoders in `Int8`"
        in " ".join(read("docs/memory.md").split())
    )
    for size, base, encoders in ((8, "NF4", "NF4"), (12, None, "Int8"), (16, None, "Int8"), (24, None, None)):
        config = yaml.safe_load(CONFIGS[f"{size}gb.yaml"])
        quantizations = (
            config["model"].get("quantization"),
            config["model"]["memory"].get("text_encoder_quantization"),
        )
        assert [one and one["class_path"].rpartition(".")[2] for one in quantizations] == [base, encoders]
        (limit,) = config["trainer"]["callbacks+"]
        assert limit == {"class_path": "lit_lora.callbacks.MemoryLimit", "init_args": {"limit": f"{size}GB"}}


@pytest.mark.parametrize("config", MODELS)
def test_layers_in_comments(config: str) -> None:
    """The first lines of a config say whether feed-forward networks are adapted; by default all but Stable Diffusion's are."""
    model = yaml.safe_load(CONFIGS[config])["model"]
    family = getattr(families, model["family"]["class_path"].rpartition(".")[2])
    targets = model["adapter"]["init_args"].get("target_modules", family.default_targets)
    widened = any(re.search(r"\bff\b|feed_forward|mlp", target) for target in targets)
    said = CONFIGS[config].split("\nseed_everything")[0]
    assert "except for Stable Diffusion also those of the feed-forward networks" in " ".join(
        read("docs/layers.md").split()
    )
    assert widened == ("feed-forward" in said) == (not family.__name__.startswith("StableDiffusion"))


def test_optimizers_that_were_trained() -> None:
    """The table lists the optimizers of the tests, all of them and no others."""
    found = []
    for row in rows(section("docs/layers.md", "## Optimizers")):
        paths = re.findall(r"`([\w.]+)`", row[0])
        package = paths[0].rpartition(".")[0]
        found += [path if "." in path else f"{package}.{path}" for path in paths]
    assert sorted(found) == sorted(OPTIMIZERS.keys() | IN_A_SMALL_MODULE.keys())


def test_choices_of_train() -> None:
    """The rungs with their prices, and where captions may come from."""
    prices = [price for _, price in rows(section("docs/train.md", "## Memory"))]
    assert prices == ["", *(rung.price for rung in LADDER)]
    kinds = [names(row[0])[0] for row in rows(section("docs/train.md", "## Captions"))]
    assert sorted(kinds) == sorted(get_args(get_type_hints(train, localns={"Request": object})["captions"]))


def test_files_of_prompts(tmp_path: Path) -> None:
    """The lists on the page are read as the text says."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "garden.jpg").touch()
    entries = []
    for number, text in enumerate(re.findall(r"^```text\n(.*?)^```", read("docs/sample.md"), re.MULTILINE | re.DOTALL)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        entries += read_prompts(str(path))
    assert [entry.prompt for entry in entries] == ["a photo of a cat", "a photo of a cat in the snow", "make it snow"]
    assert (entries[1].seed, entries[1].width, entries[1].steps) == (7, 768, 40)
    assert entries[2].image == str(tmp_path / "photos" / "garden.jpg")


@pytest.mark.parametrize(
    ("page", "title", "kinds"),
    [
        ("family", "## What to write", (families.ModelFamily,)),
        ("objective", "## What a step calls", (Objective, NoisySample)),
        ("objective", "## Weightings, criteria and kinds of noise", (lit_lora.DDPM,)),
        ("format", "## What a format says", (AdapterFormat, AdapterFiles)),
        ("data_source", "## A kind of sample", (SampleDecoder,)),
        ("data_source", "## An input to packing", (PackInput,)),
    ],
)
def test_parts_to_extend_have_the_names(page: str, title: str, kinds: tuple[type[Any], ...]) -> None:
    """What the pages tell to write is declared by the base class, and methods take these arguments."""
    table = rows(section(f"docs/extend/{page}.md", title))
    assert table
    for name, arguments in re.findall(r"`(\w+)(?:\((.*?)\))?`", " ".join(row[0] for row in table)):
        declared = [one for one in kinds if hasattr(one, name) or name in _declared(one)]
        assert declared, f"{page}: {name}"
        if arguments:
            parameters = list(inspect.signature(getattr(declared[0], name)).parameters)
            assert set(arguments.split(", ")) <= set(parameters), f"{page}: {name}({arguments})"


def _declared(kind: type[Any]) -> set[str]:
    """Names of annotations, of arguments and of attributes that the constructor sets."""
    annotations = {name for one in kind.__mro__ for name in vars(one).get("__annotations__", {})}
    return annotations | set(inspect.signature(kind.__init__).parameters)


def test_bases_of_small_parts() -> None:
    """Weightings, kinds of noise and densities have the one method that the page names."""
    for kind, name in ((Weighting, "weights"), (NoiseKind, "apply"), (TimestepDensity, "times")):
        assert f"`{name}(" in read("docs/extend/objective.md")
        assert name in kind.__abstractmethods__


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in ("memory", "quality", "ranks", "data"))])
def test_figures_are_those_of_results(page: str) -> None:
    """Every decimal fraction outside of code is a measured or computed figure, or stands in the comments of a config."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\(.*?\)|`[^`]*`|^    .*$|python \d.*?\d|arXiv \S+", "", text, flags=re.MULTILINE | re.IGNORECASE)
    text = re.sub(r"(SD|FLUX|Diffusion|Qwen|version|px of|\b[A-Z][\w-]*)[ .-]?\d\.\d\b", "", text)
    exact = {float(value) for value in re.findall(r"\d+\.\d+", RESULTS + " ".join(CONFIGS.values()))}
    for value in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\.\w)", text):
        digits = len(value.partition(".")[2])
        assert any(f"{one:.{digits}f}" == value for one in exact), f"{page}: {value}"


def test_the_recipe_has_the_measured_rows() -> None:
    lines = re.findall(r"^(\w.*?) +(\d+\.\d% .*)$", read("benchmarks/results/quality.txt"), re.MULTILINE)
    measured = {name.lower(): values.split() for name, values in lines}
    kinds = {"bfloat16": "bf16", "float32": "fp32"}
    for name, accuracy, share, loss, time in rows(read("docs/quality.md")):
        short = re.sub("|".join(kinds), lambda found: kinds[found[0]], name).lower()
        row = measured[short]
        mean, *seeds = re.findall(r"[\d.]+", accuracy)
        assert row[0] == f"{mean}%"
        assert row[2:][: len(seeds) + 1] == [*(f"{value}%" for value in seeds), loss]
        assert row[1] == share.replace(" ", "")
        assert f"{math.floor(float(row[-1].rstrip('%')) + 0.5)} %" == time


@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_sizes_of_text_encoders_in_comments(config: str) -> None:
    """Gigabytes after a text encoder's name are those that were computed of its published config."""
    sizes = set(re.findall(r"\d+\.\d\b", read("benchmarks/results/text_encoders.txt").split("NF4\n")[1]))
    said = re.findall(
        r"\b(?:T5(?:-XXL)?|Qwen[\w.-]*|Gemma 2|Mistral)(?: alone)? takes (\d+(?:\.\d)?) GB", CONFIGS[config]
    )
    assert {f"{float(value):.1f}" for value in said} <= sizes


def test_public_parts_of_the_architecture() -> None:
    """The names in the table of public parts exist."""
    for name, _ in rows(section("docs/architecture.md", "## Public parts")):
        for part in re.findall(r"`([A-Z]\w+)`", name):
            assert part in public_names()
