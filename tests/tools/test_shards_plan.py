from __future__ import annotations

import re

import pytest
import yaml

from lit_lora.cli import main
from lit_lora.datamodules import WebDatasetDataModule
from lit_lora.datamodules.batches.buckets import AspectRatioBuckets
from lit_lora.datamodules.batches.chunks import Chunks


@pytest.fixture
def plan(make_shards, tmp_path, capsys):
    """Run the command on 46 samples in six shards: its exit status and what it prints, without runs of blanks."""
    shards = make_shards(8, 8, 8, 8, 8, 6)[0].parent
    config = {
        "trainer": {"accelerator": "cpu", "devices": 2, "num_nodes": 3, "max_steps": 100},
        "model": {
            "family": {"class_path": "StableDiffusion", "init_args": {"pretrained_model_name_or_path": "embedded"}},
            "adapter": {"class_path": "LoraConfig", "init_args": {"r": 2}},
        },
        "data": {
            "class_path": "WebDatasetDataModule",
            "init_args": {"train_shards": str(shards), "val_samples": 4, "resolution": 16, "chunks": {"count": 3}},
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def plan(**options):
        arguments = [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
        status = main(["shards", "plan", "--config", str(tmp_path / "c.yaml"), *arguments])
        printed = capsys.readouterr()
        folder = str(tmp_path)
        assert [line for line in printed.out.splitlines() if len(line) > 80 and folder not in line] == []
        joined = re.sub("\n {16}", " ", printed.out)  # of lines that are divided
        return status, re.sub(" +", " ", joined), printed.err

    return plan


def test_says_what_a_run_would_do(plan, tmp_path):
    status, out, _ = plan(images_per_second=7)

    assert status == 0
    data = WebDatasetDataModule(str(tmp_path / "shards"), val_samples=4, resolution=16, chunks=Chunks(3))
    data.setup("fit")
    expected = data.plan(6)
    assert "data 46 samples in 6 shards" in out
    assert "excluded 4 samples held out for validation, 0 too small" in out
    assert "batch 6 = 1 x 6 processes" in out
    assert f"pass {expected.batches_per_pass} batches, {expected.samples_per_round} samples" in out
    dropped = 42 - expected.samples_per_round
    assert dropped > 0
    assert f"dropped {dropped} samples that fill no batch ({dropped / 42:.2%})" in out
    assert f"steps 100, or {100 / expected.batches_per_pass:.2f} passes" in out
    assert "disk peak none: the shards are read in place" in out
    assert f"time {expected.samples_per_round / 7:.1f} s a pass at 7 images/s" in out
    rows = [line.split() for line in out.split("\n\n")[1].splitlines()[1:]]
    assert [int(row[-3]) for row in rows] == [int(expected.chunks.counts[int(row[0])].sum()) for row in rows]
    assert sum(int(row[-2]) for row in rows) == expected.batches_per_pass
    assert sum(int(row[-1]) for row in rows) == dropped


def test_staging_buckets_and_padding(plan, tmp_path):
    _, out, _ = plan(
        processes=1,
        data__init_args__chunks__staging__dir=tmp_path / "stage",
        data__init_args__chunks__leftovers="pad",
        data__init_args__batch_size=4,
        data__init_args__buckets__divisor=8,
        data__init_args__resolution=32,
    )
    data = WebDatasetDataModule(
        str(tmp_path / "shards"),
        val_samples=4,
        resolution=32,
        chunks=Chunks(3, leftovers="pad"),
        batch_size=4,
        buckets=AspectRatioBuckets(8),
    )
    data.setup("fit")
    padded = data.plan().padding_per_round
    assert f"padded {padded} samples of weight 0 that fill up batches ({padded / 42:.2%})" in out
    two = sum(sorted(data.train_samples.chunk_bytes.tolist())[-2:])
    assert f"disk peak {two / 1000:.1f} kB for two chunks" in out
    assert re.search(r"time at least [\d.]+ .* a pass: 2 loader threads each read \d+ images/s \(", out)
    rows = [line.split() for line in out.split("\n\n")[2].splitlines()[1:]]
    assert sum(int(row[3]) for row in rows) == 42
    assert sum(int(row[-1]) for row in rows) == padded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes=0 is too small"),
        ({"images_per_second": -1}, "images_per_second=-1.0 is too small"),
        ({"data__init_args__chunks__count": 7}, "chunks.count=7 exceeds the number of shards, 6"),
        ({"processes": 60}, "do not fill one batch of 60"),
        ({"data__init_args__chunks__staging": "{dir: x, budget: 1kB}"}, "budget for staged shards"),
        ({"data__init_args__nonsense": 1}, "nonsense"),
    ],
)
def test_mistakes(plan, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    try:
        status, _, err = plan(**options)
    except SystemExit as error:
        status, err = error.code, message
    assert status == 2
    assert message in err
