from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_lora.byte_sizes import format_bytes
from lit_lora.errors import UserError
from lit_lora.planning.device import find_device
from lit_lora.tools.plan import _leaves_out_start, _progress, memory_of, plan_command

Plan = Callable[..., tuple[int, str]]


@pytest.fixture
def plan(make_shards: Any, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Run the command on a tiny config: its exit status and what it prints."""
    sampler = {"class_path": "SampleImages", "init_args": {"prompts": ["a", "b"], "height": 16, "width": 16}}
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 100, "gradient_clip_val": 1.0, "callbacks": [sampler]},
        "model": {
            "family": {
                "class_path": "StableDiffusion",
                "init_args": {"pretrained_model_name_or_path": str(sd_folder)},
            },
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2}},
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {
                "train_shards": str(make_shards(6)[0].parent),
                "val_samples": 2,
                "resolution": 32,
                "batch_size": 2,
            },
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def plan(**options: Any) -> tuple[int, str]:
        arguments = [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
        status = plan_command(["--config", str(tmp_path / "c.yaml"), *arguments])
        return status, capsys.readouterr().out

    return plan


def test_tells_of_memory_files_and_data(plan: Plan, tmp_path: Path) -> None:
    status, out = plan(json=tmp_path / "plan.json")
    assert status == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert list(written["phases"]) == ["load", "forward", "backward", "optimizer", "validation", "sampling"]
    assert written["peak"] == max(sum(kinds.values()) for kinds in written["phases"].values())
    assert (written["batch_size"], written["height"], written["width"]) == (2, 32, 32)
    assert f"{written['adapter_parameters']:,} parameters" in out
    assert "2 x 32 x 32 px on cpu" in out
    assert "6 samples in 1 shard," in out


def test_the_last_size_of_ranks_that_are_pruned(plan: Plan, tmp_path: Path) -> None:
    budget = {"class_path": "RankBudget", "init_args": {"share": 0.25}}
    status, out = plan(**{"trainer__callbacks+": json.dumps([budget])}, json=tmp_path / "plan.json")
    assert status == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    first, last = written["adapter_parameters"], written["last_adapter_parameters"]
    assert last == round(first / 4)
    assert f"RankBudget leaves about {last:,} of the {first:,} parameters" in out
    assert f"in a file\nof {format_bytes(written['adapter_file_bytes'] - 4 * (first - last))}, " in out
    # Weights, gradients and two averages of AdamW, four bytes each, and its count of steps.
    freed = re.search(r"frees ([\d.]+) kB of weights", out)
    assert freed is not None
    assert float(freed[1]) * 1000 == pytest.approx((first - last) * 16, rel=0.02)


@pytest.mark.parametrize(
    ("callback", "options", "expected"),
    [
        ("CordaInitialization", {}, True),
        ("LoraGaInitialization", {}, True),
        ("LoftqInitialization", {"files_for": "original"}, True),
        ("LoftqInitialization", {"files_for": "quantized"}, False),
        ("EvaInitialization", {}, False),
    ],
)
def test_which_callbacks_let_files_leave_out_first_values(
    callback: str, options: dict[str, str], expected: bool
) -> None:
    callbacks = [{"class_path": f"lit_lora.callbacks.{callback}", "init_args": options}]
    assert _leaves_out_start({"callbacks": callbacks}) is expected


def test_says_what_makes_it_fit(plan: Plan, tmp_path: Path) -> None:
    options = {"batch_size": 8, "cached": "[latents,text]", "trainer__callbacks": "null"}
    plan(json=tmp_path / "whole.json", **options)
    needed = json.loads((tmp_path / "whole.json").read_text())["needed"]
    status, out = plan(device_memory=f"{needed}B", **options)
    assert status == 0
    assert "fits: " in out
    status, out = plan(device_memory=f"{needed - 100_000}B", json=tmp_path / "changed.json", **options)
    assert status == 1
    assert "  --model.memory.gradient_checkpointing true   needs " in out
    assert json.loads((tmp_path / "changed.json").read_text())["changes"][-1]["needed"] <= needed - 100_000
    # The options as printed make the run fit.
    for line in out.splitlines():
        if line.startswith(("  --model", "  --data")):
            words = line.partition("   needs")[0].split()
            options |= {
                key.removeprefix("--").replace(".", "__"): value for key, value in zip(*[iter(words)] * 2, strict=True)
            }
    assert plan(device_memory=f"{needed - 100_000}B", **options)[0] == 0


def test_says_which_process_is_planned(plan: Plan) -> None:
    several = {"trainer__devices": 2, "trainer__num_nodes": 2, "cached": "[latents,text]", "trainer__callbacks": "null"}
    assert "each of 4 processes, DDP:" in plan(**several)[1]
    assert "each of 4 processes, FSDP2:\n         1/4 of" in plan(trainer__strategy="lit_lora_fsdp", **several)[1]
    options = {"trainer__strategy": "lit_lora.distributed.LitLoraFSDP", "trainer__strategy__shard_size": 2}
    assert "each of 4 processes, FSDP2:\n         1/2 of" in plan(**options, **several)[1]
    with pytest.raises(UserError, match="strategy='ddpp' is not known; did you mean ddp"):
        plan(trainer__strategy="ddpp", **several)


def test_without_the_data(plan: Plan, tmp_path: Path) -> None:
    options = {"data__init_args__train_shards": tmp_path / "absent", "cached": "[latents,text]"}
    status, out = plan(json=tmp_path / "plan.json", **options)
    assert status == 0
    cache = json.loads((tmp_path / "plan.json").read_text())["cache"]
    assert list(cache["phases"]) == ["vae", "text_encoder"]
    assert f"lit-lora cache needs {format_bytes(cache['needed'])} with its batch_size 8" in out
    assert re.search(r"^cache vae .*\ncache text ", out, re.MULTILINE)
    assert "data: no summary, since it cannot be read yet" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "device='abacus' is not known"),
        ({"device_memory": "much"}, "device_memory='much' is not a byte size"),
        ({"search": True}, "search=true needs device_memory"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"json": "."}, r"json='.' is a folder; name a file, such as ./memory_plan.json"),
    ],
)
def test_mistakes(plan: Plan, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**options)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", shown)
    with _progress() as tell:
        tell("with batch size 2")
    assert ("planning with batch size 2" in shown.getvalue()) is terminal
    if not terminal:
        assert not shown.getvalue()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 10**12), ("1_000", 10**12), ("11.5", 11_500_000_000), ("8GiB", 2**33), ("9 MB", 9 * 10**6)],
)
def test_memory_without_a_unit_is_in_gb(text: str, size: int) -> None:
    assert memory_of(text, find_device("cpu")) == size
