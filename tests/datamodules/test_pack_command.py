from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from jsonargparse import auto_cli

from lit_lora.tools.shards import pack


def test_summary_and_next_step(tmp_path, encode_image, capsys):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(encode_image())
        (folder / f"{name}.txt").write_text(name)
    (folder / "d.jpg").write_bytes(b"")

    auto_cli(pack, args=[str(folder), str(out), "--samples_per_shard=2", "--max_bad=1", "--shuffle_seed=3"])
    printed = capsys.readouterr().out
    assert "shards   2 (0 were there already)" in printed
    assert "samples  3" in printed
    assert f"left out 1 (see {out / 'bad.jsonl'})" in printed
    assert f"--data.init_args.train_shards {out}" in printed
    assert len(list(out.glob("*.tar"))) == 2


def test_import_is_light():
    code = "import sys, lit_lora.tools.shards; assert not {'torch', 'numpy', 'PIL', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
