"""``lit-lora adapter merge``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from lit_lora import mapped
from lit_lora.adapter_tools.plain_lora import lora_layers
from lit_lora.cli import main
from lit_lora.formats import write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.tools.adapter_arguments import adapter_arguments
from tests.adapter_tools.unet import unet_adapter
from tests.helpers import largest_file

Paths = tuple[str, str]


@pytest.fixture(scope="module")
def paths(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Two LoRAs of a UNet; the second has fewer layers."""
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    names = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "conv_in"))]
    made = []
    for seed, layers in enumerate((names, names[:2])):
        folder = tmp_path_factory.mktemp("adapter")
        write_adapter(unet_adapter(unet, layers, seed=seed), folder)
        made.append(str(folder))
    return made[0], made[1]


def deltas(path: str | Path) -> dict[str, torch.Tensor]:
    layers = lora_layers(read_adapter(path), path)["denoiser"]
    return {name: layer.delta() for name, layer in layers.items()}


def test_two_adapters(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.safetensors"
    assert main(["adapter", "merge", *paths, str(out), "--weights", "0.7", "-0.3", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:4])) <= 80
    assert [line.split()[-3:] for line in lines[1:3]] == [["0.7", str(len(deltas(paths[0]))), "4"], ["-0.3", "2", "4"]]
    assert lines[3].split() == ["merged", str(len(deltas(paths[0]))), "4", "to", "8"]
    one, two = deltas(paths[0]), deltas(paths[1])
    for name, delta in deltas(out).items():
        torch.testing.assert_close(delta, 0.7 * one[name] - 0.3 * two.get(name, torch.zeros(())), rtol=0, atol=1e-6)


def test_into_the_base(paths: Paths, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    command = ["adapter", "merge", *paths, str(out), "--into", str(sd_folder), "--weights", "0.7", "0.3"]
    assert main(command) == 0
    assert f"denoiser          {len(deltas(paths[0]))} weights changed" in capsys.readouterr().out
    base, merged = (DiffusionPipeline.from_pretrained(folder).unet.state_dict() for folder in (sd_folder, out))
    one, two = deltas(paths[0]), deltas(paths[1])
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        change = 0.7 * one.get(layer, torch.zeros(())) + 0.3 * two.get(layer, torch.zeros(()))
        torch.testing.assert_close(merged[name], value + change, rtol=0, atol=1e-6)
    assert main(command) == 2
    assert "exists; name another output, or set --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1"], "2 adapters and 1 weights were given; give one weight for each adapter"),
        (["--into", "embedded", "--rank", "3"], "into=embedded and rank=3 exclude each other"),
        (["--into", "no/such/base"], "'no/such/base' is neither a folder nor the id of a repository"),
        (["--rank", "9"], "rank=9 is above 8, the highest sum"),
    ],
)
def test_refused(
    options: list[str], message: str, paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "merge", *paths, str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit_leaves_nothing(
    paths: Paths, flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "merge", paths[0], str(tmp_path / "out"), "--into", str(flux_folder)]) == 2
    assert "is an adapter of StableDiffusion" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_arguments() -> None:
    made = adapter_arguments(["merge", "a", "b c", "out", "--weights", "0.7", "-1e-3", "--rank", "4", "--overwrite"])
    assert made == ["merge", '["a", "b c"]', "out", "--weights", "[0.7, -1e-3]", "--rank", "4", "--overwrite=true"]
    assert adapter_arguments(["merge", '["a"]', "out"]) == ["merge", '["a"]', "out"]
    assert adapter_arguments(["resize", "a", "--overwrite", "false"]) == ["resize", "a", "--overwrite", "false"]
    assert adapter_arguments(["merge", "--help"]) == ["merge", "--help"]


def test_results_wait_on_the_disk(
    paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SMALL", 0)
    command = ["adapter", "merge", *paths, str(tmp_path / "new" / "out")]
    with largest_file(20):
        assert main(command) == 2
    assert (
        f"cannot write {tmp_path / 'new'}: File too large; raise the limit of a file's size" in capsys.readouterr().err
    )
    assert not [*(tmp_path / "new").iterdir()]
    assert main(command) == 0
