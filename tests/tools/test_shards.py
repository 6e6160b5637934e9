from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_lora.cli import main
from lit_lora.datamodules.indexing.data_index import DataIndex
from lit_lora.datamodules.indexing.open_table import open_table
from lit_lora.tools import shards
from tests.datamodules.faulty_server import FaultyServer


@pytest.fixture
def images(tmp_path, encode_image):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(encode_image())
        (folder / f"{name}.txt").write_text(name)
    return folder


def test_pack(images, tmp_path, capsys):
    (images / "d.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert (
        main(["shards", "pack", str(images), str(out), "--samples_per_shard=2", "--max_bad=1", "--shuffle_seed=3"]) == 0
    )
    printed = capsys.readouterr().out
    assert "shards   2 (0 of them from an earlier run)" in printed
    assert "samples  3" in printed
    assert f"left out 1 (see {out / 'bad.jsonl'})" in printed
    assert f"--data.init_args.train_shards {out}" in printed
    assert len(list(out.glob("*.tar"))) == 2


def test_pack_past_the_limit(images, tmp_path, capsys):
    for name in "abc":
        (images / f"{name}.jpg").write_bytes(b"")
    assert main(["shards", "pack", str(images), str(tmp_path / "out"), "--max_bad=1"]) == 2
    assert "3 bad files, more than max_bad=1" in capsys.readouterr().err
    assert len((tmp_path / "out" / "bad.jsonl").read_text().splitlines()) == 3


def test_pack_named_columns(tmp_path, encode_image, capsys):
    pq.write_table(pa.table({"bild": [encode_image()], "worte": ["x"]}), tmp_path / "x.parquet")
    arguments = ["shards", "pack", str(tmp_path / "x.parquet"), str(tmp_path / "out"), "--image_column", "bild"]
    assert main(arguments) == 2
    assert "set caption_column to one of its columns: bild, worte" in capsys.readouterr().err
    assert main([*arguments, "--caption_column", "worte"]) == 0


