"""New tokens: their embeddings are trained alone or with adapters, saved as files of textual inversion, and loaded back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lit_lora import AdapterCheckpoint, AdapterEMA, FromFile, LoraDiffusion, ParameterGroup, UserError
from lit_lora.adapter_tools.compare import compare
from lit_lora.adapter_tools.push import Upload
from lit_lora.cli import main
from lit_lora.families.new_tokens import NewTokenEmbedding, add_tokens, check_placeholders
from lit_lora.formats import write_adapter
from lit_lora.formats.find import read_adapter
from lit_lora.formats.tensor_file import TensorFile, write_tensors
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run
from tests.formats.adapters import FAMILIES
from tests.helpers import loader_of, make_batches
from tests.test_text_training import NEAR, TEXT, apart, module_of

TOKENS: dict[str, int | str] = {"<cat-toy>": "a cat", "<style>": 1}
PROMPTS = ["a <cat-toy> in <style>", "a cat", ""]


@pytest.fixture(scope="session")
def sd_folder(shallow_sd_folder: Path) -> Path:
    """Only text encoders and new tokens matter here, and each layer of the UNet takes time."""
    return shallow_sd_folder


def with_placeholders(count: int) -> list[dict[str, Any]]:
    captions = ["a <cat-toy> on white", "a seven in <style>"]
    return [{**batch, "caption": captions} for batch in make_batches(count)]


def fit(module: LoraDiffusion, options: dict[str, Any], steps: int = 2, **more: Any) -> Trainer:
    trainer = Trainer(**options | {"max_steps": steps} | more)
    trainer.fit(module, loader_of(with_placeholders(steps)))
    return trainer


def encoded(module: LoraDiffusion) -> dict[str, Tensor]:
    module.eval()
    with torch.no_grad():
        return module.family.encode_captions(PROMPTS)


def in_diffusers(fixture: str, base: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The prompts encoded by plain diffusers with the files of a folder, and before the new tokens were loaded."""
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    family: Any = FAMILIES[fixture](str(base))
    family.load(torch.float32, without=("vae",))
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(folder)
    before = prompt_embeddings(pipeline)
    for token in TOKENS:
        file = folder / "embeddings" / f"{token.strip('<>')}.safetensors"
        if fixture == "sd_folder":
            pipeline.load_textual_inversion(file)
            continue
        rows = load_file(file)
        for suffix, key in (("", "clip_l"), ("_2", "clip_g")):
            parts = {name: getattr(pipeline, f"{name}{suffix}") for name in ("text_encoder", "tokenizer")}
            pipeline.load_textual_inversion(rows[key], token=token, **parts)
    return prompt_embeddings(pipeline), before


