"""Every family under ddp and FSDP2 on two processes, with Int8 and NF4, from a cache and without: as on one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora.tools.cache import cache_shards
from tests.families import two_processes
from tests.families.folders import FOLDERS
from tests.families.two_processes import RUNS, takes_part
from tests.helpers import made_once, processes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, session_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the adapters of all runs."""
    bases = {kind.__name__: request.getfixturevalue(fixture) for kind, fixture in FOLDERS.items()}

    def make(folder: Path) -> None:
        for family, base in bases.items():
            module = two_processes.module_of(family, base, "Int8")
            cache_shards(
                module, two_processes.data_of(session_shards, 4), str(folder / family / "cache"), dtype="float32"
            )
            for stored in ("Int8", "NF4"):
                alone = two_processes.train(family, base, session_shards, "auto", stored, folder / family)
                save_file(alone, folder / f"{family}-{stored}.safetensors")
            if takes_part(family, "fsdp text"):
                alone = two_processes.train(family, base, session_shards, "auto", "NF4", folder / family, text=True)
                save_file(alone, folder / f"{family}-text.safetensors")
        named = [f"{family}={base}" for family, base in bases.items()]
        processes(["-m", "tests.families.two_processes", folder, session_shards, *named], 2, folder)

    return made_once(tmp_path_factory, "families", make)


CASES = [(kind.__name__, name) for kind in FOLDERS for name in RUNS if takes_part(kind.__name__, name)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_learns_what_one_process_learns(family: str, name: str, runs: Path) -> None:
    _, stored, _ = RUNS[name]
    same, other = ("text", stored) if "text" in name else (stored, "NF4" if stored == "Int8" else "Int8")
    alone, different = (
        load_file(runs / f"{family}-{same}.safetensors"),
        load_file(runs / f"{family}-{other}.safetensors"),
    )
    ours = load_file(runs / f"{family}-{name}.safetensors")
    assert ours.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=key)
    shared = alone.keys() & different.keys()
    assert any(not torch.allclose(different[key], alone[key], rtol=1e-4, atol=1e-6) for key in shared)
