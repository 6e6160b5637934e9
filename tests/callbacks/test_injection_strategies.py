"""LoraInjection on two processes under every strategy trains what it trains on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.callbacks.injection_script import KINDS, STRATEGIES
from tests.helpers import made_once, processes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="session")
def injections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""

    def make(folder: Path) -> None:
        for count in (1, 2):
            processes(["-m", "tests.callbacks.injection_script", folder], count, folder)

    return made_once(tmp_path_factory, "injections", make)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [(strategy, kind) for strategy in STRATEGIES for kind in (KINDS if "ZeRO" not in strategy else KINDS[:2])],
)
def test_two_processes_train_and_resume_as_one(injections: Path, strategy: str, kind: str) -> None:
    for run in (kind, f"{kind} resumed"):
        single, here = (injections / f"{name} {run}" for name in ("single", strategy))
        expected = torch.load(single / "last.ckpt", weights_only=True)
        found = torch.load(here / "last.ckpt", weights_only=True)
        assert found["state_dict"].keys() == expected["state_dict"].keys()
        for name, value in expected["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-4, atol=1e-5)
        names = [
            sorted(name for group in one["optimizer_states"][0]["param_groups"] for name in group["param_names"])
            for one in (found, expected)
        ]
        assert names == [sorted(expected["state_dict"])] * 2
        files = [load_file(folder / "last.adapter" / "adapter_model.safetensors") for folder in (single, here)]
        assert files[0].keys() == files[1].keys()
        for name, value in files[0].items():
            torch.testing.assert_close(files[1][name], value, rtol=1e-4, atol=1e-5)


def test_training_has_changed_something(injections: Path) -> None:
    for kind in KINDS:
        once, twice = (
            torch.load(injections / f"single {kind}{more}" / "last.ckpt", weights_only=True)["state_dict"]
            for more in ("", " resumed")
        )
        assert all((once[name] - value).abs().max() > 1e-3 for name, value in twice.items() if "lora_B" in name)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_trained(injections: Path, rank: int) -> None:
    said = json.loads((injections / f"refusals-{rank}.json").read_text())
    assert "the processes have different frozen weights" in said["Unequal"]
    assert "temperature is a trained parameter of Loose itself" in said["Loose"]
    assert "parameter group 0 of AdamW has nothing to train" in said["WithoutDecay"]