def prompt_embeddings(pipeline: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        found = pipeline.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    named = {"encoder_hidden_states": found[0]}
    return named | ({"pooled": found[2]} if len(found) == 4 else {})


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module with trained tokens, with or without adapters, and the folder of its files."""
    made: dict[tuple[str, bool], tuple[LoraDiffusion, Path]] = {}

    def get(fixture: str, adapters: bool) -> tuple[LoraDiffusion, Path]:
        if (fixture, adapters) not in made:
            options = {} if adapters else {"adapter": None, "text_adapter": None}
            module = module_of(request.getfixturevalue(fixture), FAMILIES[fixture], new_tokens=TOKENS, **options)
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}
            fit(module, {"accelerator": "cpu", "logger": False, "enable_checkpointing": False} | quiet)
            folder = tmp_path_factory.mktemp("trained") / "adapter"
            module.save_adapter(folder)
            module.save_adapter(folder)  # it replaces its own
            made[fixture, adapters] = module, folder
        return made[fixture, adapters]

    return get


def test_the_embedding_is_a_table_with_further_rows() -> None:
    table = nn.Embedding(10, 4)
    before, rows = table.weight.detach().clone(), torch.randn(3, 4)
    embedding = NewTokenEmbedding(table, 8, rows)  # tables may have more rows than the tokenizer has tokens
    ids = torch.tensor([[0, 7, 8], [10, 9, 1]])
    expected = F.embedding(ids, torch.cat([before[:8], rows]))
    assert torch.equal(embedding(ids), expected)
    embedding(ids).square().sum().backward()
    assert table.weight.grad is None
    assert torch.allclose(embedding.new_tokens.grad, 2 * rows)
    assert torch.equal(table.weight, before)
    assert embedding.to(torch.bfloat16)(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("adapters", [True, False], ids=["with adapters", "alone"])
@pytest.mark.parametrize("fixture", ["sd_folder", "sdxl_folder"])
def test_plain_diffusers_computes_the_same(
    fixture: str, adapters: bool, trained: Any, request: pytest.FixtureRequest
) -> None:
    module, folder = trained(fixture, adapters)
    found, before = in_diffusers(fixture, request.getfixturevalue(fixture), folder)
    assert apart(encoded(module), found) <= NEAR
    assert apart(before, found) > 10 * NEAR
    assert (folder / "pytorch_lora_weights.safetensors").is_file() == adapters
    trained_names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert adapters or all(name.endswith(".new_tokens") for name in trained_names)


@pytest.mark.parametrize("fixture", ["sd_folder", "sdxl_folder"])
def test_all_other_embeddings_stay_as_they_are(fixture: str, trained: Any, request: pytest.FixtureRequest) -> None:
    module, _ = trained(fixture, True)
    fresh = FAMILIES[fixture](str(request.getfixturevalue(fixture)))
    fresh.load(torch.float32, without=("vae", "denoiser"))
    for name in FAMILIES[fixture].token_encoders:
        embedding = module.family.encoders[name].get_base_model().get_input_embeddings()
        table = fresh.encoders[name].get_input_embeddings().weight
        assert torch.equal(embedding.base.weight, table)
        ids = fresh.encoders["tokenizer"]("a cat", add_special_tokens=False).input_ids
        assert not torch.equal(embedding.new_tokens[: len(ids)], table[ids])  # where they began


def test_words_and_numbers_are_first_values(tokenizer: CLIPTokenizer, sd_folder: Path) -> None:
    module = module_of(sd_folder, new_tokens=TOKENS)
    module.configure_model()
    rows = module.family.new_token_rows()
    embedding = module.family.encoders["text_encoder"].get_base_model().get_input_embeddings()
    ids = tokenizer("a cat", add_special_tokens=False).input_ids
    assert torch.equal(rows["<cat-toy>"]["text_encoder"], embedding.base.weight[ids])
    assert rows["<style>"]["text_encoder"].shape == (1, 16)
    assert module.family.new_tokens == {"<cat-toy>": len(ids), "<style>": 1}


def test_resuming_is_exact(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    batches = with_placeholders(4)
    options = trainer_options | {"max_epochs": None, "enable_checkpointing": True, "gradient_clip_val": 0.1}

    def run(steps: int, folder: str, first: int = 0, ckpt_path: Path | None = None, **tokens: Any) -> Path:
        module = module_of(
            sd_folder,
            new_tokens=TOKENS | tokens,
            parameter_groups=[ParameterGroup("*.new_tokens", lr=0.1, weight_decay=0)],
        )
        checkpoint = AdapterCheckpoint(tmp_path / folder, save_last=True)
        trainer = Trainer(**options, max_steps=steps, callbacks=[checkpoint, AdapterEMA()])
        trainer.fit(module, loader_of(batches[first:] + batches[:first]), ckpt_path=ckpt_path)
        return Path(checkpoint.last_model_path)

    whole, part = run(4, "whole"), run(2, "parts")
    with pytest.raises(
        UserError, match=r"has the new tokens <cat-toy> \(4\), <style> \(1\), and this run .*<more> \(2\)"
    ):
        run(4, "other", 2, part, **{"<more>": 2})
    resumed = run(4, "parts", 2, part)
    for kind in (".adapter", ".ema.adapter"):
        one, other = (read_adapter(path.with_name(f"last{kind}")).new_tokens for path in (whole, resumed))
        assert one.keys() == TOKENS.keys()
        for token, rows in one.items():
            assert torch.equal(rows["text_encoder"], other[token]["text_encoder"])
    average, last = (read_adapter(whole.with_name(f"last{kind}")).new_tokens for kind in (".ema.adapter", ".adapter"))
    assert not torch.equal(average["<style>"]["text_encoder"], last["<style>"]["text_encoder"])


@pytest.mark.parametrize("fixture", ["sd_folder", "sdxl_folder"])
def test_training_goes_on_from_the_files(
    fixture: str, trained: Any, request: pytest.FixtureRequest, trainer_options: dict[str, Any]
) -> None:
    module, folder = trained(fixture, True)
    options = {"adapter": FromFile(path=str(folder)), "text_adapter": None}
    again = module_of(request.getfixturevalue(fixture), FAMILIES[fixture], new_tokens={"<more>": 2}, **options)
    again.configure_model()
    assert apart(encoded(module), encoded(again)) <= NEAR
    assert again.family.new_tokens["<more>"] == 2
    with pytest.warns(
        UserWarning, match=r"holds the new tokens <more>, .* 2 hold <cat-toy>, 2 hold <style>, 0 hold <more>"
    ):
        fit(again, trainer_options)
    assert apart(encoded(module), encoded(again)) > 10 * NEAR
    with pytest.raises(UserError, match=r"has <cat-toy>, which the file of model.adapter has already"):
        module_of(request.getfixturevalue(fixture), FAMILIES[fixture], new_tokens=TOKENS, **options)
    dropped = FromFile(path=str(folder), drop_text_encoders=True)
    module_of(request.getfixturevalue(fixture), FAMILIES[fixture], new_tokens=TOKENS, adapter=dropped)


@pytest.mark.filterwarnings("ignore:the prompt .* which is drawn as plain text")  # the base alone has no tokens
@pytest.mark.parametrize("adapters", [True, False], ids=["with adapters", "alone"])
def test_samples_are_those_of_the_training_model(adapters: bool, trained: Any, tmp_path: Path) -> None:
    module, folder = trained("sd_folder", adapters)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 5.0}
    [ours] = module.generate([PROMPTS[0]], [0], **options)
    draw = ["--prompts", PROMPTS[0], "--steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]
    assert main(["sample", "--adapter", str(folder), "--out", str(tmp_path / "drawn"), *draw]) == 0
    with Image.open(tmp_path / "drawn" / "0000.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()
    base = ["--base", str(module.family.pretrained_model_name_or_path)]
    assert main(["sample", *base, "--out", str(tmp_path / "base"), *draw]) == 0
    with Image.open(tmp_path / "base" / "0000.png") as other:
        assert ours.tobytes() != other.tobytes()


def test_adapter_tools_keep_them_or_say_why_not(
    trained: Any, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = trained("sd_folder", True)
    assert main(["adapter", "info", str(folder)]) == 0
    assert "new tokens  <cat-toy> (4 vectors), <style>" in capsys.readouterr().out
    assert main(["adapter", "resize", str(folder), str(tmp_path / "resized"), "--rank", "4"]) == 0
    assert main(["adapter", "convert", str(folder), str(tmp_path / "kohya"), "--format", "kohya"]) == 0
    assert main(["adapter", "merge", str(folder), str(tmp_path / "merged")]) == 0
    for name in ("resized", "kohya", "merged"):
        assert read_adapter(tmp_path / name).new_tokens.keys() == TOKENS.keys()
    capsys.readouterr()
    file = str(tmp_path / "one.safetensors")
    refused = {
        "would lose the new tokens <cat-toy>, <style>": ["convert", str(folder), file, "--format", "kohya"],
        "which belong into the tokenizer": ["merge", str(folder), str(tmp_path / "whole"), "--into", str(sd_folder)],
        "two of the adapters have a new token <cat-toy>": ["merge", str(folder), str(folder), str(tmp_path / "both")],
    }
    for reason, arguments in refused.items():
        assert main(["adapter", *arguments]) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
    layers = str(folder / "pytorch_lora_weights.safetensors")
    assert main(["adapter", "convert", layers, file, "--format", "kohya"]) == 0
    assert "embeddings/cat-toy.safetensors" in Upload.of(read_adapter(folder), folder, "somebody/toys").files


@pytest.mark.parametrize("fixture", ["sd_folder", "sdxl_folder"])
def test_the_card_says_how_to_load_them(fixture: str, trained: Any) -> None:
    _, folder = trained(fixture, False)
    card = (folder / "README.md").read_text()
    assert "trigger words | `<cat-toy>, <style>`" in card  # Markdown takes it for HTML without
    assert card.index("load_textual_inversion") < card.index("image = pipeline(")
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    if fixture == "sd_folder":
        assert 'subfolder="embeddings", weight_name="cat-toy.safetensors", token="<cat-toy>")' in card
    else:
        assert (
            'load_textual_inversion(embeddings["clip_g"], token="<style>", text_encoder=pipeline.text_encoder_2' in card
        )


def test_files_of_other_families_and_damaged_ones_are_refused(
    trained: Any, sdxl_folder: Path, tmp_path: Path, sd_folder: Path
) -> None:
    _, folder = trained("sdxl_folder", False)
    copied = tmp_path / "copied"
    (copied / "embeddings").mkdir(parents=True)
    for file in (folder / "embeddings").iterdir():
        (copied / "embeddings" / file.name).write_bytes(file.read_bytes())
    save_file({"<other>": torch.ones(1, 16)}, copied / "embeddings" / "other.safetensors")
    with pytest.raises(UserError, match=r"should hold clip_l and clip_g for StableDiffusionXL, and it holds <other>"):
        read_adapter(copied)
    (copied / "embeddings" / "other.safetensors").unlink()
    with pytest.raises(UserError, match=r"is a new token of StableDiffusionXL, not of StableDiffusion"):
        module_of(sd_folder, adapter=FromFile(path=str(copied)), text_adapter=None)
    path = copied / "embeddings" / "style.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"clip_g"', b'"clip_h"'))
    with pytest.raises(UserError, match=r"style.safetensors should hold clip_l and clip_g for StableDiffusionXL"):
        read_adapter(copied)


def test_a_folder_of_tokens_alone(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, folder = trained("sd_folder", False)
    base = str(module.family.pretrained_model_name_or_path)
    values = sum(rows["text_encoder"].numel() for rows in module.family.new_token_rows().values())
    assert main(["adapter", "info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"method      textual inversion", "format      textual inversion", f"parameters  {values}"} <= {*lines}
    assert main(["adapter", "check", str(folder)]) == 0
    assert capsys.readouterr().out == f"new tokens        2 tensors fit CLIPTextModel of {base}\n"
    assert main(["adapter", "check", str(folder), "--base", "embedded"]) == 2
    assert "the embeddings of <cat-toy> have 16 values, and the base needs" in capsys.readouterr().err
    for arguments in (["resize", "out", "--rank", "1"], ["merge", "out"], ["convert", "out"]):
        command, *others = arguments
        assert (
            main(["adapter", command, str(folder), *(str(tmp_path / "x") if one == "out" else one for one in others)])
            == 2
        )
        assert "new tokens alone" in capsys.readouterr().err
    assert "| method | textual inversion |" in (folder / "README.md").read_text()


def test_differences_of_tokens(trained: Any) -> None:
    _, folder = trained("sd_folder", False)
    one = read_adapter(folder)
    rows = one.new_tokens["<style>"]["text_encoder"]
    other = replace(one, new_tokens={"<style>": {"text_encoder": torch.cat([2 * rows, rows])}})
    found = compare(one, other, ("one", "other"))
    assert found.layers["<style> (text_encoder, vector 1)"].relative == pytest.approx(1)
    assert found.only_first == [f"<cat-toy> (text_encoder, vector {i})" for i in range(1, 5)]
    assert found.only_second == ["<style> (text_encoder, vector 2)"]


def test_damaged_and_doubled_files(trained: Any, tmp_path: Path) -> None:
    _, folder = trained("sdxl_folder", False)
    files = {path.name: TensorFile.open(path) for path in (folder / "embeddings").iterdir()}
    (tmp_path / "embeddings").mkdir()
    path = tmp_path / "embeddings" / "one.safetensors"

    def wrong(message: str, tensors: dict[str, Tensor] | None = None, **own: Any) -> None:
        file = files["style.safetensors"]
        entry = json.loads(file.metadata["lit_lora"]) | own
        write_tensors(path, tensors or file.tensors, {**file.metadata, "lit_lora": json.dumps(entry)})
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path)

    wrong(r"it holds clip_g \(2, 16\) and clip_l \(1, 16\)", {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(2, 16)})
    wrong("is a new token of the model family Another, which is not imported", family="Another")
    wrong("should be of lowercase letters", token="../../style")
    cat = files["cat-toy.safetensors"]
    write_tensors(tmp_path / "embeddings" / "cat.safetensors", cat.tensors, cat.metadata)
    wrong("cat.safetensors and .*one.safetensors both hold the new token <cat-toy>", token="<cat-toy>")
    write_tensors(
        path, files["style.safetensors"].tensors, {**files["style.safetensors"].metadata, "lit_lora.base": "{}"}
    )
    with pytest.raises(UserError, match=r"of different trainings: their metadata differ in lit_lora.base"):
        read_adapter(tmp_path)


def test_what_the_files_say_of_the_training_stays(trained: Any, tmp_path: Path) -> None:
    adapter = read_adapter(trained("sd_folder", False)[1])
    told = {"ss_steps": "7", "lit_lora.scheduler": '{"rescale_betas_zero_snr": true}'}
    write_adapter(replace(adapter, metadata=told), tmp_path)
    assert read_adapter(tmp_path).metadata == told


@pytest.mark.parametrize(
    ("starts", "clash"),
    [
        ({"style": 3, "style_2": 1}, "style_2"),
        ({"style": 1, "style_1": 1}, "style_1"),
        ({"cat": 2, "<big-cat>": 1}, "<big-cat>"),
    ],
)
def test_tokens_that_captions_could_not_tell_apart(starts: dict[str, int], clash: str, sd_folder: Path) -> None:
    module = module_of(sd_folder, adapter=None, text_adapter=None, new_tokens=starts)
    with pytest.raises(UserError, match=f"cannot be told apart from the token '{clash}'"):
        module.configure_model()


def test_what_is_no_new_token(tokenizer: CLIPTokenizer, sd_folder: Path, sd3_folder: Path, flux_folder: Path) -> None:
    for fixture, folder in (("sd3_folder", sd3_folder), ("flux_folder", flux_folder)):
        with pytest.raises(UserError, match=r"model.new_tokens: the pipeline of .* loads no embeddings"):
            module_of(folder, FAMILIES[fixture], new_tokens=TOKENS)
    for name in ("<Cat>", "two words", "../up", ""):
        with pytest.raises(UserError, match="should be of lowercase letters"):
            module_of(sd_folder, new_tokens={name: 1})
    with pytest.raises(UserError, match="'<cat>' and 'cat' would have the same file"):
        check_placeholders(["<cat>", "cat"])
    with pytest.raises(UserError, match=r"new_tokens\['<cat>'\]"):
        module_of(sd_folder, new_tokens={"<cat>": 0})
    for token, start, reason in (("a</w>", 1, "is a token"), ("<s>", " ", "hold no token")):
        encoder = nn.Module()
        encoder.get_input_embeddings = lambda: nn.Embedding(448, 4)  # type: ignore[assignment]
        with pytest.raises(UserError, match=reason):
            add_tokens(tokenizer, encoder, {token: start})
    with pytest.raises(UserError, match=r"have the shape \(1, 5\), and the text encoder takes \(n, 4\)"):
        add_tokens(tokenizer, encoder, {"<s>": torch.ones(1, 5)})
    assert len(tokenizer) == 448  # nothing was added


def test_a_plan_counts_them(sd_folder: Path) -> None:
    planned = plan(Run(module_of(sd_folder, adapter=None, text_adapter=None, new_tokens={"<a>": 3}), 2, 16, 16))
    assert planned.adapter_parameters == 3 * 16
    assert planned.adapter_file_bytes > 4 * 3 * 16
    both = plan(Run(module_of(sd_folder, text_adapter=TEXT, new_tokens={"<a>": 3}), 2, 16, 16))
    without = plan(Run(module_of(sd_folder, text_adapter=TEXT), 2, 16, 16))
    assert both.adapter_parameters == without.adapter_parameters + 3 * 16


@pytest.mark.filterwarnings("ignore:no caption holds the new tokens")
def test_a_config_with_new_tokens(sd_folder: Path, session_shards: Path, tmp_path: Path) -> None:
    family = {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": str(sd_folder)}}
    checkpoint = {"class_path": "AdapterCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}}
    config = {
        "trainer": {"max_steps": 1, "logger": False, "accelerator": "cpu", "default_root_dir": str(tmp_path)}
        | {"callbacks": [checkpoint], "enable_progress_bar": False, "enable_model_summary": False},
        "model": {"family": family, "adapter": None, "new_tokens": {"<cat-toy>": "cat", "<style>": 2}},
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {"train_shards": str(session_shards), "batch_size": 2, "resolution": 16, "num_workers": 0},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    assert main(["fit", "--config", str(path)]) == 0
    rows = read_adapter(tmp_path / "last.adapter").new_tokens
    assert {token: len(found["text_encoder"]) for token, found in rows.items()}["<style>"] == 2
