from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lit_lora.tools import demo


@pytest.mark.slow
def test_the_demo_from_end_to_end_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "INFERENCE_STEPS", 2)
    for _ in range(2):
        demo.demo(str(tmp_path), steps=2, images_per_digit=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["classifier_accuracy"] > 0.97
    assert 0 <= report["accuracy_before"] <= 1
    assert 0 <= report["accuracy_after"] <= 1
    assert report["images_judged"] == 20
    assert 0 < report["trainable_parameters"] < 0.2 * report["total_parameters"]
    adapter = tmp_path / "adapter"
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert sorted(p.name for p in adapter.iterdir()) == names
    assert report["adapter_bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (2 * (10 * 34 + 2) + 12, 2 * 34 + 2)
    assert list(tmp_path.glob("lightning_logs/version_1/events*"))
    console = capsys.readouterr()
    ending = console.out[console.out.rindex("The classifier") :]
    assert max(len(line) for line in ending.splitlines() if str(tmp_path) not in line) <= 80
    following = """
Next:
lit-lora sample --prompts "a handwritten seven" \\
  --count 8 --guidance_scale 2.0 \\
"""
    assert f"{following}  --adapter {adapter}\n" in ending
    assert (console.out + console.err).count("Next:") == 2  # once in each run


def test_the_classifier_reads_scans_through_the_same_path_as_generated_images() -> None:
    """Scans enlarged to the model's size are recognised, so scale and orientation are right."""
    scans, digits = load_digits(return_X_y=True)
    classifier, _ = demo._fit_classifier(scans, digits)
    held_out = {digit: np.flatnonzero(digits[1::2] == digit) for digit in range(10)}
    small = demo._scan_images(scans[1::2])
    images = [small[held_out[i % 10][i // 10]].resize((32, 32), Image.Resampling.BICUBIC) for i in range(100)]
    assert demo._accuracy(classifier, images) > 0.95
    assert demo._accuracy(classifier, images[1:] + images[:1]) < 0.2
