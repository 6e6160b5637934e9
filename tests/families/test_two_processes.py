"""Every family under ddp and FSDP2 on two processes, with Int8 and NF4, from a cache and without: as on one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora.tools.cache import cache_shards
from tests.families import two_processes
from tests.families.folders import FOLDERS
from tests.families.two_processes import RUNS
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
        named = [f"{family}={base}" for family, base in bases.items()]
        processes(["-m", "tests.families.two_processes", folder, session_shards, *named], 2, folder)

    return made_once(tmp_path_factory, "families", make)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", [kind.__name__ for kind in FOLDERS])
def test_learns_what_one_process_learns(family: str, name: str, runs: Path) -> None:
    _, stored, _ = RUNS[name]
    other = load_file(runs / f"{family}-{'NF4' if stored == 'Int8' else 'Int8'}.safetensors")
    alone, ours = load_file(runs / f"{family}-{stored}.safetensors"), load_file(runs / f"{family}-{name}.safetensors")
    assert ours.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert any(not torch.allclose(other[key], value, rtol=1e-4, atol=1e-6) for key, value in alone.items())