def test_pack_shards_that_are_not_finished(tmp_path, make_shards, capsys):
    first, _ = make_shards(1, 1)
    first.with_name("shard-000000_stats.json").write_text("{}")
    assert main(["shards", "pack", str(first.parent), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "left out 1 " in printed
    assert "  1  shard-000001.tar: shard-000001_stats.json is missing: img2dataset was interrupted" in printed


def test_index(tmp_path, make_shards, capsys):
    make_shards(2, 3, folder="one")
    make_shards(4, folder="two")
    assert main(["shards", "index", str(tmp_path / "{one,two}")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[:4] == ["shards", "3", "samples", "9"]
    assert printed[5::2] == [f"{tmp_path}/one/shards.index", f"{tmp_path}/two/shards.index"]
    assert len(DataIndex.load(tmp_path / "one" / "shards.index")) == 5
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.index")}
    assert main(["shards", "index", str(tmp_path / "{one,two}")]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.index")} == before


def test_index_names_all_damaged_shards(tmp_path, make_shards, capsys):
    paths = [*make_shards(2, 2, 2, folder="one"), *make_shards(2, folder="two")]
    for path in (paths[0], paths[3]):
        path.write_bytes(path.read_bytes()[:700])
    assert main(["shards", "index", f"[{tmp_path / 'one'}, {tmp_path / 'two'}]"]) == 2
    error = capsys.readouterr().err
    assert f"{paths[0]} is truncated or damaged at byte 700" in error
    assert f"{paths[3]} is truncated or damaged at byte 700" in error
    # The good ones were indexed; mending the others is all that is left to do.
    assert [path.with_name(f"{path.name}.index").exists() for path in paths] == [False, True, True, False]


def test_check_and_info_refuse_urls(capsys):
    for command in ("check", "info"):
        assert main(["shards", command, "https://example.org/x.tar"]) == 2
        assert "https://example.org/x.tar is not a local file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["index", "info", "check"])
def test_wrong_jobs(make_shards, command, capsys):
    assert main(["shards", command, str(make_shards(1)[0]), "--jobs=0"]) == 2
    assert "jobs=0 is too small" in capsys.readouterr().err


def test_check_of_clean_shards(make_shards, capsys):
    assert main(["shards", "check", str(make_shards(2, 3)[0].parent)]) == 0
    assert capsys.readouterr().out == "shards   2\nsamples  5\n\nno problems found\n"


def test_problems_are_told_within_80_columns(tmp_path, write_tar, capsys, monkeypatch):
    name = "a_very_long_name_of_an_image_that_somebody_has_given_to_it"
    write_tar(tmp_path / "a_shard_with_a_long_name.tar", {f"{name}.jpg": b"", f"{name}.txt": b"x", f"{name}1.pt": b""})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main(["shards", "check", "a_shard_with_a_long_name.tar"])
    for command in ("index", "info"):
        main(["shards", command, "a_shard_with_a_long_name.tar"])
    shown = capsys.readouterr().out
    assert f"a_shard_with_a_long_name.tar: {name} (the .jpg member has 0 bytes)" in " ".join(shown.split())
    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_check_with_problems(tmp_path, write_tar, encode_image, capsys, monkeypatch):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"", "a.txt": b"x", "b.jpg": b"", "b.txt": b"", "c.pt": b""})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main(["shards", "check", path.name, "--report", "report.jsonl"])
    assert capsys.readouterr().out == (
        "shards   1\n"
        "samples  2\n"
        "\n"
        "problem                 count\n"
        "empty image                 2\n"
        "    x.tar: a (the .jpg member has 0 bytes)\n"
        "    x.tar: b (the .jpg member has 0 bytes)\n"
        "empty caption               1\n"
        "    x.tar: b\n"
        "note: members not read      1\n"
        "    x.tar: c.pt (1 that end in .pt)\n"
    )
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert sorted(kinds) == ["empty caption", "empty image", "empty image", "members not read"]


def test_check_with_notes_alone_and_without_decoding(tmp_path, write_tar, encode_image, capsys):
    cut = encode_image(64, 64)[:-300]
    path = write_tar(tmp_path / "x.tar", {"a.jpg": cut, "a.txt": b"x", "b.pt": b""})
    assert main(["shards", "check", str(path), "--decode", "false"]) == 0
    assert "note: members not read      1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main(["shards", "check", str(path)])
    assert "undecodable image" in capsys.readouterr().out


def test_index_of_urls(make_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = FaultyServer(make_shards(2, 3)[0].parent)
    try:
        assert main(["shards", "index", server.url + "/shard-{000000..000001}.tar", "--jobs=2"]) == 0
        printed = capsys.readouterr().out
        assert f"folder   {server.url}\nshards   2\nsamples  5\nindex    " in printed
        assert len(open_table(server.url)) == 5
        assert main(["shards", "index", f"[{server.url}/x.tar, {tmp_path}]"]) == 2
        assert "is local and" in capsys.readouterr().err
    finally:
        server.close()


def test_info(tmp_path, write_tar, encode_image, capsys):
    members = {}
    for number, (width, height) in enumerate([(100, 400), (150, 100), (400, 100)]):
        members |= {f"{number}.png": encode_image(width, height, "PNG"), f"{number}.txt": b"caption"}
    members |= {"3.jpg": b"damaged", "3.txt": b"x"}
    path = write_tar(tmp_path / "x.tar", members)
    assert main(["shards", "info", str(path)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "images of unknown size         1",
        ".txt           4",
        "width       100  100  100     150   400   400   400",
        "megapixels  0.01  0.01  0.01    0.04  0.04  0.04  0.04",
    ):
        assert " ".join(line.split()) in " ".join(printed.split())
    assert "bucket" not in printed

    assert main(["shards", "info", str(path), "--resolution=128", "--max_aspect_ratio=4"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    # A third of 150 x 100 is cut off; the others fit whole.
    assert ["256", "x", "64", "1", "33.3%", "0.0%", "0.0%"] in printed
    assert ["128", "x", "128", "1", "33.3%", "33.3%", "100.0%"] in printed
    assert ["64", "x", "256", "1", "33.3%", "0.0%", "0.0%"] in printed


def test_info_of_cached_or_damaged_samples_alone(tmp_path, write_tar, capsys):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"damaged", "a.txt": b"x"})
    assert main(["shards", "info", str(path), "--resolution=512"]) == 0
    assert "images of unknown size" in capsys.readouterr().out


def test_info_refuses_before_it_reads(tmp_path, capsys):
    assert main(["shards", "info", str(tmp_path), "--resolution=100"]) == 2
    assert "resolution=100 is not a multiple" in capsys.readouterr().err


def test_import_is_light():
    code = "import sys, lit_lora.tools.shards; assert not {'torch', 'numpy', 'PIL', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert callable(shards.pack)


@pytest.mark.slow
def test_index_with_jobs(make_shards, capsys):
    paths = make_shards(2, 2, 2)
    paths[1].write_bytes(paths[1].read_bytes()[:700])
    assert main(["shards", "index", str(paths[0].parent), "--jobs=2"]) == 2
    assert f"{paths[1]} is truncated" in capsys.readouterr().err
    os.remove(paths[1])
    assert main(["shards", "index", str(paths[0].parent), "--jobs=2"]) == 0


def test_names_in_shards_cannot_control_the_terminal(tmp_path, write_tar, encode_image, capsys):
    key = "\x1b[2J\nlit-lora: done"
    write_tar(
        tmp_path / "a.tar", {f"{key}.jpg": encode_image(), "b.jpg": encode_image(), f"{key}.txt": b"x", "\x1b.y": b""}
    )
    write_tar(tmp_path / "c.tar", {"c.jpg": encode_image(), f"{key}.y": b"", f"{key}.jpg": b""})
    with pytest.raises(SystemExit):
        main(["shards", "check", str(tmp_path / "a.tar")])
    assert main(["shards", "info", str(tmp_path / "a.tar")]) == 2
    assert main(["shards", "info", str(tmp_path / "c.tar")]) == 0
    assert main(["shards", "index", str(tmp_path / "c.tar")]) == 0
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed
    assert "\\x1b[2J\\nlit-lora: done" in " ".join(printed.split())
    assert "the key '\\x1b[2J\\nlit-lora: done' twice" in printed
    assert not any(line.startswith("lit-lora: done") for line in printed.splitlines())


def test_info_and_index_name_members_that_no_index_contains(tmp_path, write_tar, encode_image, capsys):
    image = encode_image()
    write_tar(
        tmp_path / "a.tar", {"0.jpg": image, "0.txt": b"0", "22.05.jpg": image, "22.05.txt": b"5", "0.seg.png": b""}
    )
    with pytest.warns(UserWarning, match="2 members are passed over, first 22.05.jpg"):
        assert main(["shards", "info", str(tmp_path)]) == 0
    expected = [
        f"2 members of samples that are passed over, first 22.05.jpg in {tmp_path}/a.tar (a key ends at the first dot"
    ]
    expected += [f"1 members that end in .seg.png, first 0.seg.png in {tmp_path}/a.tar"]
    printed = " ".join(capsys.readouterr().out.split())
    assert all(line in printed for line in expected)
    assert main(["shards", "index", str(tmp_path)]) == 0  # from the saved index
    printed = " ".join(capsys.readouterr().out.split())
    assert all(line in printed for line in expected)
