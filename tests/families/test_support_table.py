"""The table in docs/families.md of what works for which family: each cell is tried, and the docs must say what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig

from lit_lora import quantization
from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats import FORMATS
from lit_lora.formats.of_family import files_of
from lit_lora.module import LoraDiffusion
from lit_lora.planning.plan_run import plan_run
from tests.families.folders import FOLDERS
from tests.families.two_processes import RUNS
from tests.helpers import make_batches

DOCS = Path(__file__).parents[2] / "docs" / "families.md"


def _loaded(family: ModelFamily, **options: object) -> LoraDiffusion:
    """A module whose parts are loaded and adapted."""
    adapter = options.pop("adapter", LoraConfig(r=2, lora_alpha=2))
    module = LoraDiffusion(family, adapter, base_dtype="float32", **options)  # type: ignore[arg-type]
    module.configure_model()
    return module


def _cache(family: ModelFamily) -> str:
    """Every run of tests/families/test_two_processes.py includes every family."""
    return _yes(any(cached for _, _, cached in RUNS.values()))


def _strategies(family: ModelFamily) -> str:
    """As for the cache."""
    return ", ".join(sorted({f"`{strategy}`" for strategy, _, _ in RUNS.values()}))


def _storages(family: ModelFamily) -> str:
    """Those with which the denoiser computes something close to what it computes without."""
    batch = make_batches(1)[0]
    exact = None
    found = []
    for kind in (quantization.Dense, quantization.Int8, quantization.FP8, quantization.NF4):
        module = _loaded(type(family)(family.pretrained_model_name_or_path), quantization=kind())
        latents, conditioning = module.family.encode(batch, Draws(0, batch["slot"]))
        with torch.no_grad():
            output = module.family.denoise(latents, torch.tensor([1, 999]), conditioning)
        if exact is None:
            exact = output
        elif 0 < (output - exact).norm() < exact.norm() / 2:
            found.append(kind.__name__)
    return ", ".join(found)


def _buckets(family: ModelFamily) -> str:
    """A step on images that are no squares."""
    module = _loaded(family)
    batch = make_batches(1)[0]
    batch["pixel_values"] = torch.randint(256, (2, 3, 16, 32), dtype=torch.uint8)
    losses, _ = module.losses(batch, Draws(0, batch["slot"]))
    losses.mean().backward()
    gradients = [p.grad for p in family.denoiser.parameters() if p.requires_grad]
    return _yes(all(grad is not None and grad.isfinite().all() for grad in gradients))


def _plan(family: ModelFamily) -> str:
    return _yes(plan_run(_loaded(family), 1, 16, 16).peak > 0)


def _sampling(family: ModelFamily) -> str:
    module = _loaded(family)
    (image,) = module.generate(["a star"], height=32, width=64, num_inference_steps=2)
    return _yes(image.size == (64, 32))


def _text_encoders(family: ModelFamily) -> str:
    try:
        _loaded(family, text_adapter=LoraConfig(r=2, lora_alpha=2))
    except UserError:
        return "no"
    return ", ".join(f"`{name}`" for name in family.adapted.models if name != "denoiser")


def _formats(family: ModelFamily) -> str:
    """Those that hold a LoRA, and those that hold a LoHa."""
    found: list[str] = []
    for adapter in (LoraConfig(r=2, lora_alpha=2), LoHaConfig(r=2, alpha=2)):
        own = type(family)(family.pretrained_model_name_or_path)
        _loaded(own, adapter=adapter)
        files = files_of(own, own.adapted.tensors(), {})
        found += [one.name for one in FORMATS if one.name not in found and not one.why_not(files)]
    return ", ".join(found)


def _yes(shown: bool) -> str:
    assert shown
    return "yes"


COLUMNS: dict[str, Callable[[ModelFamily], str]] = {
    "cache": _cache,
    "buckets": _buckets,
    "quantization": _storages,
    "strategies": _strategies,
    "plan": _plan,
    "drawing": _sampling,
    "text encoders trained": _text_encoders,
    "files": _formats,
}


def row(family: type[ModelFamily], folder: Path) -> str:
    """The line of a family in the table."""
    cells = [column(family(str(folder))) for column in COLUMNS.values()]
    return f"| `{family.__name__}` | {' | '.join(cells)} |"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FOLDERS, ids=lambda kind: kind.__name__)
def test_the_docs_say_what_works(family: type[ModelFamily], request: pytest.FixtureRequest) -> None:
    line = row(family, request.getfixturevalue(FOLDERS[family]))
    assert line in DOCS.read_text(encoding="utf-8")


def test_the_columns_are_those_of_the_docs() -> None:
    assert f"| | {' | '.join(COLUMNS)} |" in DOCS.read_text(encoding="utf-8")
