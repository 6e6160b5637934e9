"""Embeddings of new tokens in the files of diffusers, A1111, ComfyUI and sd-scripts: theirs load here, and ours there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_lora import FromFile, StableDiffusion, StableDiffusionXL, UserError
from lit_lora.cli import main
from lit_lora.formats import write_adapter
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.find import read_adapter
from tests.test_text_training import module_of

ROWS = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
SECOND = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))


def sd_scripts(folder: Path) -> Path:  # save_weights of train_textual_inversion.py
    save_file({"emb_params": ROWS}, folder / "cat-toy.safetensors", {"ss_steps": "7"})
    return folder / "cat-toy.safetensors"


def sd_scripts_torch(folder: Path) -> Path:
    torch.save({"emb_params": ROWS}, folder / "cat-toy.pt")
    return folder / "cat-toy.pt"


def a1111(folder: Path) -> Path:  # Embedding.save of modules/textual_inversion/textual_inversion.py
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(ROWS)}, "name": "cat-toy-500"}
    torch.save({**content, "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None}, folder / "Cat-Toy.pt")
    return folder / "Cat-Toy.pt"


def diffusers_torch(folder: Path) -> Path:  # save_progress of examples/textual_inversion/textual_inversion.py
    torch.save({"cat-toy": ROWS}, folder / "learned_embeds.bin")
    return folder


def diffusers(folder: Path) -> Path:
    save_file({"cat-toy": ROWS}, folder / "learned_embeds.safetensors")
    return folder


def a1111_xl(folder: Path) -> Path:
    torch.save({"clip_l": ROWS, "clip_g": SECOND}, folder / "cat-toy.pt")
    return folder / "cat-toy.pt"


def sd_scripts_xl(folder: Path) -> Path:  # save_weights of sdxl_train_textual_inversion.py
    save_file({"clip_g": SECOND, "clip_l": ROWS}, folder / "cat-toy.safetensors")
    return folder / "cat-toy.safetensors"


def diffusers_xl(folder: Path) -> Path:  # textual_inversion_sdxl.py writes a file for each text encoder
    save_file({"cat-toy": ROWS}, folder / "learned_embeds-steps-5.safetensors")
    save_file({"cat-toy": SECOND}, folder / "learned_embeds_2-steps-5.safetensors")
    return folder / "learned_embeds-steps-5.safetensors"


ONE = [sd_scripts, sd_scripts_torch, a1111, diffusers, diffusers_torch]
TWO = [a1111_xl, sd_scripts_xl, diffusers_xl]


@pytest.mark.parametrize("written", [*ONE, *TWO])
def test_files_of_others_are_read(written: Any, tmp_path: Path) -> None:
    found = read_adapter(written(tmp_path))
    two = written in TWO
    assert found.family is (StableDiffusionXL if two else StableDiffusion)
    assert [*found.new_tokens] == ["cat-toy"]
    rows = found.new_tokens["cat-toy"]
    assert rows.keys() == ({"text_encoder", "text_encoder_2"} if two else {"text_encoder"})
    assert torch.equal(rows["text_encoder"], ROWS)
    assert not two or torch.equal(rows["text_encoder_2"], SECOND)
    assert found.metadata == ({"ss_steps": "7"} if written is sd_scripts else {})


def test_one_vector_without_a_dimension_of_its_own(tmp_path: Path) -> None:
    torch.save({"<cat-toy>": ROWS[0]}, tmp_path / "learned_embeds.bin")
    assert torch.equal(read_adapter(tmp_path).new_tokens["<cat-toy>"]["text_encoder"], ROWS[:1])


@pytest.mark.parametrize("written", [sd_scripts, a1111_xl])
def test_training_begins_with_them(written: Any, sd_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    folder, family = (sdxl_folder, StableDiffusionXL) if written in TWO else (sd_folder, StableDiffusion)
    path = str(written(tmp_path))
    for options in (
        {"adapter": None, "new_tokens": {"<mine>": path}},  # under a name of one's own
        {"adapter": FromFile(path=path)},
    ):
        module = module_of(folder, family, text_adapter=None, **options)
        module.configure_model()
        [(token, rows)] = module.family.new_token_rows().items()
        assert token == ("<mine>" if "new_tokens" in options else "cat-toy")
        assert torch.equal(rows["text_encoder"], ROWS)
        assert family is StableDiffusion or torch.equal(rows["text_encoder_2"], SECOND)


def test_a_file_beside_those_of_a_folder(tmp_path: Path) -> None:
    write_adapter(adapter_of(StableDiffusion), tmp_path)
    save_file({"emb_params": SECOND}, tmp_path / "embeddings" / "hat.safetensors")
    assert {token: len(rows) for token, rows in read_adapter(tmp_path).new_tokens.items()} == {"<cat-toy>": 1, "hat": 1}


def test_wrong_files(sd_folder: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str, reason: str, **options: Any) -> None:
        with pytest.raises(UserError, match=reason):
            read_adapter(tmp_path / name, **options)

    save_file({"emb_params": ROWS}, tmp_path / "one.safetensors")
    refused("one.safetensors", "should hold clip_l and clip_g .* it holds emb_params", family=StableDiffusionXL)
    save_file({"clip_l": ROWS, "clip_g": SECOND}, tmp_path / "two.safetensors")
    refused("two.safetensors", "it holds clip_g, clip_l", family=StableDiffusion)
    save_file({"emb_params": ROWS}, tmp_path / "two words.safetensors")
    refused("two words.safetensors", "'two words' should be of lowercase letters")
    save_file({"emb_params": ROWS * float("nan")}, tmp_path / "nan.safetensors")
    refused("nan.safetensors", "new token nan in")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:100])
    refused("half.safetensors", "cannot read")
    torch.save({"a.lora_A.weight": ROWS, "b": ROWS, "c": ROWS}, tmp_path / "layers.bin")
    refused("layers.bin", "may run code when it is read, and is no embedding of a token")
    (tmp_path / "half.pt").write_bytes((tmp_path / "layers.bin").read_bytes()[:100])
    refused("half.pt", "may run code when it is read")
    pair = diffusers_xl(tmp_path)
    refused("learned_embeds_2-steps-5.safetensors", "is for the second text encoder; name .*learned_embeds-steps-5")
    save_file({"dog": SECOND}, tmp_path / "learned_embeds_2-steps-5.safetensors")
    refused(pair.name, "the same token for two text encoders, and they hold cat-toy and dog")

    def not_begun(path: str, reason: str, folder: Path = sd_folder, family: Any = StableDiffusion) -> None:
        with pytest.raises(UserError, match=reason):
            module_of(folder, family, adapter=None, text_adapter=None, new_tokens={"<a>": path}).configure_model()

    not_begun(str(tmp_path / "two.safetensors"), "it holds clip_g, clip_l")
    not_begun(str(tmp_path / "missing.pt"), r"missing.pt does not exist")
    save_file({f"layer{i}.lora_down.weight": ROWS + i for i in range(9)}, tmp_path / "lora.safetensors")
    not_begun(str(tmp_path / "lora.safetensors"), r"lora.safetensors should hold .*lora_down.weight and 6 more; copy")
    not_begun(str(tmp_path / "nan.safetensors"), "nan.safetensors")
    save_file({"emb_params": torch.ones(1, 7)}, tmp_path / "wide.safetensors")
    not_begun(str(tmp_path / "wide.safetensors"), r"have the shape \(1, 7\), and the text encoder takes \(n, 16\)")
    assert main(["adapter", "check", str(tmp_path / "wide.safetensors"), "--base", str(sd_folder)]) == 2
    assert "have 7 values, and the base needs" in capsys.readouterr().err


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"string_to_param": {"*": ROWS}, "name": Harm()}, tmp_path / "cat.pt")
    with pytest.raises(UserError, match="may run code when it is read"):
        read_adapter(tmp_path / "cat.pt")
    assert not (tmp_path / "ran").exists()


def adapter_of(family: Any) -> AdapterFiles:
    rows = {"text_encoder": ROWS, "text_encoder_2": SECOND}
    return AdapterFiles(
        {}, {}, family=family, new_tokens={"<cat-toy>": {name: rows[name] for name in family.token_encoders}}
    )


def in_a1111(data: dict[str, Any]) -> tuple[Tensor, ...]:
    """What ``create_embedding_from_data`` of A1111's modules/textual_inversion takes from a file."""
    if "string_to_param" in data:
        return (next(iter(data["string_to_param"].values())),)
    if "clip_g" in data and "clip_l" in data:
        return data["clip_l"], data["clip_g"]
    assert len(data) == 1, "A1111: embedding file has multiple terms in it"
    return (next(iter(data.values())),)


def in_comfyui(data: dict[str, Any]) -> tuple[Tensor, ...]:
    """What ``load_embed`` of ComfyUI's comfy/sd1_clip.py takes for the tokenizers of each of its text encoders."""
    keys = ["clip_l", "clip_g"] if len(data) == 2 else ["clip_l"]
    return tuple(data[key] if key in data else next(iter(data.values())) for key in keys)


def in_sd_scripts(data: dict[str, Any]) -> tuple[Tensor, ...]:
    """What ``load_weights`` of train_textual_inversion.py and of sdxl_train_textual_inversion.py takes."""
    first, second = data.get("clip_l"), data.get("clip_g")
    return (first, second) if first is not None and second is not None else (next(iter(data.values())),)


@pytest.mark.parametrize("read", [in_a1111, in_comfyui, in_sd_scripts])
@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_ours_load_in_other_programs(family: Any, read: Any, tmp_path: Path) -> None:
    write_adapter(adapter_of(family), tmp_path)
    found = read(load_file(tmp_path / "embeddings" / "cat-toy.safetensors"))  # these name the token after the file
    expected = (ROWS, SECOND) if family is StableDiffusionXL else (ROWS,)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
