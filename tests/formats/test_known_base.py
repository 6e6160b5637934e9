"""An adapter knows the contents of its base, whose path may come to name another one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from peft import LoraConfig

from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.errors import UserError
from lit_lora.formats.find import read_adapter
from lit_lora.formats.from_file import FromFile
from lit_lora.formats.known_base import changed_base
from lit_lora.tools.drawing import Drawer, ScaledAdapter
from lit_lora.tools.drawing_base import FamilyBase
from tests.helpers import diffusion_module, loader_of, make_batches

OTHER = r"the base .* is not the one that .*adapter was trained over: another denoiser \(blake2b:\w+, now blake2b:\w+\); name"


@pytest.fixture
def base(sd_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, trainer_options: dict[str, Any], tmp_path: Path) -> Path:
    """The files of an adapter that was trained over the base."""
    saves = AdapterCheckpoint(tmp_path / "saved", filename="a")
    Trainer(**trainer_options | {"enable_checkpointing": True, "max_steps": 1, "callbacks": [saves]}).fit(
        diffusion_module(base, LoraConfig(r=2)), loader_of(make_batches(1))
    )
    return tmp_path / "saved" / "a.adapter"


def change(base: Path) -> None:
    [weights] = (base / "unet").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def draw(adapter: Path, base: Path | None = None) -> None:
    drawer = Drawer(base and str(base), family=None, dtype="float32", device="cpu", sizes=[(16, 16)])
    drawer.adapt([ScaledAdapter(str(adapter))])


def told(recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(one.message) for one in recwarn if "trained over" in str(one.message)]


def test_drawing_over_another_base_of_the_same_path(
    adapter: Path, base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    draw(adapter)
    draw(adapter, Path(shutil.copytree(base, tmp_path / "moved")))
    change(tmp_path / "moved")
    draw(adapter, tmp_path / "moved")  # a base of another path is another base by intention
    assert not told(recwarn)
    change(base)
    with pytest.warns(UserWarning, match=OTHER):
        draw(adapter)


def test_the_base_is_read_once_for_all_scales(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []
    identity = FamilyBase.identity

    def counted(base: FamilyBase) -> dict[str, str]:
        reads.append(base)
        return identity(base)

    monkeypatch.setattr(FamilyBase, "identity", counted)
    drawer = Drawer(None, family=None, dtype="float32", device="cpu", sizes=[(16, 16)])
    for scale in (0.5, 1.0):
        drawer.adapt([ScaledAdapter(str(adapter), scale)])
    assert len(reads) == 1


def test_going_on_over_another_base_of_the_same_path(
    adapter: Path, base: Path, trainer_options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    def fit() -> None:
        module = diffusion_module(base, FromFile(str(adapter)))
        Trainer(**trainer_options, max_steps=1).fit(module, loader_of(make_batches(1)))

    fit()
    assert not [one for one in recwarn if "trained otherwise" in str(one.message)]
    change(base)
    with pytest.warns(UserWarning, match=r"trained otherwise: the base's denoiser \(blake2b:\w+, now blake2b:\w+\)"):
        fit()


def test_a_damaged_entry(adapter: Path) -> None:
    files = replace(read_adapter(adapter, None), metadata={"ss_lit_lora_base": "[]"})
    with pytest.raises(UserError, match="'ss_lit_lora_base' is damaged"):
        changed_base(files, "base", dict)
